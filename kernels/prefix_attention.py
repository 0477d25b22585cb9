"""prefix_attention, forward and backward, for long sequences and for many short ones.

A *long* launch gives a block of one sequence's rows to each program, which walks over the prefix
and then over the sequence's keys with an online softmax. A *short* launch packs several sequences
of one group into a tile whose mask is block-diagonal, so that tensor cores see full tiles, and its
backward is a single pass. Both write what they find for a shared prefix into float32 partial sums,
which one kernel adds in the order of the sequences: two runs give the same bits.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1 / math.log(2)
# By bytes an element. Sequences up to so many rows are packed, where a short backward can keep the
# prefix's two gradients, a tile [P, d] each, in registers beside its products.
SHORT_ROWS = {2: 32, 4: 16}
SHORT_PREFIX_TILE = {2: 4096, 4: 1024}
# Programs that keep a large GPU busy; beyond, a short backward's program takes several tiles.
PROGRAMS = 2048


@dataclass(frozen=True)
class Launch:
    """Tile sizes (query rows by keys), warps and pipeline stages of a launch."""

    rows: int
    keys: int
    warps: int
    stages: int


# By (bytes an element, padded head width up to); estimates, see benchmarks/NOTES.md.
FORWARD = {
    (2, 64): Launch(64, 64, 4, 3),
    (2, 128): Launch(64, 64, 4, 2),
    (4, 64): Launch(32, 32, 8, 2),
    (4, 128): Launch(16, 16, 8, 2),
}
BACKWARD_QUERY = {
    (2, 64): Launch(64, 64, 4, 2),
    (2, 128): Launch(64, 32, 4, 2),
    (4, 64): Launch(32, 32, 8, 1),
    (4, 128): Launch(16, 16, 8, 1),
}
BACKWARD_KEYS = {
    (2, 64): Launch(64, 64, 4, 2),
    (2, 128): Launch(32, 64, 4, 2),
    (4, 64): Launch(32, 32, 8, 1),
    (4, 128): Launch(16, 16, 8, 1),
}
# Packed tiles are as high as wide, or smaller where a group has few rows.
SHORT_FORWARD = {
    (2, 64): Launch(64, 64, 4, 1),
    (2, 128): Launch(32, 32, 4, 1),
    (4, 64): Launch(32, 32, 8, 1),
}
SHORT_BACKWARD = {
    (2, 64): Launch(32, 32, 4, 1),
    (2, 128): Launch(32, 32, 8, 1),
    (4, 64): Launch(16, 16, 8, 1),
}


@triton.jit
def _load(base, stride, row, count, column, WIDTH: tl.constexpr):
    """[rows, columns] of rows that lie `stride` apart; zeros beyond `count` rows and WIDTH."""
    inside = (row < count)[:, None]
    if column.shape[0] != WIDTH:
        inside = inside & (column < WIDTH)[None, :]
    return tl.load(
        base + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0
    )


@triton.jit
def _store(base, stride, row, count, column, tile, WIDTH: tl.constexpr):
    inside = (row < count)[:, None] & (column < WIDTH)[None, :]
    at = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _sees_prefix(row, column, mask, rows, length, prefix_length, blind, MASKED: tl.constexpr):
    """Which prefix rows each query row sees; `row` and `column` broadcast against each other."""
    inside = (row < rows) & (column < prefix_length)
    if MASKED:
        at = row.to(tl.int64) * (prefix_length + length) + column
        return tl.load(mask + at, mask=inside, other=0) != 0
    else:
        return inside & (row + (length - rows) >= blind)


@triton.jit
def _sees_sequence(
    row, column, mask, rows, length, prefix_length, CAUSAL: tl.constexpr, MASKED: tl.constexpr
):
    """Which rows of its sequence each query row sees; the query rows are the last ones."""
    inside = (row < rows) & (column < length)
    if MASKED:
        at = row.to(tl.int64) * (prefix_length + length) + prefix_length + column
        return tl.load(mask + at, mask=inside, other=0) != 0
    elif CAUSAL:
        return inside & (column <= row + (length - rows))
    else:
        return inside


@triton.jit
def _group(sequence, prefix_index, share):
    """Which prefix a sequence reads."""
    if prefix_index is None:
        return sequence // share
    else:
        return tl.load(prefix_index + sequence)


@triton.jit
def _any(sees):
    return tl.max(tl.max(sees.to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def _absorb(queries, keys, values, sees, scale, peak, total, attended):
    """Online softmax in powers of two: take more keys into peak, total [R] and attended [R, d]."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(sees, scores, float("-inf"))
    above = tl.maximum(peak, tl.max(scores, axis=1))
    # A row that saw nothing so far must not form -inf - -inf.
    shift = tl.where(above == float("-inf"), 0.0, above)
    weights = tl.exp2(scores - shift[:, None])
    kept = tl.exp2(peak - shift)
    total = total * kept + tl.sum(weights, axis=1)
    attended = tl.dot(
        weights.to(values.dtype), values, attended * kept[:, None], input_precision="ieee"
    )
    return above, total, attended


