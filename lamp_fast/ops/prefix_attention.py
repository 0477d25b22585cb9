"""prefix_attention: rows attend to their sequence and to a prefix that sequences may share."""

import torch
from torch import Tensor

from lamp_fast.errors import InputError
from lamp_fast.ops import dispatch, reference
from lamp_fast.ops.dispatch import ESTIMATE, REFERENCE, Rule

# A causal sequence this short has rows that see few keys.
SHORT_ROWS = 32
# The widest head that the GPU kernels keep in registers.
KERNEL_WIDTH = 128


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
    others form scores, softmax and sums in float32 (float64 for float64) and round once; but where
    the CPU multiplies bfloat16 (AVX512_BF16) and every row sees every key, weights and gradients of
    scores are rounded to bfloat16 before they are multiplied. A NaN in a row's query or in a key
    that it sees makes that row NaN; one in a value may also reach rows of its sequence that do not
    see it. Other sequences feel neither, unless they read the same prefix.

    *Determinism*: the same bits in every run, also for gradients of a shared prefix, which are
    summed in the order of the sequences; the reference with ``prefix_index`` as torch indexes. No
    implementation but the reference is differentiable twice, and that where torch's attention is.
    """
    _check(q, k, v, prefix_k, prefix_v, prefix_index, blind)
    if mask is not None:
        _check_mask(mask, q, k, prefix_k, causal, blind)
    sparse = mask is not None or (causal and k.shape[2] <= SHORT_ROWS)
    name = dispatch.choose("prefix_attention", impl, q, q.shape[3] > KERNEL_WIDTH, sparse)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    tensors = q, k, v, prefix_k, prefix_v
    options = prefix_index, mask, causal, blind, scale
    if name == REFERENCE:
        return reference.prefix_attention(*tensors, *options)
    if dispatch.differentiates(*tensors):
        return _PrefixAttention.apply(*tensors, *options, name)
    return _forward(*tensors, *options, name)[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_index: Tensor | None,
    blind: int,
) -> None:
    shape = [*q.shape]
    if q.ndim != 4 or q.shape[3] == 0:
        raise InputError(f"q: shape {shape}, expected [N, H, L, d] with d >= 1")
    dispatch.check_like("q", q, "k", k)
    dispatch.check_like("q", q, "v", v)
    sequences, heads, rows, width = shape
    if k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (sequences, heads, width):
        raise InputError(
            f"k: shape {[*k.shape]}, expected [{sequences}, {heads}, L, {width}] as q is {shape}"
        )
    if k.shape[2] < rows:
        raise InputError(f"k: {k.shape[2]} rows, expected at least the {rows} of q")
    if v.shape != k.shape:
        raise InputError(f"v: shape {[*v.shape]}, expected {[*k.shape]} as k")
    dispatch.check_like("q", q, "prefix_k", prefix_k)
    dispatch.check_like("q", q, "prefix_v", prefix_v)
    prefix_shape = [*prefix_k.shape]
    if prefix_k.ndim != 4 or prefix_k.shape[1] != heads or prefix_k.shape[3] != width:
        raise InputError(
            f"prefix_k: shape {prefix_shape}, expected [G, {heads}, P, {width}] as q is {shape}"
        )
    if prefix_v.shape != prefix_k.shape:
        raise InputError(
            f"prefix_v: shape {[*prefix_v.shape]}, expected {prefix_shape} as prefix_k"
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
            f"prefix_index: {prefix_index.dtype} {[*prefix_index.shape]}, expected torch.int64 "
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
    if mask.dtype != torch.bool or [*mask.shape] != expected:
        raise InputError(f"mask: {mask.dtype} {[*mask.shape]}, expected torch.bool {expected}")
    if mask.device != q.device:
        raise InputError(f"mask: on {mask.device}, expected {q.device} as q")
    if causal or blind:
        raise InputError(f"mask: given with causal={causal}, blind={blind}; expected one or other")


def _rows_first(x: Tensor) -> Tensor:
    """Room for an x [N, H, rows, d], in the memory order [N, rows, H, d] of the projections."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _outputs(q: Tensor, *_):
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _rows_first(q), q.new_empty(q.shape[:3], dtype=precision)


def _backward_outputs(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *rest
):
    *_, needs_own, needs_prefix = rest
    # In the first layer with prompts nothing below wants a gradient: no room is made for one.
    own = [_rows_first(each) if needs_own else q.new_empty(0) for each in (q, k, v)]
    prefix = [
        _rows_first(each) if needs_prefix else q.new_empty(0) for each in (prefix_k, prefix_v)
    ]
    return (*own, *prefix)


# -> output, and log-sum-exp of each row's scores [N, H, R] for backward
_forward = dispatch.define(
    "prefix_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? prefix_index,"
    " Tensor? mask, bool causal, SymInt blind, float scale, str impl) -> (Tensor, Tensor)",
    _outputs,
)

# -> gradients of q, k, v (empty unless needs_own), prefix_k and prefix_v (unless needs_prefix)
_backward = dispatch.define(
    "prefix_attention",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor out,"
    " Tensor lse, Tensor? prefix_index, Tensor? mask, bool causal, SymInt blind, float scale,"
    " bool needs_own, bool needs_prefix, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_outputs,
    backward=True,
)


class _PrefixAttention(torch.autograd.Function):
    """Softmax attention, formed again in backward from each row's log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, prefix_index, mask, causal, blind, scale, name):
        options = causal, blind, scale
        out, lse = _forward(q, k, v, prefix_k, prefix_v, prefix_index, mask, *options, name)
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, out, lse, prefix_index, mask)
        ctx.options, ctx.name = options, name
        return out

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, gradient: Tensor):
        needs = ctx.needs_input_grad[:5]
        needs_own, needs_prefix = any(needs[:3]), any(needs[3:])
        gradients = _backward(
            gradient, *ctx.saved_tensors, *ctx.options, needs_own, needs_prefix, ctx.name
        )
        wanted = (each if need else None for each, need in zip(gradients, needs, strict=True))
        return (*wanted, None, None, None, None, None, None)


def _wants_own_products(call: dispatch.CallFacts) -> bool:
    """bfloat16 on a CPU that multiplies it: torch's attention does not, unless there is AMX."""
    has = dispatch.cpu_has
    return call.dtype == torch.bfloat16 and has("avx512_bf16") and not has("amx_bf16")


_LIMITS = f"heads of width up to {KERNEL_WIDTH}"

dispatch.IMPLEMENTATIONS["prefix_attention"] = {
    REFERENCE: dispatch.eager(),
    "cpp": dispatch.cpp(),
    "triton": dispatch.triton("prefix_attention", _LIMITS),
    "cuda": dispatch.cuda(_LIMITS),
}
dispatch.RULES["prefix_attention"] = (
    Rule(
        "cpu",
        "cpp",
        "few keys a row: 1.3 to 8 times the reference (long rows 0.6): benchmarks/NOTES.md",
        lambda call: call.sparse,
    ),
    Rule(
        "cpu",
        "cpp",
        "bfloat16 by AVX512_BF16: 2 times the reference: benchmarks/NOTES.md",
        _wants_own_products,
    ),
    Rule("cuda", "triton", ESTIMATE),
)
