"""The ops of LAMP, each behind one function with a choice of implementations.

``impl=None`` takes what is fastest for the tensors' device in this installation. An implementation
that is asked for by name runs or is refused with the reason; it is never replaced silently.
"""

import torch
from torch import Tensor

from lamp_fast.errors import InputError
from lamp_fast.ops import contracts, reference

__all__ = ["implementations", "prefix_attention", "quick_gelu", "retrieve"]


def retrieve(
    query: Tensor, keys: Tensor, bias: Tensor, k: int, *, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose for every query the k pool entries of largest cosine + bias (Eq. 4 and 8).

    Args:
        query: [B, Dv], floating point; B may be 0.
        keys: [M, Dv], dtype and device of ``query``.
        bias: [M], any floating-point dtype, device of ``query``; it steers the choice and takes
            part in no value and no gradient.
        k: how many entries a row chooses, 1..M.
        impl: "reference", "cpp" (CPU) or None.

    Returns:
        indices, int64 [B, k], in ascending pool order; similarity [B, k], the cosine without bias,
        float64 for float64 inputs and float32 for all others, differentiable in query and keys;
        counts, int64 [M], how many rows of this call chose each entry.

    Raises:
        InputError: shapes, dtypes, devices or k that do not fit, or an ``impl`` that cannot serve.

    *Numerics*: norms and dot products are summed in float64, also under autocast and TF32; the
    cosine is rounded once to the similarity's dtype and the bias added there. Equal scores: the
    lower index wins. A bias of +inf forces an entry in; scores of -inf come last, in index order.
    A zero row has cosine 0 with everything and takes no gradient. A row with a NaN score gets
    entries 0..k-1 with NaN similarity and counts nothing.

    *Determinism*: the same bits for any number of threads; nothing is mutated.
    """
    _check_retrieve(query, keys, bias, k)
    name = _implementation("retrieve", impl, query)
    bias = bias.detach()
    if query.dtype not in (torch.float32, torch.float64):
        query, keys = query.float(), keys.float()
    if name == "reference":
        return reference.retrieve(query, keys, bias, k)
    if torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad):
        return _Retrieve.apply(query, keys, bias, k, name)
    return contracts.retrieve(query, keys, bias, k, name)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    prefix_index: Tensor | None = None,
    causal: bool = False,
    blind: int = 0,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attend to a sequence and to a prefix of keys and values that sequences may share (Eq. 5-7).

    Args:
        q: [N, H, R, d], floating point. Its rows are the last R of the sequence's L, unless
            ``mask`` says what each of them sees.
        k, v: [N, H, L, d], dtype and device of ``q``, L >= R.
        prefix_k, prefix_v: [G, H, P, d], dtype and device of ``q``; P may be 0.
        prefix_index: int64 [N], values in 0..G-1: the prefix that each sequence reads (on CPU the
            range is checked). Default: sequence n reads n // (N // G), with N divisible by G.
        causal: row i sees rows 0..i of its sequence only. It does not concern the prefix.
        blind: the first so many rows of the sequence see none of the prefix; the others see all.
        mask: bool [R, P + L], which rows of prefix and sequence each query row sees, alike in every
            sequence and head; at least one each. In place of ``causal`` and ``blind``.
        scale: of the dot products; default d ** -0.5.
        impl: "reference" or None.

    Returns:
        [N, H, R, d] in the dtype of ``q``, differentiable in all five tensors.

    Raises:
        InputError: shapes, dtypes, devices or numbers that do not fit, or an ``impl`` that cannot
            serve.

    *Numerics*: those of torch's scaled_dot_product_attention, which the reference calls; softmax in
    at least float32.

    *Determinism*: as torch's attention; the default grouping sums gradients of a shared prefix in a
    fixed order, and ``prefix_index`` as torch's indexing does.
    """
    _check_prefix_attention(q, k, v, prefix_k, prefix_v, prefix_index, blind)
    if mask is not None:
        _check_mask(mask, q, k, prefix_k, causal, blind)
    _implementation("prefix_attention", impl, q)
    return reference.prefix_attention(
        q, k, v, prefix_k, prefix_v, prefix_index, causal, blind, mask, scale
    )


def quick_gelu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """x sigmoid(1.702 x), keeping only ``x`` for backward.

    Args:
        x: any shape, floating point.
        impl: "reference" or None.

    Returns:
        The shape and dtype of ``x``, differentiable.

    Raises:
        InputError: an integer ``x``, or an ``impl`` that cannot serve.

    *Numerics*: element-wise in the dtype of ``x``, as torch does. *Determinism*: always.
    """
    if not x.is_floating_point():
        raise InputError(f"x: {x.dtype}, expected floating point")
    _implementation("quick_gelu", impl, x)
    return _QuickGelu.apply(x)


def implementations(op: str) -> dict[str, str | None]:
    """Every implementation of an op and why it cannot run in this installation (None: it can).

    Raises:
        InputError: an op that does not exist.
    """
    if op not in contracts.IMPLEMENTATIONS:
        raise InputError(f"op={op!r}: expected one of {', '.join(contracts.IMPLEMENTATIONS)}")
    return {name: contracts.why_unavailable(op, name) for name in contracts.IMPLEMENTATIONS[op]}


class _QuickGelu(torch.autograd.Function):
    """d/dx x s = s (1 + 1.702 x (1 - s)) with s = sigmoid(1.702 x), formed again from x."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return reference.quick_gelu(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(1.702 * x)
        return gradient * (gate * (1 + 1.702 * x * (1 - gate)))


class _Retrieve(torch.autograd.Function):
    """The gradient of every fused retrieve, in closed form.

    With unit rows q^ and k^, and s the chosen similarities with gradient g:
    dq_b = sum_j g_bj (k^_bj - s_bj q^_b) / |q_b|, and alike for every key over the rows that
    chose it.
    """

    @staticmethod
    def forward(ctx, query: Tensor, keys: Tensor, bias: Tensor, k: int, name: str):
        indices, similarity, counts = contracts.retrieve(query, keys, bias, k, name)
        ctx.save_for_backward(query, keys, indices, similarity)
        ctx.mark_non_differentiable(indices, counts)
        return indices, similarity, counts

    @staticmethod
    def backward(ctx, _indices, gradient: Tensor, _counts):
        query, keys, indices, similarity = ctx.saved_tensors
        # float64 for the reasons that the reference gives; the sums run over Dv and over B.
        unit_query, inverse_query = _unit_and_inverse_norm(query.double())
        unit_keys, inverse_keys = _unit_and_inverse_norm(keys.double())
        gradient = gradient.double()
        weighted = gradient * similarity.double()  # [B, k]
        # A row chooses an entry at most once, so that no two of its gradients meet.
        spread = gradient.new_zeros(len(query), len(keys))
        dense = spread.scatter(1, indices, gradient)  # [B, M]
        grad_query = grad_keys = None
        if ctx.needs_input_grad[0]:
            along = weighted.sum(dim=1, keepdim=True)
            grad_query = (dense @ unit_keys - along * unit_query) * inverse_query
            grad_query = grad_query.to(query.dtype)
        if ctx.needs_input_grad[1]:
            along = spread.scatter(1, indices, weighted).sum(dim=0)[:, None]
            grad_keys = (dense.T @ unit_query - along * unit_keys) * inverse_keys
            grad_keys = grad_keys.to(keys.dtype)
        return grad_query, grad_keys, None, None, None


def _unit_and_inverse_norm(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[R, D] -> unit rows [R, D] and 1 / norm [R, 1]; zeros for a zero row."""
    norm = rows.norm(dim=1, keepdim=True)
    inverse = norm.reciprocal().masked_fill(norm == 0, 0)
    return rows * inverse, inverse


def _implementation(op: str, impl: str | None, tensor: Tensor) -> str:
    name, objection = contracts.choose(op, impl, tensor.device.type)
    if objection is not None:
        raise InputError(f"impl={impl!r}: {op}: {objection}")
    return name


def _check_retrieve(query: Tensor, keys: Tensor, bias: Tensor, k: int) -> None:
    _check_like("query", query, "keys", keys)
    for name, rows in (("query", query), ("keys", keys)):
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise InputError(f"{name}: shape {_shape(rows)}, expected [rows, Dv] with Dv >= 1")
    if keys.shape[1] != query.shape[1]:
        raise InputError(
            f"keys: shape {_shape(keys)}, expected [M, {query.shape[1]}] as query is "
            f"{_shape(query)}"
        )
    if keys.shape[0] == 0:
        raise InputError(f"keys: shape {_shape(keys)}, expected at least one row")
    if bias.shape != keys.shape[:1] or not bias.is_floating_point():
        raise InputError(
            f"bias: {bias.dtype} {_shape(bias)}, expected floating point [{keys.shape[0]}], "
            "one for every row of keys"
        )
    if bias.device != query.device:
        raise InputError(f"bias: on {bias.device}, expected {query.device} as query")
    if not 1 <= k <= keys.shape[0]:
        raise InputError(f"k={k}: expected 1..{keys.shape[0]}, the rows of keys")


def _check_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_index: Tensor | None,
    blind: int,
) -> None:
    if q.ndim != 4 or q.shape[3] == 0:
        raise InputError(f"q: shape {_shape(q)}, expected [N, H, L, d] with d >= 1")
    _check_like("q", q, "k", k)
    _check_like("q", q, "v", v)
    if k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise InputError(
            f"k: shape {_shape(k)}, expected [{q.shape[0]}, {q.shape[1]}, L, {q.shape[3]}] as q is "
            f"{_shape(q)}"
        )
    if k.shape[2] < q.shape[2]:
        raise InputError(f"k: {k.shape[2]} rows, expected at least the {q.shape[2]} of q")
    if v.shape != k.shape:
        raise InputError(f"v: shape {_shape(v)}, expected {_shape(k)} as k")
    _check_like("q", q, "prefix_k", prefix_k)
    _check_like("q", q, "prefix_v", prefix_v)
    sequences, heads, _, width = q.shape
    if prefix_k.ndim != 4 or prefix_k.shape[1] != heads or prefix_k.shape[3] != width:
        raise InputError(
            f"prefix_k: shape {_shape(prefix_k)}, expected [G, {heads}, P, {width}] as q is "
            f"{_shape(q)}"
        )
    if prefix_v.shape != prefix_k.shape:
        raise InputError(
            f"prefix_v: shape {_shape(prefix_v)}, expected {_shape(prefix_k)} as prefix_k"
        )
    if blind < 0:
        raise InputError(f"blind={blind}: expected 0 or more rows")
    groups = prefix_k.shape[0]
    if prefix_index is None:
        if sequences and (groups == 0 or sequences % groups):
            raise InputError(
                f"prefix_k: {groups} prefixes for {sequences} sequences, expected a divisor of "
                f"{sequences}, or prefix_index"
            )
        return
    if prefix_index.shape != q.shape[:1] or prefix_index.dtype != torch.int64:
        raise InputError(
            f"prefix_index: {prefix_index.dtype} {_shape(prefix_index)}, expected torch.int64 "
            f"[{sequences}], one for every sequence of q"
        )
    if prefix_index.device != q.device:
        raise InputError(f"prefix_index: on {prefix_index.device}, expected {q.device} as q")
    # Reading values would wait for a GPU and cannot be traced.
    if sequences and q.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in prefix_index.aminmax())
        if low < 0 or high >= groups:
            wrong = low if low < 0 else high
            raise InputError(f"prefix_index: holds {wrong}, expected 0..{groups - 1}")


def _check_mask(
    mask: Tensor, q: Tensor, k: Tensor, prefix_k: Tensor, causal: bool, blind: int
) -> None:
    expected = [q.shape[2], prefix_k.shape[2] + k.shape[2]]
    if mask.dtype != torch.bool or _shape(mask) != expected:
        raise InputError(f"mask: {mask.dtype} {_shape(mask)}, expected torch.bool {expected}")
    if mask.device != q.device:
        raise InputError(f"mask: on {mask.device}, expected {q.device} as q")
    if causal or blind:
        raise InputError(f"mask: given with causal={causal}, blind={blind}; expected one or other")


def _check_like(first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    if not first.is_floating_point():
        raise InputError(f"{first_name}: {first.dtype}, expected floating point")
    if tensor.dtype != first.dtype:
        raise InputError(f"{name}: {tensor.dtype}, expected {first.dtype} as {first_name}")
    if tensor.device != first.device:
        raise InputError(f"{name}: on {tensor.device}, expected {first.device} as {first_name}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
