"""Tile sizes, and the launches that a call leads to."""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lamp_fast.kernels.prefix_attention.long import (
    prefix_attention_bwd_keys_kernel,
    prefix_attention_bwd_query_kernel,
    prefix_attention_fwd_kernel,
)
from lamp_fast.kernels.prefix_attention.short import (
    prefix_attention_short_bwd_kernel,
    prefix_attention_short_fwd_kernel,
)
from lamp_fast.kernels.prefix_attention.sums import prefix_attention_sum_kernel

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
    tensors = _rows(*tensors, out)
    numbers = *sizes.numbers, blind, scale * LOG2_E
    if sizes.packed:
        blocks, tiles = sizes.packed_blocks(SHORT_FORWARD[sizes.kind])
        prefix_attention_short_fwd_kernel[(sizes.groups * sizes.heads * tiles,)](
            *tensors, lse, *numbers, CAUSAL=causal, **blocks
        )
        return
    launch = FORWARD[sizes.kind]
    block_r = sizes.block(sizes.rows, launch.rows)
    grid = (sizes.sequences * sizes.heads * triton.cdiv(sizes.rows, block_r),)
    prefix_attention_fwd_kernel[grid](
        *tensors,
        lse,
        prefix_index,
        mask,
        *numbers,
        CAUSAL=causal,
        BLOCK_R=block_r,
        BLOCK_P=sizes.block(sizes.prefix_length, launch.keys),
        BLOCK_L=sizes.block(sizes.length, launch.keys),
        **sizes.common(launch),
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
    prefix_attention_short_bwd_kernel[(sizes.groups * sizes.heads * chunks,)](
        *_rows(*tensors),
        lse,
        *_rows(*own),
        *partial,
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
        *_rows(*tensors),
        lse,
        prefix_index,
        mask,
        *_rows(grad_q),
        delta,
        *partial,
        *sizes.numbers,
        blind,
        scale,
        CAUSAL=causal,
        NEEDS_OWN=needs_own,
        NEEDS_PREFIX=needs_prefix,
        BLOCK_R=block_r,
        BLOCK_P=sizes.block(sizes.prefix_length, launch.keys),
        BLOCK_L=sizes.block(sizes.length, launch.keys),
        **sizes.common(launch),
    )
    if needs_own:
        launch = BACKWARD_KEYS[sizes.kind]
        block_l = sizes.block(sizes.length, launch.keys)
        grid = (sizes.sequences * sizes.heads * triton.cdiv(sizes.length, block_l),)
        prefix_attention_bwd_keys_kernel[grid](
            *_rows(grad, q, k, v, grad_k, grad_v),
            lse,
            delta,
            mask,
            *sizes.numbers[:4],
            scale,
            CAUSAL=causal,
            BLOCK_R=sizes.block(sizes.rows, launch.rows),
            BLOCK_L=block_l,
            **sizes.common(launch),
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
        *_rows(*results),
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

    def common(self, launch: Launch) -> dict[str, int]:
        """What every launch names."""
        return {
            "WIDTH": self.width,
            "BLOCK_D": self.block_d,
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }

    def block(self, size: int, at_most: int) -> int:
        """A block along a dimension, no larger than it needs to be."""
        return min(at_most, _power(size))

    def packed_blocks(self, launch: Launch) -> tuple[dict[str, int], int]:
        """The launch of packed tiles, and how many of them a group has."""
        packing = max(1, min(self.share, launch.keys // self.length))
        blocks = self.common(launch) | {
            "packing": packing,
            "BLOCK_R": _power(packing * self.rows),
            "BLOCK_P": _power(self.prefix_length),
            "BLOCK_L": _power(packing * self.length),
        }
        return blocks, triton.cdiv(self.share, packing)


def _power(size: int) -> int:
    """The next power of two that tensor cores take: at least 16."""
    return max(16, triton.next_power_of_2(size))


def _rows(*tensors: Tensor) -> list[tuple[Tensor, int, int, int]]:
    """Each with its strides of sequence, head and row; a gradient that is not wanted is an empty
    [0] and has none."""
    return [(x, *(x.stride()[:3] if x.ndim == 4 else (0, 0, 0))) for x in tensors]


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
