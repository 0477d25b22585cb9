"""The kernels of many short sequences that read one prefix: several of them share a tile.

With sequences a, b and c of 5 rows, packing = 3 and blocks of 16 rows and keys, a tile has two
products of scores, one with the prefix that all its rows read and one with its own keys::

             prefix rows       keys
                               a a a a a  b b b b b  c c c c c  .
        a    # # # # # # #     #
    q   a    # # # # # # #     # #
    u   a    # # # # # # #     # # #                               causal: a triangle a sequence;
    e   a    # # # # # # #     # # # #                             else a square
    r   a    # # # # # # #     # # # # #
    i   b    # # # # # # #                #
    e   ...                               ...
    s   c    # # # # # # #                           #
        ...                                          ...
        .                                                          row 16 of the tile: no sequence's

``#`` is what a row sees. All of both products is computed and the rest of it masked: on tensor
cores one product of 16 x 16 is quicker than three of 5 x 5, each of which is padded to as much.
"""

import triton
import triton.language as tl

from lamp_fast.kernels.prefix_attention.common import (
    UNSPECIALIZED,
    absorb,
    head_of,
    load_rows,
    slopes_of,
    store_rows,
    weigh,
)


@triton.jit
def _packed(tile, rows, share, packing, BLOCK: tl.constexpr):
    """Where the rows of a packed tile lie: sequence in the group, row in it, and whether at all."""
    at = tl.arange(0, BLOCK)
    local = at // rows
    sequence = tile * packing + local
    return sequence, at % rows, (local < packing) & (sequence < share)


@triton.jit
def _load_packed(rows, first, head, sequence, row, real, column, WIDTH: tl.constexpr):
    """[rows, columns] of one head; `sequence` counts from the `first` of the group."""
    at = sequence.to(tl.int64) * rows[1] + row.to(tl.int64) * rows[3]
    inside = real[:, None] & (column < WIDTH)[None, :]
    base = head_of(rows, first, head)
    return tl.load(base + at[:, None] + column[None, :], mask=inside, other=0)