@triton.jit
def _slopes(rows_of, columns_of, grad_rows, grad_columns, sees, lse, delta, scale):
    """Weights, and gradients of the scores, from each row's log2-sum-exp2 and delta.

    (queries, keys, grad, values) give [R, L] with lse and delta [R, 1]; (keys, queries, values,
    grad) give the transposed with [1, R].
    """
    scores = tl.dot(rows_of, tl.trans(columns_of), input_precision="ieee") * scale
    weights = tl.where(sees, tl.exp2(scores - lse), 0.0)
    above = tl.dot(grad_rows, tl.trans(grad_columns), input_precision="ieee")
    return weights, tl.where(sees, weights * (above - delta), 0.0)


@triton.jit
def prefix_attention_fwd_kernel(
    q,  # [N, H, R, d]
    k,  # [N, H, L, d]
    v,  # [N, H, L, d]
    prefix_k,  # [G, H, P, d]
    prefix_v,  # [G, H, P, d]
    prefix_index,  # int64 [N] or None
    mask,  # bool [R, P + L] or None
    out,  # [N, H, R, d]
    lse,  # float32 [N, H, R]
    q_n,
    q_h,
    q_r,
    k_n,
    k_h,
    k_r,
    v_n,
    v_h,
    v_r,
    prefix_k_n,
    prefix_k_h,
    prefix_k_r,
    prefix_v_n,
    prefix_v_h,
    prefix_v_r,
    out_n,
    out_h,
    out_r,
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
    row_blocks = tl.cdiv(rows, BLOCK_R)
    first_row = tl.program_id(0) % row_blocks * BLOCK_R
    head = (tl.program_id(0) // row_blocks % heads).to(tl.int64)
    sequence = (tl.program_id(0) // row_blocks // heads).to(tl.int64)
    group = _group(sequence, prefix_index, share)
    row = first_row + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    queries = _load(q + sequence * q_n + head * q_h, q_r, row, rows, column, WIDTH)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    attended = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    k_base = prefix_k + group * prefix_k_n + head * prefix_k_h
    v_base = prefix_v + group * prefix_v_n + head * prefix_v_h
    for start in range(0, prefix_length, BLOCK_P):
        key = start + tl.arange(0, BLOCK_P)
        sees = _sees_prefix(
            row[:, None], key[None, :], mask, rows, length, prefix_length, blind, MASKED
        )
        keys = _load(k_base, prefix_k_r, key, prefix_length, column, WIDTH)
        values = _load(v_base, prefix_v_r, key, prefix_length, column, WIDTH)
        peak, total, attended = _absorb(queries, keys, values, sees, scale, peak, total, attended)
    k_base = k + sequence * k_n + head * k_h
    v_base = v + sequence * v_n + head * v_h
    end = length
    if CAUSAL:
        end = tl.minimum(length, first_row + BLOCK_R + length - rows)
    for start in range(0, end, BLOCK_L):
        key = start + tl.arange(0, BLOCK_L)
        sees = _sees_sequence(
            row[:, None], key[None, :], mask, rows, length, prefix_length, CAUSAL, MASKED
        )
        if MASKED:
            # A tree's branches do not see each other: most blocks hold nothing.
            if _any(sees):
                keys = _load(k_base, k_r, key, length, column, WIDTH)
                values = _load(v_base, v_r, key, length, column, WIDTH)
                peak, total, attended = _absorb(
                    queries, keys, values, sees, scale, peak, total, attended
                )
        else:
            keys = _load(k_base, k_r, key, length, column, WIDTH)
            values = _load(v_base, v_r, key, length, column, WIDTH)
            peak, total, attended = _absorb(
                queries, keys, values, sees, scale, peak, total, attended
            )
    total = tl.where(total == 0, 1.0, total)
    out_base = out + sequence * out_n + head * out_h
    _store(out_base, out_r, row, rows, column, attended / total[:, None], WIDTH)
    at = (sequence * heads + head) * rows + row
    tl.store(lse + at, (peak + tl.log2(total)) * 0.6931471805599453, mask=row < rows)


@triton.jit
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
    delta,  # float32 [N, H, R], sums of grad * out, for the keys' kernel
    partial_k,  # float32 [N, H, row blocks, P, d]
    partial_v,
    grad_n,
    grad_h,
    grad_r,
    q_n,
    q_h,
    q_r,
    k_n,
    k_h,
    k_r,
    v_n,
    v_h,
    v_r,
    prefix_k_n,
    prefix_k_h,
    prefix_k_r,
    prefix_v_n,
    prefix_v_h,
    prefix_v_r,
    out_n,
    out_h,
    out_r,
    grad_q_n,
    grad_q_h,
    grad_q_r,
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
    row_block = tl.program_id(0) % row_blocks
    first_row = row_block * BLOCK_R
    head = (tl.program_id(0) // row_blocks % heads).to(tl.int64)
    sequence = (tl.program_id(0) // row_blocks // heads).to(tl.int64)
    group = _group(sequence, prefix_index, share)
    row = first_row + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    at = (sequence * heads + head) * rows + row
    queries = _load(q + sequence * q_n + head * q_h, q_r, row, rows, column, WIDTH)
    above = _load(grad + sequence * grad_n + head * grad_h, grad_r, row, rows, column, WIDTH)
    attended = _load(out + sequence * out_n + head * out_h, out_r, row, rows, column, WIDTH)
    change = tl.sum(above.to(tl.float32) * attended.to(tl.float32), axis=1)
    log2_e: tl.constexpr = 1.4426950408889634
    level = tl.load(lse + at, mask=row < rows, other=0)[:, None] * log2_e
    slope = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    k_base = prefix_k + group * prefix_k_n + head * prefix_k_h
    v_base = prefix_v + group * prefix_v_n + head * prefix_v_h
    piece = ((sequence * heads + head) * row_blocks + row_block) * prefix_length * WIDTH
    for start in range(0, prefix_length, BLOCK_P):
        key = start + tl.arange(0, BLOCK_P)
        sees = _sees_prefix(
            row[:, None], key[None, :], mask, rows, length, prefix_length, blind, MASKED
        )
        keys = _load(k_base, prefix_k_r, key, prefix_length, column, WIDTH)
        values = _load(v_base, prefix_v_r, key, prefix_length, column, WIDTH)
        weights, slopes = _slopes(
            queries, keys, above, values, sees, level, change[:, None], scale * log2_e
        )
        weights, slopes = weights.to(q.dtype.element_ty), slopes.to(q.dtype.element_ty)
        if NEEDS_OWN:
            slope = tl.dot(slopes, keys, slope, input_precision="ieee")
        if NEEDS_PREFIX:
            tile = tl.dot(tl.trans(slopes), queries, input_precision="ieee") * scale
            _store(partial_k + piece, WIDTH, key, prefix_length, column, tile, WIDTH)
            tile = tl.dot(tl.trans(weights), above, input_precision="ieee")
            _store(partial_v + piece, WIDTH, key, prefix_length, column, tile, WIDTH)
    if NEEDS_OWN:
        tl.store(delta + at, change, mask=row < rows)
        k_base = k + sequence * k_n + head * k_h
        v_base = v + sequence * v_n + head * v_h
        end = length
        if CAUSAL:
            end = tl.minimum(length, first_row + BLOCK_R + length - rows)
        for start in range(0, end, BLOCK_L):
            key = start + tl.arange(0, BLOCK_L)
            sees = _sees_sequence(
                row[:, None], key[None, :], mask, rows, length, prefix_length, CAUSAL, MASKED
            )
            if MASKED:
                if _any(sees):
                    keys = _load(k_base, k_r, key, length, column, WIDTH)
                    values = _load(v_base, v_r, key, length, column, WIDTH)
                    _, slopes = _slopes(
                        queries, keys, above, values, sees, level, change[:, None], scale * log2_e
                    )
                    slope = tl.dot(slopes.to(keys.dtype), keys, slope, input_precision="ieee")
            else:
                keys = _load(k_base, k_r, key, length, column, WIDTH)
                values = _load(v_base, v_r, key, length, column, WIDTH)
                _, slopes = _slopes(
                    queries, keys, above, values, sees, level, change[:, None], scale * log2_e
                )
                slope = tl.dot(slopes.to(keys.dtype), keys, slope, input_precision="ieee")
        base = grad_q + sequence * grad_q_n + head * grad_q_h
        _store(base, grad_q_r, row, rows, column, slope * scale, WIDTH)


@triton.jit
def _absorb_rows(
    q,
    grad,
    lse,
    delta,
    q_r,
    grad_r,
    row,
    rows,
    column,
    keys,
    values,
    sees,
    scale,
    key_slope,
    value_slope,
    WIDTH: tl.constexpr,
):
    """What a block of query rows adds to the gradients [L, d] of keys and values."""
    log2_e: tl.constexpr = 1.4426950408889634
    queries = _load(q, q_r, row, rows, column, WIDTH)
    above = _load(grad, grad_r, row, rows, column, WIDTH)
    level = tl.load(lse + row, mask=row < rows, other=0)[None, :] * log2_e
    change = tl.load(delta + row, mask=row < rows, other=0)[None, :]
    weights, slopes = _slopes(keys, queries, values, above, sees, level, change, scale * log2_e)
    value_slope = tl.dot(weights.to(above.dtype), above, value_slope, input_precision="ieee")
    key_slope = tl.dot(slopes.to(queries.dtype), queries, key_slope, input_precision="ieee")
    return key_slope, value_slope


@triton.jit
def prefix_attention_bwd_keys_kernel(
    grad,  # [N, H, R, d]
    q,
    k,
    v,
    lse,  # float32 [N, H, R]
    delta,  # float32 [N, H, R]
    mask,
    grad_k,  # [N, H, L, d]
    grad_v,
    grad_n,
    grad_h,
    grad_r,
    q_n,
    q_h,
    q_r,
    k_n,
    k_h,
    k_r,
    v_n,
    v_h,
    v_r,
    grad_k_n,
    grad_k_h,
    grad_k_r,
    grad_v_n,
    grad_v_h,
    grad_v_r,
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
    """The gradients of k and v; tiles are transposed, [keys, query rows]."""
    MASKED: tl.constexpr = mask is not None
    key_blocks = tl.cdiv(length, BLOCK_L)
    first_key = tl.program_id(0) % key_blocks * BLOCK_L
    head = (tl.program_id(0) // key_blocks % heads).to(tl.int64)
    sequence = (tl.program_id(0) // key_blocks // heads).to(tl.int64)
    key = first_key + tl.arange(0, BLOCK_L)
    column = tl.arange(0, BLOCK_D)
    keys = _load(k + sequence * k_n + head * k_h, k_r, key, length, column, WIDTH)
    values = _load(v + sequence * v_n + head * v_h, v_r, key, length, column, WIDTH)
    q += sequence * q_n + head * q_h
    grad += sequence * grad_n + head * grad_h
    lse += (sequence * heads + head) * rows
    delta += (sequence * heads + head) * rows
    key_slope = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    value_slope = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    first = 0
    if CAUSAL:
        first = tl.maximum(first_key - (length - rows), 0) // BLOCK_R * BLOCK_R
    for start in range(first, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        sees = _sees_sequence(
            row[None, :], key[:, None], mask, rows, length, prefix_length, CAUSAL, MASKED
        )
        if MASKED:
            if _any(sees):
                key_slope, value_slope = _absorb_rows(
                    q, grad, lse, delta, q_r, grad_r, row, rows, column,
                    keys, values, sees, scale, key_slope, value_slope, WIDTH,
                )  # fmt: skip
        else:
            key_slope, value_slope = _absorb_rows(
                q, grad, lse, delta, q_r, grad_r, row, rows, column,
                keys, values, sees, scale, key_slope, value_slope, WIDTH,
            )  # fmt: skip
    base = grad_k + sequence * grad_k_n + head * grad_k_h
    _store(base, grad_k_r, key, length, column, key_slope * scale, WIDTH)
    base = grad_v + sequence * grad_v_n + head * grad_v_h
    _store(base, grad_v_r, key, length, column, value_slope, WIDTH)


@triton.jit
def _packed(tile, rows, share, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr):
    """Where the rows of a packed tile lie: sequence in the group, row in it, and whether at all."""
    at = tl.arange(0, BLOCK)
    local = at // rows
    sequence = tile * SEQUENCES + local
    return sequence, at % rows, (local < SEQUENCES) & (sequence < share)


@triton.jit
def _load_packed(base, stride_n, stride_r, sequence, row, real, column, WIDTH: tl.constexpr):
    at = sequence.to(tl.int64) * stride_n + row.to(tl.int64) * stride_r
    inside = real[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + at[:, None] + column[None, :], mask=inside, other=0)


@triton.jit
def _store_packed(base, stride_n, stride_r, sequence, row, real, column, tile, WIDTH: tl.constexpr):
    at = sequence.to(tl.int64) * stride_n + row.to(tl.int64) * stride_r
    inside = real[:, None] & (column < WIDTH)[None, :]
    tl.store(base + at[:, None] + column[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _sees_packed(
    sequence, row, real, key_sequence, key, key_real, rows, length, CAUSAL: tl.constexpr
):
    """[R, L]: a row sees its own sequence alone."""
    sees = (sequence[:, None] == key_sequence[None, :]) & real[:, None] & key_real[None, :]
    if CAUSAL:
        sees = sees & (key[None, :] <= row[:, None] + (length - rows))
    return sees


@triton.jit
def prefix_attention_short_fwd_kernel(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    out,
    lse,
    q_n,
    q_h,
    q_r,
    k_n,
    k_h,
    k_r,
    v_n,
    v_h,
    v_r,
    prefix_k_n,
    prefix_k_h,
    prefix_k_r,
    prefix_v_n,
    prefix_v_h,
    prefix_v_r,
    out_n,
    out_h,
    out_r,
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
    SEQUENCES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """As prefix_attention_fwd_kernel, for SEQUENCES sequences of one group a program."""
    tiles = tl.cdiv(share, SEQUENCES)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    group = (tl.program_id(0) // tiles // heads).to(tl.int64)
    first = group * share
    sequence, row, real = _packed(tile, rows, share, SEQUENCES, BLOCK_R)
    key_sequence, key, key_real = _packed(tile, length, share, SEQUENCES, BLOCK_L)
    column = tl.arange(0, BLOCK_D)
    queries = _load_packed(
        q + first * q_n + head * q_h, q_n, q_r, sequence, row, real, column, WIDTH
    )
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    attended = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    k_base = prefix_k + group * prefix_k_n + head * prefix_k_h
    v_base = prefix_v + group * prefix_v_n + head * prefix_v_h
    for start in range(0, prefix_length, BLOCK_P):
        prompt = start + tl.arange(0, BLOCK_P)
        sees = (real & (row + (length - rows) >= blind))[:, None]
        sees = sees & (prompt < prefix_length)[None, :]
        keys = _load(k_base, prefix_k_r, prompt, prefix_length, column, WIDTH)
        values = _load(v_base, prefix_v_r, prompt, prefix_length, column, WIDTH)
        peak, total, attended = _absorb(queries, keys, values, sees, scale, peak, total, attended)
    sees = _sees_packed(sequence, row, real, key_sequence, key, key_real, rows, length, CAUSAL)
    keys = _load_packed(
        k + first * k_n + head * k_h, k_n, k_r, key_sequence, key, key_real, column, WIDTH
    )
    values = _load_packed(
        v + first * v_n + head * v_h, v_n, v_r, key_sequence, key, key_real, column, WIDTH
    )
    # Zero times a value that is not finite would spoil the other sequences of the tile.
    finite = tl.abs(values.to(tl.float32)) < float("inf")
    spoilt = tl.max((finite == 0).to(tl.int32), axis=1)  # [L]
    values = tl.where(finite, values, 0.0).to(values.dtype)
    peak, total, attended = _absorb(queries, keys, values, sees, scale, peak, total, attended)
    spoilt = tl.max(tl.where(sees, spoilt[None, :], 0), axis=1)  # [R]
    total = tl.where(total == 0, 1.0, total)
    attended = tl.where((spoilt > 0)[:, None], float("nan"), attended / total[:, None])
    _store_packed(
        out + first * out_n + head * out_h,
        out_n,
        out_r,
        sequence,
        row,
        real,
        column,
        attended,
        WIDTH,
    )
    at = ((first + sequence) * heads + head) * rows + row
    tl.store(lse + at, (peak + tl.log2(total)) * 0.6931471805599453, mask=real)


@triton.jit
def prefix_attention_short_bwd_kernel(
    grad,
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    out,
    lse,
    grad_q,
    grad_k,
    grad_v,
    partial_k,  # float32 [G, H, chunks, P, d]
    partial_v,
    grad_n,
    grad_h,
    grad_r,
    q_n,
    q_h,
    q_r,
    k_n,
    k_h,
    k_r,
    v_n,
    v_h,
    v_r,
    prefix_k_n,
    prefix_k_h,
    prefix_k_r,
    prefix_v_n,
    prefix_v_h,
    prefix_v_r,
    out_n,
    out_h,
    out_r,
    grad_q_n,
    grad_q_h,
    grad_q_r,
    grad_k_n,
    grad_k_h,
    grad_k_r,
    grad_v_n,
    grad_v_h,
    grad_v_r,
    heads,
    rows,
    length,
    prefix_length,
    share,
    blind,
    scale,
    chunks,
    tiles_a_chunk,
    CAUSAL: tl.constexpr,
    NEEDS_OWN: tl.constexpr,
    NEEDS_PREFIX: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """All gradients in one pass over a chunk of a group's packed tiles."""
    chunk = tl.program_id(0) % chunks
    head = (tl.program_id(0) // chunks % heads).to(tl.int64)
    group = (tl.program_id(0) // chunks // heads).to(tl.int64)
    first = group * share
    column = tl.arange(0, BLOCK_D)
    prompt = tl.arange(0, BLOCK_P)
    log2_e: tl.constexpr = 1.4426950408889634
    prompts = _load(
        prefix_k + group * prefix_k_n + head * prefix_k_h,
        prefix_k_r,
        prompt,
        prefix_length,
        column,
        WIDTH,
    )
    prompt_values = _load(
        prefix_v + group * prefix_v_n + head * prefix_v_h,
        prefix_v_r,
        prompt,
        prefix_length,
        column,
        WIDTH,
    )
    q += first * q_n + head * q_h
    k += first * k_n + head * k_h
    v += first * v_n + head * v_h
    out += first * out_n + head * out_h
    grad += first * grad_n + head * grad_h
    prompt_slope = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    prompt_value_slope = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    last = tl.minimum((chunk + 1) * tiles_a_chunk, tl.cdiv(share, SEQUENCES))
    for tile in range(chunk * tiles_a_chunk, last):
        sequence, row, real = _packed(tile, rows, share, SEQUENCES, BLOCK_R)
        queries = _load_packed(q, q_n, q_r, sequence, row, real, column, WIDTH)
        above = _load_packed(grad, grad_n, grad_r, sequence, row, real, column, WIDTH)
        attended = _load_packed(out, out_n, out_r, sequence, row, real, column, WIDTH)
        change = tl.sum(above.to(tl.float32) * attended.to(tl.float32), axis=1)[:, None]
        at = ((first + sequence) * heads + head) * rows + row
        level = tl.load(lse + at, mask=real, other=0)[:, None] * log2_e
        slope = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        if HAS_PREFIX:
            sees = (real & (row + (length - rows) >= blind))[:, None]
            sees = sees & (prompt < prefix_length)[None, :]
            weights, slopes = _slopes(
                queries, prompts, above, prompt_values, sees, level, change, scale * log2_e
            )
            weights, slopes = weights.to(q.dtype.element_ty), slopes.to(q.dtype.element_ty)
            if NEEDS_OWN:
                slope = tl.dot(slopes, prompts, slope, input_precision="ieee")
            if NEEDS_PREFIX:
                prompt_slope = tl.dot(
                    tl.trans(slopes), queries, prompt_slope, input_precision="ieee"
                )
                prompt_value_slope = tl.dot(
                    tl.trans(weights), above, prompt_value_slope, input_precision="ieee"
                )
        if NEEDS_OWN:
            key_sequence, key, key_real = _packed(tile, length, share, SEQUENCES, BLOCK_L)
            keys = _load_packed(k, k_n, k_r, key_sequence, key, key_real, column, WIDTH)
            values = _load_packed(v, v_n, v_r, key_sequence, key, key_real, column, WIDTH)
            sees = _sees_packed(
                sequence, row, real, key_sequence, key, key_real, rows, length, CAUSAL
            )
            weights, slopes = _slopes(
                queries, keys, above, values, sees, level, change, scale * log2_e
            )
            weights, slopes = weights.to(q.dtype.element_ty), slopes.to(q.dtype.element_ty)
            slope = tl.dot(slopes, keys, slope, input_precision="ieee") * scale
            base = grad_q + first * grad_q_n + head * grad_q_h
            _store_packed(base, grad_q_n, grad_q_r, sequence, row, real, column, slope, WIDTH)
            slope = tl.dot(tl.trans(slopes), queries, input_precision="ieee") * scale
            base = grad_k + first * grad_k_n + head * grad_k_h
            _store_packed(
                base, grad_k_n, grad_k_r, key_sequence, key, key_real, column, slope, WIDTH
            )
            slope = tl.dot(tl.trans(weights), above, input_precision="ieee")
            base = grad_v + first * grad_v_n + head * grad_v_h
            _store_packed(
                base, grad_v_n, grad_v_r, key_sequence, key, key_real, column, slope, WIDTH
            )
    if NEEDS_PREFIX:
        piece = ((group * heads + head) * chunks + chunk) * prefix_length * WIDTH
        base = partial_k + piece
        _store(base, WIDTH, prompt, prefix_length, column, prompt_slope * scale, WIDTH)
        base = partial_v + piece
        _store(base, WIDTH, prompt, prefix_length, column, prompt_value_slope, WIDTH)


@triton.jit
def prefix_attention_sum_kernel(
    partial_k,  # float32 [N, H, pieces, P, d]
    partial_v,
    order,  # int64 [N], sequences by prefix, or None where they lie so
    ends,  # int64 [G], where each prefix's sequences end in `order`
    grad_prefix_k,  # [G, H, P, d]
    grad_prefix_v,
    grad_k_g,
    grad_k_h,
    grad_k_r,
    grad_v_g,
    grad_v_h,
    grad_v_r,
    heads,
    pieces,
    share,
    size,  # P * d
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add the partial sums of a prefix, in the order of its sequences."""
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
    at = grad_prefix_k + group * grad_k_g + head * grad_k_h + row * grad_k_r + column
    tl.store(at, total_k.to(grad_prefix_k.dtype.element_ty), mask=inside)
    at = grad_prefix_v + group * grad_v_g + head * grad_v_h + row * grad_v_r + column
    tl.store(at, total_v.to(grad_prefix_v.dtype.element_ty), mask=inside)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_index: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    blind: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """See :func:`lamp_fast.ops.prefix_attention`."""
    if q.numel() == 0:
        return
    tensors = [_adjacent(each) for each in (q, k, v, prefix_k, prefix_v)]
    mask = None if mask is None else mask.contiguous()
    sizes = _Sizes.of(*tensors, prefix_index, mask)
    arguments = [*_strides(*tensors, out), *sizes.numbers, blind, scale * LOG2_E]
    if sizes.packed:
        blocks, tiles = sizes.packed_blocks(SHORT_FORWARD[sizes.kind])
        prefix_attention_short_fwd_kernel[(sizes.groups * sizes.heads * tiles,)](
            *tensors, out, lse, *arguments, CAUSAL=causal, **blocks
        )
        return
    launch = FORWARD[sizes.kind]
    block_r = sizes.block(sizes.rows, launch.rows)
    grid = (sizes.sequences * sizes.heads * triton.cdiv(sizes.rows, block_r),)
    prefix_attention_fwd_kernel[grid](
        *tensors,
        prefix_index,
        mask,
        out,
        lse,
        *arguments,
        CAUSAL=causal,
        WIDTH=sizes.width,
        BLOCK_D=sizes.block_d,
        BLOCK_R=block_r,
        BLOCK_P=sizes.block(sizes.prefix_length, launch.keys),
        BLOCK_L=sizes.block(sizes.length, launch.keys),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def prefix_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    out: Tensor,
    lse: Tensor,
    prefix_index: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    blind: int,
    scale: float,
    needs_own: bool,
    needs_prefix: bool,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_prefix_k: Tensor,
    grad_prefix_v: Tensor,
) -> None:
    """The gradients that are needed; the tensors of the others are empty and stay so."""
    results = grad_q, grad_k, grad_v, grad_prefix_k, grad_prefix_v
    if q.numel() == 0:
        for each in results:
            each.zero_()
        return
    grad, q, k, v, prefix_k, prefix_v, out = map(
        _adjacent, (grad, q, k, v, prefix_k, prefix_v, out)
    )
    mask = None if mask is None else mask.contiguous()
    sizes = _Sizes.of(q, k, v, prefix_k, prefix_v, prefix_index, mask)
    needs_prefix = needs_prefix and sizes.prefix_length > 0
    run = _backward_short if sizes.packed else _backward_long
    run(
        sizes,
        (grad, q, k, v, prefix_k, prefix_v, out),
        lse,
        (prefix_index, mask),
        (causal, blind, scale),
        (needs_own, needs_prefix),
        results,
    )


def _backward_short(sizes, tensors, lse, _, options, needs, results) -> None:
    causal, blind, scale = options
    needs_own, needs_prefix = needs
    *own, grad_prefix_k, grad_prefix_v = results
    blocks, tiles = sizes.packed_blocks(SHORT_BACKWARD[sizes.kind])
    tiles_a_chunk = 1
    if needs_prefix:
        tiles_a_chunk = max(1, tiles * sizes.groups * sizes.heads // PROGRAMS)
    chunks = triton.cdiv(tiles, tiles_a_chunk)
    partial = _partial_sums(sizes, lse, sizes.groups, chunks) if needs_prefix else (None, None)
    strides = _strides(*own) if needs_own else [0] * 9
    prefix_attention_short_bwd_kernel[(sizes.groups * sizes.heads * chunks,)](
        *tensors,
        lse,
        *own,
        *partial,
        *_strides(*tensors),
        *strides,
        *sizes.numbers,
        blind,
        scale,
        chunks,
        tiles_a_chunk,
        CAUSAL=causal,
        NEEDS_OWN=needs_own,
        NEEDS_PREFIX=needs_prefix,
        HAS_PREFIX=sizes.prefix_length > 0,
        **blocks,
    )
    if needs_prefix:
        _add_partial_sums(sizes, partial, None, 1, (grad_prefix_k, grad_prefix_v))


def _backward_long(sizes, tensors, lse, routes, options, needs, results) -> None:
    grad, q, k, v, *_ = tensors
    prefix_index, mask = routes
    causal, blind, scale = options
    needs_own, needs_prefix = needs
    grad_q, grad_k, grad_v, grad_prefix_k, grad_prefix_v = results
    launch = BACKWARD_QUERY[sizes.kind]
    block_r = sizes.block(sizes.rows, launch.rows)
    row_blocks = triton.cdiv(sizes.rows, block_r)
    partial = (None, None)
    if needs_prefix:
        partial = _partial_sums(sizes, lse, sizes.sequences, row_blocks)
    delta = torch.empty_like(lse) if needs_own else None
    prefix_attention_bwd_query_kernel[(sizes.sequences * sizes.heads * row_blocks,)](
        *tensors,
        lse,
        prefix_index,
        mask,
        grad_q,
        delta,
        *partial,
        *_strides(*tensors),
        *(_strides(grad_q) if needs_own else [0] * 3),
        *sizes.numbers,
        blind,
        scale,
        CAUSAL=causal,
        NEEDS_OWN=needs_own,
        NEEDS_PREFIX=needs_prefix,
        WIDTH=sizes.width,
        BLOCK_D=sizes.block_d,
        BLOCK_R=block_r,
        BLOCK_P=sizes.block(sizes.prefix_length, launch.keys),
        BLOCK_L=sizes.block(sizes.length, launch.keys),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    if needs_own:
        launch = BACKWARD_KEYS[sizes.kind]
        block_l = sizes.block(sizes.length, launch.keys)
        grid = (sizes.sequences * sizes.heads * triton.cdiv(sizes.length, block_l),)
        prefix_attention_bwd_keys_kernel[grid](
            grad,
            q,
            k,
            v,
            lse,
            delta,
            mask,
            grad_k,
            grad_v,
            *_strides(grad, q, k, v, grad_k, grad_v),
            *sizes.numbers[:4],
            scale,
            CAUSAL=causal,
            WIDTH=sizes.width,
            BLOCK_D=sizes.block_d,
            BLOCK_R=sizes.block(sizes.rows, launch.rows),
            BLOCK_L=block_l,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    if needs_prefix:
        _add_partial_sums(sizes, partial, prefix_index, sizes.share, (grad_prefix_k, grad_prefix_v))


def _partial_sums(sizes, lse: Tensor, sequences: int, pieces: int) -> tuple[Tensor, Tensor]:
    shape = (sequences, sizes.heads, pieces, sizes.prefix_length, sizes.width)
    return lse.new_empty(shape), lse.new_empty(shape)


def _add_partial_sums(sizes, partial, prefix_index: Tensor | None, share: int, results) -> None:
    """From [N, H, pieces, P, d] to [G, H, P, d], where prefix g sums ``share`` sequences or those
    that ``prefix_index`` sends to it."""
    order = ends = None
    if prefix_index is not None:
        # On the device alone: no size is read back.
        order = prefix_index.argsort(stable=True)
        groups = torch.arange(sizes.groups, device=prefix_index.device)
        ends = torch.searchsorted(prefix_index[order], groups, right=True)
    size = sizes.prefix_length * sizes.width
    block_e = min(128, triton.next_power_of_2(size))
    prefix_attention_sum_kernel[(sizes.groups * sizes.heads * triton.cdiv(size, block_e),)](
        *partial,
        order,
        ends,
        *results,
        *_strides(*results),
        sizes.heads,
        partial[0].shape[2],
        share,
        size,
        WIDTH=sizes.width,
        BLOCK_T=16,
        BLOCK_E=block_e,
        num_warps=4,
    )


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a call, and which launch they lead to."""

    sequences: int
    groups: int
    heads: int
    rows: int
    length: int
    prefix_length: int
    width: int
    bytes_an_element: int
    packed: bool

    @staticmethod
    def of(q, k, v, prefix_k, prefix_v, prefix_index, mask) -> "_Sizes":
        sequences, heads, rows, width = q.shape
        groups, _, prefix_length, _ = prefix_k.shape
        size, tile = q.element_size(), _power(prefix_length) * _power(width)
        short = k.shape[2] <= SHORT_ROWS[size] and tile <= SHORT_PREFIX_TILE[size]
        return _Sizes(
            sequences,
            groups,
            heads,
            rows,
            k.shape[2],
            prefix_length,
            width,
            size,
            short and mask is None and prefix_index is None,
        )

    @property
    def numbers(self) -> tuple[int, ...]:
        """What every kernel takes, in its order."""
        return self.heads, self.rows, self.length, self.prefix_length, self.share

    @property
    def share(self) -> int:
        """Sequences of a prefix, where there is no index."""
        return self.sequences // self.groups

    @property
    def block_d(self) -> int:
        return _power(self.width)

    @property
    def kind(self) -> tuple[int, int]:
        """The key of the launch tables."""
        return self.bytes_an_element, max(64, self.block_d)

    def block(self, size: int, at_most: int) -> int:
        """A block along a dimension, no larger than it needs to be."""
        return min(at_most, _power(size))

    def packed_blocks(self, launch: Launch) -> tuple[dict[str, int], int]:
        """The launch of packed tiles, and how many of them a group has."""
        packing = max(1, min(self.share, launch.keys // self.length))
        blocks = {
            "WIDTH": self.width,
            "BLOCK_D": self.block_d,
            "SEQUENCES": packing,
            "BLOCK_R": _power(packing * self.rows),
            "BLOCK_P": _power(self.prefix_length),
            "BLOCK_L": _power(packing * self.length),
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }
        return blocks, triton.cdiv(self.share, packing)


def _power(size: int) -> int:
    """The next power of two that tensor cores take: at least 16."""
    return max(16, triton.next_power_of_2(size))


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for each in tensors for stride in each.stride()[:3]]


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
