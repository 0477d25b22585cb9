"""add_layer_norm: residual add and LayerNorm in one pass over memory, and so its backward."""

import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile, so that a thread has several loads under way; more rows where rows are short.
TILE = 4096


@triton.jit(do_not_specialize=["rows"])
def add_layer_norm_fwd_kernel(
    x,  # [rows, D]
    update,  # [rows, D]
    weight,  # [D]
    bias,  # [D]
    total,  # [rows, D]
    normed,  # [rows, D]
    mean,  # float32 [rows]
    rstd,  # float32 [rows]
    x_stride,
    update_stride,
    rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    real = row < rows
    inside = real[:, None] & (column < WIDTH)[None, :]
    own = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0)
    added = tl.load(update + row[:, None] * update_stride + column[None, :], mask=inside, other=0)
    # Rounded before the statistics: they are those of the sum that is returned.
    both = (own.to(tl.float32) + added.to(tl.float32)).to(total.dtype.element_ty)
    at = row[:, None] * WIDTH + column[None, :]
    tl.store(total + at, both, mask=inside)
    both = both.to(tl.float32)
    average = tl.sum(both, axis=1) / WIDTH
    centred = tl.where(inside, both - average[:, None], 0)
    variance = tl.sum(centred * centred, axis=1) / WIDTH
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    tl.store(mean + row, average, mask=real)
    tl.store(rstd + row, inverse, mask=real)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < WIDTH, other=0).to(tl.float32)
    result = centred * inverse[:, None] * factor[None, :] + shift[None, :]
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def add_layer_norm_bwd_kernel(
    grad_normed,  # [rows, D]
    grad_sum,  # [rows, D] or None
    total,  # [rows, D]
    weight,  # [D]
    mean,  # float32 [rows]
    rstd,  # float32 [rows]
    grad,  # [rows, D]
    grad_normed_stride,
    grad_sum_stride,
    total_stride,
    rows,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    real = row < rows
    inside = real[:, None] & (column < WIDTH)[None, :]
    above = tl.load(
        grad_normed + row[:, None] * grad_normed_stride + column[None, :], mask=inside, other=0
    ).to(tl.float32)
    both = tl.load(total + row[:, None] * total_stride + column[None, :], mask=inside, other=0)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0).to(tl.float32)
    inverse = tl.load(rstd + row, mask=real, other=0)[:, None]
    average = tl.load(mean + row, mask=real, other=0)[:, None]
    above = above * factor[None, :]
    unit = tl.where(inside, (both.to(tl.float32) - average) * inverse, 0)
    along = tl.sum(above * unit, axis=1) / WIDTH
    level = tl.sum(above, axis=1) / WIDTH
    result = (above - unit * along[:, None] - level[:, None]) * inverse
    if grad_sum is not None:
        result += tl.load(
            grad_sum + row[:, None] * grad_sum_stride + column[None, :], mask=inside, other=0
        ).to(tl.float32)
    at = row[:, None] * WIDTH + column[None, :]
    tl.store(grad + at, result.to(grad.dtype.element_ty), mask=inside)


def add_layer_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    total: Tensor,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """See :func:`lamp_fast.ops.add_layer_norm`."""
    if x.numel() == 0:
        return
    x, update = _rows(x), _rows(update)
    grid, blocks = _grid(*x.shape)
    add_layer_norm_fwd_kernel[grid](
        x,
        update,
        weight.contiguous(),
        bias.contiguous(),
        total,
        normed,
        mean,
        rstd,
        x.stride(0),
        update.stride(0),
        x.shape[0],
        eps,
        **blocks,
    )


def add_layer_norm_backward(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad: Tensor,
) -> None:
    """With g = grad_normed weight, unit rows u: (g - u mean(g u) - mean(g)) rstd + grad_sum."""
    if total.numel() == 0:
        return
    grad_normed, total = _rows(grad_normed), _rows(total)
    grad_sum = None if grad_sum is None else _rows(grad_sum)
    grid, blocks = _grid(*total.shape)
    add_layer_norm_bwd_kernel[grid](
        grad_normed,
        grad_sum,
        total,
        weight.contiguous(),
        mean.contiguous(),
        rstd.contiguous(),
        grad,
        grad_normed.stride(0),
        0 if grad_sum is None else grad_sum.stride(0),
        total.stride(0),
        total.shape[0],
        **blocks,
    )


def _grid(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    block_d = max(16, triton.next_power_of_2(width))
    block_r = max(1, min(TILE // block_d, 16))
    warps = min(16, max(4, block_d // 1024))
    blocks = {"WIDTH": width, "BLOCK_R": block_r, "BLOCK_D": block_d, "num_warps": warps}
    return (triton.cdiv(rows, block_r),), blocks


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [rows, D] with adjacent columns, a view where there is one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
