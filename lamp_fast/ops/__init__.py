"""The ops of LAMP, each behind one function with a choice of implementations.

``impl=None`` takes what serves the tensors best in this installation, by the table in
:mod:`lamp_fast.ops.contracts`. An implementation that is asked for by name runs or is refused with
the reason; it is never replaced silently.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lamp_fast.errors import InputError
from lamp_fast.ops import autograd, checks, contracts, reference
from lamp_fast.ops.contracts import REFERENCE, prefer

__all__ = [
    "add_layer_norm",
    "gelu",
    "implementations",
    "prefer",
    "prefix_attention",
    "quick_gelu",
    "retrieve",
]

# A causal sequence this short has rows that see few keys.
SHORT_ROWS = 32


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
        impl: "reference", "cpp" (CPU), "triton", "cuda" (M up to 256, k up to 32) or None.

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
    checks.check_retrieve(query, keys, bias, k)
    large = keys.shape[0] > 256 or k > 32
    name = _implementation("retrieve", impl, query, large)
    bias = bias.detach()
    if query.dtype not in (torch.float32, torch.float64):
        query, keys = query.float(), keys.float()
    if name == REFERENCE:
        return reference.retrieve(query, keys, bias, k)
    if _differentiates(query, keys):
        return autograd.Retrieve.apply(query, keys, bias, k, name)
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
        impl: "reference", "cpp" (CPU), "triton", "cuda" or None. The last two take heads of width
            up to 128 and no float64.

    Returns:
        [N, H, R, d] in the dtype of ``q``, differentiable in all five tensors.

    Raises:
        InputError: shapes, dtypes, devices or numbers that do not fit, or an ``impl`` that cannot
            serve.

    *Numerics*: the reference has those of torch's scaled_dot_product_attention, which it calls. All
    others form scores, softmax and sums in float32 (float64 for float64) and round once. A NaN in a
    row's query or in a key that it sees makes that row NaN; one in a value may also reach rows of
    its sequence that do not see it. Other sequences feel neither, unless they read the same prefix.

    *Determinism*: the same bits in every run, also for gradients of a shared prefix, which are
    summed in the order of the sequences; the reference with ``prefix_index`` as torch indexes.
    """
    checks.check_prefix_attention(q, k, v, prefix_k, prefix_v, prefix_index, blind)
    if mask is not None:
        checks.check_mask(mask, q, k, prefix_k, causal, blind)
    sparse = mask is not None or (causal and k.shape[2] <= SHORT_ROWS)
    name = _implementation("prefix_attention", impl, q, q.shape[3] > 128, sparse)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    tensors = q, k, v, prefix_k, prefix_v
    if name == REFERENCE:
        return reference.prefix_attention(*tensors, prefix_index, mask, causal, blind, scale)
    options = prefix_index, mask, causal, blind, scale, name
    if _differentiates(*tensors):
        return autograd.PrefixAttention.apply(*tensors, *options)
    return contracts.prefix_attention(*tensors, *options)[0]


def quick_gelu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """x sigmoid(1.702 x), keeping only ``x`` for backward.

    Args:
        x: any shape, floating point.
        impl: "reference", "triton" or None.

    Returns:
        The shape and dtype of ``x``, differentiable.

    Raises:
        InputError: an integer ``x``, or an ``impl`` that cannot serve.

    *Numerics*: the reference is element-wise in the dtype of ``x``, as torch does; triton computes
    in float32 and rounds once. *Determinism*: always.
    """
    return _activation("quick_gelu", x, impl, autograd.ReferenceQuickGelu.apply)


def gelu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """x Phi(x) with the standard normal's distribution function (exact, by erf); otherwise as
    :func:`quick_gelu`."""
    return _activation("gelu", x, impl, reference.gelu)


def add_layer_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise it with a frozen LayerNorm.

    Args:
        x, update: [..., D], alike in shape, dtype and device, floating point.
        weight, bias: [D] in the dtype of ``x``, without gradient.
        eps: added to the variance.
        impl: "reference", "triton" or None.

    Returns:
        x + update, and its rows normalised, scaled by ``weight`` and shifted by ``bias``; both
        [..., D] in the dtype of ``x``, differentiable in x and update.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, a weight that wants a gradient, or an
            ``impl`` that cannot serve.

    *Numerics*: the sum is rounded to the dtype of ``x`` first, so that it is the one that is
    returned; mean and variance are float32 (float64 for float64). *Determinism*: always.
    """
    checks.check_add_layer_norm(x, update, weight, bias)
    name = _implementation("add_layer_norm", impl, x)
    if name == REFERENCE:
        return reference.add_layer_norm(x, update, weight, bias, eps)
    if _differentiates(x, update):
        return autograd.AddLayerNorm.apply(x, update, weight, bias, eps, name)
    return contracts.add_layer_norm(x, update, weight, bias, eps, name)[:2]


def implementations(op: str) -> dict[str, str | None]:
    """Every implementation of an op and why it cannot run in this installation (None: it can).

    Raises:
        InputError: an op that does not exist.
    """
    if op not in contracts.IMPLEMENTATIONS:
        raise InputError(f"op={op!r}: expected one of {', '.join(contracts.IMPLEMENTATIONS)}")
    return {name: contracts.why_unavailable(op, name) for name in contracts.IMPLEMENTATIONS[op]}


def _activation(
    op: str, x: Tensor, impl: str | None, by_reference: Callable[[Tensor], Tensor]
) -> Tensor:
    if not x.is_floating_point():
        raise InputError(f"x: {x.dtype}, expected floating point")
    name = _implementation(op, impl, x)
    return by_reference(x) if name == REFERENCE else autograd.Gelu.apply(x, op, name)


def _differentiates(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def _implementation(
    op: str, impl: str | None, tensor: Tensor, large: bool = False, sparse: bool = False
) -> str:
    name, objection = contracts.choose(op, impl, tensor.device, tensor.dtype, large, sparse)
    if objection is not None:
        raise InputError(f"impl={impl!r}: {op}: {objection}")
    return name
