"""retrieve: which entries of a pool each query takes, and how similar they are (Eq. 4 and 8)."""

import torch
from torch import Tensor

from lamp_fast.errors import InputError
from lamp_fast.ops import dispatch, reference
from lamp_fast.ops.dispatch import ESTIMATE, REFERENCE, Rule

# What the GPU kernels keep of a row: a score an entry, a place a choice.
KERNEL_POOL, KERNEL_CHOICES = 256, 32


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

    *Determinism*: the same bits for any number of threads; nothing is mutated. Only the reference
    is differentiable twice.
    """
    _check(query, keys, bias, k)
    large = keys.shape[0] > KERNEL_POOL or k > KERNEL_CHOICES
    name = dispatch.choose("retrieve", impl, query, large)
    bias = bias.detach()
    if query.dtype not in (torch.float32, torch.float64):
        query, keys = query.float(), keys.float()
    if name == REFERENCE:
        return reference.retrieve(query, keys, bias, k)
    if dispatch.differentiates(query, keys):
        return _Retrieve.apply(query, keys, bias, k, name)
    return _forward(query, keys, bias, k, name)


def _check(query: Tensor, keys: Tensor, bias: Tensor, k: int) -> None:
    dispatch.check_like("query", query, "keys", keys)
    for name, rows in (("query", query), ("keys", keys)):
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise InputError(f"{name}: shape {[*rows.shape]}, expected [rows, Dv] with Dv >= 1")
    entries, width = keys.shape
    if width != query.shape[1]:
        raise InputError(
            f"keys: shape {[*keys.shape]}, expected [M, {query.shape[1]}] as query is "
            f"{[*query.shape]}"
        )
    if entries == 0:
        raise InputError(f"keys: shape {[*keys.shape]}, expected at least one row")
    if bias.shape != keys.shape[:1] or not bias.is_floating_point():
        raise InputError(
            f"bias: {bias.dtype} {[*bias.shape]}, expected floating point [{entries}], "
            "one for every row of keys"
        )
    if bias.device != query.device:
        raise InputError(f"bias: on {bias.device}, expected {query.device} as query")
    if not 1 <= k <= entries:
        raise InputError(f"k={k}: expected 1..{entries}, the rows of keys")


def _outputs(query: Tensor, keys: Tensor, bias: Tensor, k: int):
    rows = query.shape[0]
    return (
        query.new_empty((rows, k), dtype=torch.int64),
        query.new_empty((rows, k)),
        query.new_empty(keys.shape[0], dtype=torch.int64),
    )


# -> indices, similarity, counts
_forward = dispatch.define(
    "retrieve",
    "(Tensor query, Tensor keys, Tensor bias, SymInt k, str impl) -> (Tensor, Tensor, Tensor)",
    _outputs,
)

# -> gradients of query and keys, from that of the similarity
_backward = dispatch.define(
    "retrieve",
    "(Tensor query, Tensor keys, Tensor indices, Tensor similarity, Tensor grad, str impl)"
    " -> (Tensor, Tensor)",
    lambda query, keys, *_: (query.new_empty(query.shape), keys.new_empty(keys.shape)),
    backward=True,
)


class _Retrieve(torch.autograd.Function):
    """The gradient of every fused retrieve, in closed form.

    With unit rows q^ and k^, and s the chosen similarities with gradient g:
    dq_b = sum_j g_bj (k^_bj - s_bj q^_b) / |q_b|, and alike for every key over the rows that
    chose it.
    """

    @staticmethod
    def forward(ctx, query: Tensor, keys: Tensor, bias: Tensor, k: int, name: str):
        indices, similarity, counts = _forward(query, keys, bias, k, name)
        ctx.save_for_backward(query, keys, indices, similarity)
        ctx.name = name
        ctx.mark_non_differentiable(indices, counts)
        return indices, similarity, counts

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, _indices, gradient: Tensor, _counts):
        to_query, to_keys = _backward(*ctx.saved_tensors, gradient, ctx.name)
        needs_query, needs_keys = ctx.needs_input_grad[:2]
        return to_query if needs_query else None, to_keys if needs_keys else None, None, None, None


_LIMITS = f"M up to {KERNEL_POOL} and k up to {KERNEL_CHOICES}"

dispatch.IMPLEMENTATIONS["retrieve"] = {
    REFERENCE: dispatch.eager(),
    "cpp": dispatch.cpp(),
    "triton": dispatch.triton("retrieve", _LIMITS),
    "cuda": dispatch.cuda(_LIMITS, backward="triton"),
}
dispatch.RULES["retrieve"] = (
    Rule("cpu", "cpp", "2.4 to 3.7 times eager: benchmarks/NOTES.md"),
    Rule("cuda", "cuda", ESTIMATE),
    Rule("cuda", "triton", ESTIMATE),
)
