"""quick_gelu and gelu, forward and backward: float32 inside, rounded once.

A program takes a tile of BLOCK neighbouring elements, whatever the shape; nothing else is live.
"""

import triton
import triton.language as tl
from torch import Tensor

# One vector of 16 bytes a thread and tensor for 16-bit elements, two for float32.
BLOCK = 1024
WARPS = 4


@triton.jit
def _tile(size, BLOCK: tl.constexpr):
    """Where the program's elements lie, and which of them exist."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < size


@triton.jit
def quick_gelu_fwd_kernel(x, y, size, BLOCK: tl.constexpr):
    at, inside = _tile(size, BLOCK)
    value = tl.load(x + at, mask=inside).to(tl.float32)
    gate = tl.sigmoid(1.702 * value)
    tl.store(y + at, (value * gate).to(y.dtype.element_ty), mask=inside)


@triton.jit
def quick_gelu_bwd_kernel(grad, x, grad_x, size, BLOCK: tl.constexpr):
    at, inside = _tile(size, BLOCK)
    value = tl.load(x + at, mask=inside).to(tl.float32)
    above = tl.load(grad + at, mask=inside).to(tl.float32)
    gate = tl.sigmoid(1.702 * value)
    slope = gate * (1 + 1.702 * value * (1 - gate))
    tl.store(grad_x + at, (above * slope).to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def _distribution(x):
    """The standard normal's distribution function."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def gelu_fwd_kernel(x, y, size, BLOCK: tl.constexpr):
    at, inside = _tile(size, BLOCK)
    value = tl.load(x + at, mask=inside).to(tl.float32)
    tl.store(y + at, (value * _distribution(value)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gelu_bwd_kernel(grad, x, grad_x, size, BLOCK: tl.constexpr):
    at, inside = _tile(size, BLOCK)
    value = tl.load(x + at, mask=inside).to(tl.float32)
    above = tl.load(grad + at, mask=inside).to(tl.float32)
    slope = _distribution(value) + value * tl.exp(-0.5 * value * value) * 0.3989422804014327
    tl.store(grad_x + at, (above * slope).to(grad_x.dtype.element_ty), mask=inside)


def quick_gelu(x: Tensor, y: Tensor) -> None:
    """See :func:`lamp_fast.ops.quick_gelu`."""
    _launch(quick_gelu_fwd_kernel, x, y)


def quick_gelu_backward(grad: Tensor, x: Tensor, grad_x: Tensor) -> None:
    """d/dx x s = s (1 + 1.702 x (1 - s)) with s = sigmoid(1.702 x)."""
    _launch(quick_gelu_bwd_kernel, grad, x, grad_x)


def gelu(x: Tensor, y: Tensor) -> None:
    """See :func:`lamp_fast.ops.gelu`."""
    _launch(gelu_fwd_kernel, x, y)


def gelu_backward(grad: Tensor, x: Tensor, grad_x: Tensor) -> None:
    """d/dx x Phi(x) = Phi(x) + x phi(x)."""
    _launch(gelu_bwd_kernel, grad, x, grad_x)


def _launch(kernel, *tensors: Tensor) -> None:
    *inputs, output = tensors
    size = output.numel()
    if size == 0:
        return
    inputs = [each.contiguous() for each in inputs]
    grid = (triton.cdiv(size, BLOCK),)
    kernel[grid](*inputs, output, size, BLOCK=BLOCK, num_warps=WARPS)
