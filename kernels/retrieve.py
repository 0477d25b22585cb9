"""retrieve: norms, dot products, top-k and counts in one kernel; a kernel a side in backward.

Sums are float64 sums of products that are exact in float64, as everywhere (``ops.retrieve``), so
that all implementations choose alike.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """Block sizes and warps of a launch; ``elements`` bounds a tile of float64 in registers."""

    elements: int
    warps: int


# By the pool's padded size: a tile [M, elements / M] and the comparisons [M, M] stay in registers.
FORWARD = {64: Launch(4096, 4), 128: Launch(8192, 8), 256: Launch(8192, 16)}
BACKWARD = Launch(2048, 4)


@triton.jit
def retrieve_fwd_kernel(
    query,  # [B, D]
    keys,  # [M, D]
    bias,  # [M]
    indices,  # int64 [B, K]
    similarity,  # [B, K]
    counts,  # int64 [M], zeros
    query_stride,
    keys_stride,
    bias_stride,
    pool_size,
    width,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    exists = entry < pool_size
    dots = tl.zeros([BLOCK_M, BLOCK_D], tl.float64)
    key_squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float64)
    query_squares = tl.zeros([BLOCK_D], tl.float64)
    for start in tl.range(0, width, BLOCK_D, num_stages=3):
        inside = start + column < width
        one = tl.load(query + row * query_stride + start + column, mask=inside, other=0)
        pool = tl.load(
            keys + entry.to(tl.int64)[:, None] * keys_stride + (start + column)[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0,
        ).to(tl.float64)
        one = one.to(tl.float64)
        dots += pool * one[None, :]
        key_squares += pool * pool
        query_squares += one * one
    dot = tl.sum(dots, axis=1)  # [M]
    length = tl.sqrt(tl.sum(key_squares, axis=1)) * tl.sqrt(tl.sum(query_squares, axis=0))
    # The product with a zero row is zero already, or NaN if the other row is not finite.
    cosine = (dot / tl.where(length == 0, 1, length)).to(tl.float32)
    score = cosine + tl.load(bias + entry * bias_stride, mask=exists, other=0).to(tl.float32)

    unordered = tl.max(((score != score) & exists).to(tl.int32), axis=0) > 0
    mine, other = score[:, None], score[None, :]
    ahead = (other > mine) | ((other == mine) & (entry[None, :] < entry[:, None]))
    rank = tl.sum((ahead & exists[None, :]).to(tl.int32), axis=1)
    chosen = exists & (tl.where(unordered, entry, rank) < K)
    place = row * K + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    cosine = tl.where(unordered, float("nan"), cosine)
    tl.store(indices + place, entry.to(tl.int64), mask=chosen)
    tl.store(similarity + place, cosine, mask=chosen)
    once = tl.full([BLOCK_M], 1, tl.int64)
    tl.atomic_add(counts + entry, once, mask=chosen & (unordered == 0), sem="relaxed")


@triton.jit
def _inverse(square):
    """1 / norm, and 0 for a zero row."""
    return tl.where(square == 0, 0.0, 1.0 / tl.sqrt(tl.where(square == 0, 1.0, square)))


@triton.jit
def retrieve_bwd_query_kernel(
    query,  # [B, D]
    keys,  # [M, D]
    indices,  # [B, K]
    similarity,  # [B, K]
    grad,  # [B, K]
    grad_query,  # [B, D]
    inverse_norms,  # float64 [B], 1 / norm of every query, for the keys' kernel
    query_stride,
    keys_stride,
    width,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_D)
    real = choice < K
    entry = tl.load(indices + row * K + choice, mask=real, other=0)
    slope = tl.load(grad + row * K + choice, mask=real, other=0).to(tl.float64)
    cosine = tl.load(similarity + row * K + choice, mask=real, other=0).to(tl.float64)
    key_squares = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    query_squares = tl.zeros([BLOCK_D], tl.float64)
    for start in range(0, width, BLOCK_D):
        inside = start + column < width
        one = tl.load(query + row * query_stride + start + column, mask=inside, other=0)
        chosen = tl.load(
            keys + entry[:, None] * keys_stride + (start + column)[None, :],
            mask=real[:, None] & inside[None, :],
            other=0,
        ).to(tl.float64)
        one = one.to(tl.float64)
        key_squares += chosen * chosen
        query_squares += one * one
    inverse = _inverse(tl.sum(query_squares, axis=0))
    tl.store(inverse_norms + row, inverse)
    weight = slope * _inverse(tl.sum(key_squares, axis=1))  # [K]
    along = tl.sum(slope * cosine, axis=0) * inverse
    for start in range(0, width, BLOCK_D):
        inside = start + column < width
        one = tl.load(query + row * query_stride + start + column, mask=inside, other=0)
        chosen = tl.load(
            keys + entry[:, None] * keys_stride + (start + column)[None, :],
            mask=real[:, None] & inside[None, :],
            other=0,
        ).to(tl.float64)
        result = (tl.sum(weight[:, None] * chosen, axis=0) - along * one.to(tl.float64)) * inverse
        tl.store(grad_query + row * width + start + column, result.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def retrieve_bwd_keys_kernel(
    query,  # [B, D]
    keys,  # [M, D]
    indices,  # [B, K]
    similarity,  # [B, K]
    grad,  # [B, K]
    inverse_norms,  # float64 [B]
    grad_keys,  # [M, D]
    query_stride,
    keys_stride,
    batch,
    width,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    choice = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_D], tl.float64)
    along = tl.zeros([BLOCK_B], tl.float64)
    # One program walks through the whole batch, so that the order of the sum is always the same.
    for start in range(0, batch, BLOCK_B):
        row = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        real = (row < batch)[:, None] & (choice < K)[None, :]
        at = row[:, None] * K + choice[None, :]
        mine = tl.load(indices + at, mask=real, other=-1) == entry  # at most one a row
        slope = tl.load(grad + at, mask=mine, other=0).to(tl.float64)
        cosine = tl.load(similarity + at, mask=mine, other=0).to(tl.float64)
        along += tl.sum(slope * cosine, axis=1)
        chose = tl.max(mine.to(tl.int32), axis=1) > 0
        weight = tl.sum(slope, axis=1) * tl.load(inverse_norms + row, mask=chose, other=0)
        rows = tl.load(
            query + row[:, None] * query_stride + column[None, :],
            mask=chose[:, None] & inside[None, :],
            other=0,
        ).to(tl.float64)
        total += tl.sum(weight[:, None] * rows, axis=0)
    squares = tl.zeros([BLOCK_D], tl.float64)
    for start in range(0, width, BLOCK_D):
        other = start + tl.arange(0, BLOCK_D)
        part = tl.load(keys + entry * keys_stride + other, mask=other < width, other=0)
        squares += part.to(tl.float64) * part.to(tl.float64)
    inverse = _inverse(tl.sum(squares, axis=0))
    key = tl.load(keys + entry * keys_stride + column, mask=inside, other=0).to(tl.float64)
    result = (total - tl.sum(along, axis=0) * inverse * key) * inverse
    tl.store(grad_keys + entry * width + column, result.to(tl.float32), mask=inside)


def retrieve(
    query: Tensor,
    keys: Tensor,
    bias: Tensor,
    k: int,
    indices: Tensor,
    similarity: Tensor,
    counts: Tensor,
) -> None:
    """See :func:`lamp_fast.ops.retrieve`; float32."""
    counts.zero_()
    if query.shape[0] == 0:
        return
    query, keys = _contiguous_rows(query), _contiguous_rows(keys)
    pool_size, width = keys.shape
    block_m = max(16, triton.next_power_of_2(pool_size))
    launch = FORWARD[max(64, block_m)]
    retrieve_fwd_kernel[(query.shape[0],)](
        query,
        keys,
        bias,
        indices,
        similarity,
        counts,
        query.stride(0),
        keys.stride(0),
        bias.stride(0),
        pool_size,
        width,
        K=k,
        BLOCK_M=block_m,
        BLOCK_D=_columns(width, launch.elements // block_m),
        num_warps=launch.warps,
    )


def retrieve_backward(
    query: Tensor,
    keys: Tensor,
    indices: Tensor,
    similarity: Tensor,
    grad: Tensor,
    grad_query: Tensor,
    grad_keys: Tensor,
) -> None:
    """The closed form of ``lamp_fast.ops.retrieve``."""
    batch, k = indices.shape
    if batch == 0:
        grad_keys.zero_()
        return
    query, keys = _contiguous_rows(query), _contiguous_rows(keys)
    chosen = indices.contiguous(), similarity.contiguous(), grad.contiguous()
    pool_size, width = keys.shape
    inverse_norms = query.new_empty(batch, dtype=torch.float64)
    block_k = triton.next_power_of_2(k)
    blocks = {"K": k, "BLOCK_K": block_k, "num_warps": BACKWARD.warps}
    retrieve_bwd_query_kernel[(batch,)](
        query,
        keys,
        *chosen,
        grad_query,
        inverse_norms,
        query.stride(0),
        keys.stride(0),
        width,
        BLOCK_D=_columns(width, BACKWARD.elements // block_k),
        **blocks,
    )
    block_d = _columns(width, 64)
    retrieve_bwd_keys_kernel[(pool_size, triton.cdiv(width, block_d))](
        query,
        keys,
        *chosen,
        inverse_norms,
        grad_keys,
        query.stride(0),
        keys.stride(0),
        batch,
        width,
        BLOCK_B=BACKWARD.elements // 64,
        BLOCK_D=block_d,
        **blocks,
    )


def _columns(width: int, at_most: int) -> int:
    """A block of columns: a power of two, 16 to 256 and no wider than the rows need."""
    return max(16, min(256, at_most, triton.next_power_of_2(width)))


def _contiguous_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()
