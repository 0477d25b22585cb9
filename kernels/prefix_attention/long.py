"""The kernels of long sequences: a program has a block of one sequence's rows, or of its keys."""

import triton
import triton.language as tl

from lamp_fast.kernels.prefix_attention.common import (
    UNSPECIALIZED,
    absorb,
    head_of,
    load_rows,
    sees_prefix,
    sees_sequence,
    slopes_of,
    store_rows,
    weigh,
)


@triton.jit
def _place(blocks, heads):
    """The program's block of rows, its head and its sequence; blocks are innermost."""
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    return block, head, (tl.program_id(0) // blocks // heads).to(tl.int64)


@triton.jit
def _group(sequence, prefix_index, share):
    """Which prefix a sequence reads."""
    if prefix_index is None:
        return sequence // share
    else:
        return tl.load(prefix_index + sequence)


@triton.jit
def _any(sees):
    """Whether a tile [R, L] holds anything: a tree's branches do not see each other, so that under
    a mask most tiles hold nothing and are passed over."""
    return tl.max(tl.max(sees.to(tl.int32), axis=1), axis=0) > 0


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prefix_attention_fwd_kernel(
    q,  # [N, H, R, d]
    k,  # [N, H, L, d]
    v,  # [N, H, L, d]
    prefix_k,  # [G, H, P, d]
    prefix_v,  # [G, H, P, d]
    out,  # [N, H, R, d]
    lse,  # float32 [N, H, R]
    prefix_index,  # int64 [N] or None
    mask,  # bool [R, P + L] or None
    heads,
    rows,
    length,
    prefix_length,
    share,
    blind,
    scale,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    MASKED: tl.constexpr = mask is not None
    row_block, head, sequence = _place(tl.cdiv(rows, BLOCK_R), heads)
    first_row = row_block * BLOCK_R
    group = _group(sequence, prefix_index, share)
    row = first_row + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    queries = load_rows(q, sequence, head, row, rows, column, WIDTH)
    # What lives through both walks: the queries, and a row's largest score, its sum of weights and
    # its weighted values so far.
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    attended = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, prefix_length, BLOCK_P):
        key = start + tl.arange(0, BLOCK_P)
        sees = sees_prefix(
            row[:, None], key[None, :], mask, rows, length, prefix_length, blind, MASKED
        )
        keys = load_rows(prefix_k, group, head, key, prefix_length, column, WIDTH)
        values = load_rows(prefix_v, group, head, key, prefix_length, column, WIDTH)
        peak, total, attended = absorb(queries, keys, values, sees, scale, peak, total, attended)
    end = length
    if CAUSAL:
        end = tl.minimum(length, first_row + BLOCK_R + length - rows)
    for start in range(0, end, BLOCK_L):
        key = start + tl.arange(0, BLOCK_L)
        sees = sees_sequence(
            row[:, None], key[None, :], mask, rows, length, prefix_length, CAUSAL, MASKED
        )
        if not MASKED or _any(sees):
            keys = load_rows(k, sequence, head, key, length, column, WIDTH)
            values = load_rows(v, sequence, head, key, length, column, WIDTH)
            peak, total, attended = absorb(
                queries, keys, values, sees, scale, peak, total, attended
            )
    total = tl.where(total == 0, 1.0, total)
    out_base = head_of(out, sequence, head)
    store_rows(out_base, out[3], row, rows, column, attended / total[:, None], WIDTH)
    at = (sequence * heads + head) * rows + row
    tl.store(lse + at, (peak + tl.log2(total)) * 0.6931471805599453, mask=row < rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prefix_attention_bwd_query_kernel(
    grad,  # [N, H, R, d]
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    out,  # [N, H, R, d]
    lse,  # float32 [N, H, R]
    prefix_index,
    mask,
    grad_q,  # [N, H, R, d]
    delta,  # float32 [N, H, R], for the keys' kernel
    partial_k,  # float32 [N, H, row blocks, P, d]
    partial_v,
    heads,
    rows,
    length,
    prefix_length,
    share,
    blind,
    scale,
    CAUSAL: tl.constexpr,
    NEEDS_OWN: tl.constexpr,
    NEEDS_PREFIX: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The gradient of q, and what a block of rows adds to those of the prefix."""
    MASKED: tl.constexpr = mask is not None
    row_blocks = tl.cdiv(rows, BLOCK_R)
    row_block, head, sequence = _place(row_blocks, heads)
    first_row = row_block * BLOCK_R
    group = _group(sequence, prefix_index, share)
    row = first_row + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    at = (sequence * heads + head) * rows + row
    queries = load_rows(q, sequence, head, row, rows, column, WIDTH)
    above = load_rows(grad, sequence, head, row, rows, column, WIDTH)
    log2_e: tl.constexpr = 1.4426950408889634
    level = tl.load(lse + at, mask=row < rows, other=0)[:, None] * log2_e
    end = length
    if CAUSAL:
        end = tl.minimum(length, first_row + BLOCK_R + length - rows)
    # delta = sum p dp over a row's keys. It equals the sum of grad * out; but an output that was
    # rounded to half precision is off by more than all slopes of a row whose softmax is saturated.
    # Then a first walk over all keys forms it, and divides by the sum of p, which takes out what
    # lse was rounded by.
    WALKS: tl.constexpr = 1 if out[0].dtype.element_ty == tl.float32 else 2
    total = tl.zeros([BLOCK_R], tl.float32)
    change = tl.zeros([BLOCK_R], tl.float32)
    if WALKS == 1:
        attended = load_rows(out, sequence, head, row, rows, column, WIDTH)
        change = tl.sum(above * attended, axis=1)
    # What lives through the last walk: queries, their gradient from above and the one that grows,
    # [R, d] each, and the rows' level and change. A prefix tile's own gradients, [P, d] each, are
    # whole after one step and leave as partial sums.
    slope = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    piece = ((sequence * heads + head) * row_blocks + row_block) * prefix_length * WIDTH
    for walk in tl.static_range(WALKS):
        for start in range(0, prefix_length, BLOCK_P):
            key = start + tl.arange(0, BLOCK_P)
            sees = sees_prefix(
                row[:, None], key[None, :], mask, rows, length, prefix_length, blind, MASKED
            )
            keys = load_rows(prefix_k, group, head, key, prefix_length, column, WIDTH)
            values = load_rows(prefix_v, group, head, key, prefix_length, column, WIDTH)
            weights, raised = weigh(queries, keys, above, values, sees, level, scale * log2_e)
            if walk < WALKS - 1:
                total += tl.sum(weights, axis=1)
                change += tl.sum(weights * raised, axis=1)
            else:
                slopes = slopes_of(weights, raised, sees, change[:, None]).to(q[0].dtype.element_ty)
                if NEEDS_OWN:
                    slope = tl.dot(slopes, keys, slope, input_precision="ieee")
                if NEEDS_PREFIX:
                    weights = weights.to(q[0].dtype.element_ty)
                    tile = tl.dot(tl.trans(slopes), queries, input_precision="ieee") * scale
                    store_rows(partial_k + piece, WIDTH, key, prefix_length, column, tile, WIDTH)
                    tile = tl.dot(tl.trans(weights), above, input_precision="ieee")
                    store_rows(partial_v + piece, WIDTH, key, prefix_length, column, tile, WIDTH)
        if NEEDS_OWN or walk < WALKS - 1:
            for start in range(0, end, BLOCK_L):
                key = start + tl.arange(0, BLOCK_L)
                sees = sees_sequence(
                    row[:, None], key[None, :], mask, rows, length, prefix_length, CAUSAL, MASKED
                )
                if not MASKED or _any(sees):
                    keys = load_rows(k, sequence, head, key, length, column, WIDTH)
                    values = load_rows(v, sequence, head, key, length, column, WIDTH)
                    weights, raised = weigh(
                        queries, keys, above, values, sees, level, scale * log2_e
                    )
                    if walk < WALKS - 1:
                        total += tl.sum(weights, axis=1)
                        change += tl.sum(weights * raised, axis=1)
                    else:
                        slopes = slopes_of(weights, raised, sees, change[:, None])
                        slope = tl.dot(slopes.to(keys.dtype), keys, slope, input_precision="ieee")
        if walk < WALKS - 1:
            change = change / tl.where(total == 0, 1.0, total)
    if NEEDS_OWN:
        tl.store(delta + at, change, mask=row < rows)
        base = head_of(grad_q, sequence, head)
        store_rows(base, grad_q[3], row, rows, column, slope * scale, WIDTH)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prefix_attention_bwd_keys_kernel(
    grad,  # [N, H, R, d]
    q,
    k,
    v,
    grad_k,  # [N, H, L, d]
    grad_v,
    lse,  # float32 [N, H, R]
    delta,  # float32 [N, H, R]
    mask,
    heads,
    rows,
    length,
    prefix_length,
    scale,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The gradients of k and v; tiles are transposed, [keys, query rows].

    What lives through the walk over query rows: keys, values and their two gradients, [L, d] each.
    """
    MASKED: tl.constexpr = mask is not None
    log2_e: tl.constexpr = 1.4426950408889634
    key_block, head, sequence = _place(tl.cdiv(length, BLOCK_L), heads)
    first_key = key_block * BLOCK_L
    key = first_key + tl.arange(0, BLOCK_L)
    column = tl.arange(0, BLOCK_D)
    keys = load_rows(k, sequence, head, key, length, column, WIDTH)
    values = load_rows(v, sequence, head, key, length, column, WIDTH)
    lse += (sequence * heads + head) * rows
    delta += (sequence * heads + head) * rows
    key_slope = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    value_slope = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    first = 0
    if CAUSAL:
        first = tl.maximum(first_key - (length - rows), 0) // BLOCK_R * BLOCK_R
    for start in range(first, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        sees = sees_sequence(
            row[None, :], key[:, None], mask, rows, length, prefix_length, CAUSAL, MASKED
        )
        if not MASKED or _any(sees):
            queries = load_rows(q, sequence, head, row, rows, column, WIDTH)
            above = load_rows(grad, sequence, head, row, rows, column, WIDTH)
            level = tl.load(lse + row, mask=row < rows, other=0)[None, :] * log2_e
            change = tl.load(delta + row, mask=row < rows, other=0)[None, :]
            weights, raised = weigh(keys, queries, values, above, sees, level, scale * log2_e)
            slopes = slopes_of(weights, raised, sees, change).to(queries.dtype)
            weights = weights.to(above.dtype)
            value_slope = tl.dot(weights, above, value_slope, input_precision="ieee")
            key_slope = tl.dot(slopes, queries, key_slope, input_precision="ieee")
    base = head_of(grad_k, sequence, head)
    store_rows(base, grad_k[3], key, length, column, key_slope * scale, WIDTH)
    base = head_of(grad_v, sequence, head)
    store_rows(base, grad_v[3], key, length, column, value_slope, WIDTH)
