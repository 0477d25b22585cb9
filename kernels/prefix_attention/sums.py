"""The sum over the sequences that share a prefix, in their order."""

import triton
import triton.language as tl

from lamp_fast.kernels.prefix_attention.common import UNSPECIALIZED, head_of


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prefix_attention_sum_kernel(
    partial_k,  # float32 [N, H, pieces, P, d]
    partial_v,
    order,  # int64 [N], sequences by prefix, or None where they lie so
    ends,  # int64 [G], where each prefix's sequences end in `order`
    grad_prefix_k,  # [G, H, P, d]
    grad_prefix_v,
    heads,
    pieces,
    share,
    size,  # P * d
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add the partial sums of a prefix, in the order of its sequences.

    A program has BLOCK_E elements of one prefix and head, in their own two sums [E]; a step of its
    loop reads BLOCK_T terms of each, [T, E].
    """
    blocks = tl.cdiv(size, BLOCK_E)
    element = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    group = (tl.program_id(0) // blocks // heads).to(tl.int64)
    inside = element < size
    if order is None:
        first = group * share
        last = first + share
    else:
        first = tl.load(ends + group - 1, mask=group > 0, other=0)
        last = tl.load(ends + group)
    total_k = tl.zeros([BLOCK_E], tl.float32)
    total_v = tl.zeros([BLOCK_E], tl.float32)
    for start in range(first * pieces, last * pieces, BLOCK_T):
        term = start + tl.arange(0, BLOCK_T).to(tl.int64)
        real = term < last * pieces
        sequence = term // pieces
        if order is not None:
            sequence = tl.load(order + sequence, mask=real, other=0)
        at = ((sequence * heads + head) * pieces + term % pieces) * size
        at = at[:, None] + element[None, :]
        both = real[:, None] & inside[None, :]
        total_k += tl.sum(tl.load(partial_k + at, mask=both, other=0), axis=0)
        total_v += tl.sum(tl.load(partial_v + at, mask=both, other=0), axis=0)
    row, column = (element // WIDTH).to(tl.int64), element % WIDTH
    at = head_of(grad_prefix_k, group, head) + row * grad_prefix_k[3] + column
    tl.store(at, total_k.to(grad_prefix_k[0].dtype.element_ty), mask=inside)
    at = head_of(grad_prefix_v, group, head) + row * grad_prefix_v[3] + column
    tl.store(at, total_v.to(grad_prefix_v[0].dtype.element_ty), mask=inside)