@triton.jit
def _store_packed(rows, first, head, sequence, row, real, column, tile, WIDTH: tl.constexpr):
    at = sequence.to(tl.int64) * rows[1] + row.to(tl.int64) * rows[3]
    inside = real[:, None] & (column < WIDTH)[None, :]
    base = head_of(rows, first, head)
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
def _sees_prompts(row, real, prompt, rows, length, prefix_length, blind):
    """[R, P]: every row but the blind ones sees the whole prefix."""
    sees = (real & (row + (length - rows) >= blind))[:, None]
    return sees & (prompt < prefix_length)[None, :]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prefix_attention_short_fwd_kernel(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    out,
    lse,
    heads,
    rows,
    length,
    prefix_length,
    share,
    blind,
    scale,
    packing,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """As prefix_attention_fwd_kernel, for some sequences of one group a program."""
    tiles = tl.cdiv(share, packing)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    group = (tl.program_id(0) // tiles // heads).to(tl.int64)
    first = group * share
    sequence, row, real = _packed(tile, rows, share, packing, BLOCK_R)
    key_sequence, key, key_real = _packed(tile, length, share, packing, BLOCK_L)
    column = tl.arange(0, BLOCK_D)
    queries = _load_packed(q, first, head, sequence, row, real, column, WIDTH)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    attended = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, prefix_length, BLOCK_P):
        prompt = start + tl.arange(0, BLOCK_P)
        sees = _sees_prompts(row, real, prompt, rows, length, prefix_length, blind)
        keys = load_rows(prefix_k, group, head, prompt, prefix_length, column, WIDTH)
        values = load_rows(prefix_v, group, head, prompt, prefix_length, column, WIDTH)
        peak, total, attended = absorb(queries, keys, values, sees, scale, peak, total, attended)
    sees = _sees_packed(sequence, row, real, key_sequence, key, key_real, rows, length, CAUSAL)
    keys = _load_packed(k, first, head, key_sequence, key, key_real, column, WIDTH)
    values = _load_packed(v, first, head, key_sequence, key, key_real, column, WIDTH)
    # Zero times a value that is not finite would spoil the other sequences of the tile.
    finite = tl.abs(values.to(tl.float32)) < float("inf")
    spoilt = tl.max((finite == 0).to(tl.int32), axis=1)  # [L]
    values = tl.where(finite, values, 0.0).to(values.dtype)
    peak, total, attended = absorb(queries, keys, values, sees, scale, peak, total, attended)
    spoilt = tl.max(tl.where(sees, spoilt[None, :], 0), axis=1)  # [R]
    total = tl.where(total == 0, 1.0, total)
    attended = tl.where((spoilt > 0)[:, None], float("nan"), attended / total[:, None])
    _store_packed(out, first, head, sequence, row, real, column, attended, WIDTH)
    at = ((first + sequence) * heads + head) * rows + row
    tl.store(lse + at, (peak + tl.log2(total)) * 0.6931471805599453, mask=real)


@triton.jit(do_not_specialize=UNSPECIALIZED)
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
    heads,
    rows,
    length,
    prefix_length,
    share,
    blind,
    scale,
    chunks,
    tiles_a_chunk,
    packing,
    CAUSAL: tl.constexpr,
    NEEDS_OWN: tl.constexpr,
    NEEDS_PREFIX: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """All gradients in one pass over a chunk of a group's packed tiles.

    What lives through the loop: the prefix's keys and values and their two gradients, [P, d] each.
    A tile adds its queries, keys, values and gradients from above, [R, d] and [L, d], and two
    weights and two slopes, [R, P] and [R, L]; what it finds for its own rows it also stores.
    """
    chunk = tl.program_id(0) % chunks
    head = (tl.program_id(0) // chunks % heads).to(tl.int64)
    group = (tl.program_id(0) // chunks // heads).to(tl.int64)
    first = group * share
    column = tl.arange(0, BLOCK_D)
    prompt = tl.arange(0, BLOCK_P)
    log2_e: tl.constexpr = 1.4426950408889634
    # An output in float32 gives delta as grad * out; of a rounded one it would be too coarse, see
    # long.py, and delta takes the weights of all keys.
    ROUNDED: tl.constexpr = out[0].dtype.element_ty != tl.float32
    prompts = load_rows(
        prefix_k,
        group,
        head,
        prompt,
        prefix_length,
        column,
        WIDTH,
    )
    prompt_values = load_rows(
        prefix_v,
        group,
        head,
        prompt,
        prefix_length,
        column,
        WIDTH,
    )
    prompt_slope = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    prompt_value_slope = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    last = tl.minimum((chunk + 1) * tiles_a_chunk, tl.cdiv(share, packing))
    for tile in range(chunk * tiles_a_chunk, last):
        sequence, row, real = _packed(tile, rows, share, packing, BLOCK_R)
        queries = _load_packed(q, first, head, sequence, row, real, column, WIDTH)
        above = _load_packed(grad, first, head, sequence, row, real, column, WIDTH)
        at = ((first + sequence) * heads + head) * rows + row
        level = tl.load(lse + at, mask=real, other=0)[:, None] * log2_e
        if HAS_PREFIX:
            sees_prompts = _sees_prompts(row, real, prompt, rows, length, prefix_length, blind)
            prompt_weights, prompt_raised = weigh(
                queries, prompts, above, prompt_values, sees_prompts, level, scale * log2_e
            )
        if NEEDS_OWN or ROUNDED:
            key_sequence, key, key_real = _packed(tile, length, share, packing, BLOCK_L)
            keys = _load_packed(k, first, head, key_sequence, key, key_real, column, WIDTH)
            values = _load_packed(v, first, head, key_sequence, key, key_real, column, WIDTH)
            sees = _sees_packed(
                sequence, row, real, key_sequence, key, key_real, rows, length, CAUSAL
            )
            weights, raised = weigh(queries, keys, above, values, sees, level, scale * log2_e)
        if ROUNDED:
            total = tl.sum(weights, axis=1)
            change = tl.sum(weights * raised, axis=1)
            if HAS_PREFIX:
                total += tl.sum(prompt_weights, axis=1)
                change += tl.sum(prompt_weights * prompt_raised, axis=1)
            change = (change / tl.where(total == 0, 1.0, total))[:, None]
        else:
            attended = _load_packed(out, first, head, sequence, row, real, column, WIDTH)
            change = tl.sum(above * attended, axis=1)[:, None]
        slope = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        if HAS_PREFIX:
            slopes = slopes_of(prompt_weights, prompt_raised, sees_prompts, change)
            slopes = slopes.to(q[0].dtype.element_ty)
            if NEEDS_OWN:
                slope = tl.dot(slopes, prompts, slope, input_precision="ieee")
            if NEEDS_PREFIX:
                prompt_slope = tl.dot(
                    tl.trans(slopes), queries, prompt_slope, input_precision="ieee"
                )
                prompt_value_slope = tl.dot(
                    tl.trans(prompt_weights.to(q[0].dtype.element_ty)),
                    above,
                    prompt_value_slope,
                    input_precision="ieee",
                )
        if NEEDS_OWN:
            slopes = slopes_of(weights, raised, sees, change).to(q[0].dtype.element_ty)
            slope = tl.dot(slopes, keys, slope, input_precision="ieee") * scale
            _store_packed(grad_q, first, head, sequence, row, real, column, slope, WIDTH)
            slope = tl.dot(tl.trans(slopes), queries, input_precision="ieee") * scale
            _store_packed(grad_k, first, head, key_sequence, key, key_real, column, slope, WIDTH)
            weights = weights.to(q[0].dtype.element_ty)
            slope = tl.dot(tl.trans(weights), above, input_precision="ieee")
            _store_packed(grad_v, first, head, key_sequence, key, key_real, column, slope, WIDTH)
    if NEEDS_PREFIX:
        piece = ((group * heads + head) * chunks + chunk) * prefix_length * WIDTH
        base = partial_k + piece
        store_rows(base, WIDTH, prompt, prefix_length, column, prompt_slope * scale, WIDTH)
        base = partial_v + piece
        store_rows(base, WIDTH, prompt, prefix_length, column, prompt_value_slope, WIDTH)
