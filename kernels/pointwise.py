"""quick_gelu and gelu, forward and backward: float32 inside, rounded once."""

import triton
import triton.language as tl
from torch import Tensor

# One vector of 16 bytes a thread and tensor for 16-bit elements, two for float32.
BLOCK = 1024
WARPS = 4


@triton.jit
def _normal(x):
    """The standard normal's distribution function, and x times its density."""
    distribution = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return distribution, x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def pointwise_fwd_kernel(x, y, size, QUICK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + at, mask=inside).to(tl.float32)
    if QUICK:
        gate = tl.sigmoid(1.702 * value)
    else:
        gate, _ = _normal(value)
    tl.store(y + at, (value * gate).to(y.dtype.element_ty), mask=inside)


@triton.jit
def pointwise_bwd_kernel(grad, x, grad_x, size, QUICK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + at, mask=inside).to(tl.float32)
    above = tl.load(grad + at, mask=inside).to(tl.float32)
    if QUICK:
        gate = tl.sigmoid(1.702 * value)
        slope = gate * (1 + 1.702 * value * (1 - gate))
    else:
        distribution, rest = _normal(value)
        slope = distribution + rest
    tl.store(grad_x + at, (above * slope).to(grad_x.dtype.element_ty), mask=inside)


def quick_gelu(x: Tensor, y: Tensor) -> None:
    """See :func:`lamp_fast.ops.quick_gelu`."""
    _launch(pointwise_fwd_kernel, x, y, quick=True)


def quick_gelu_backward(grad: Tensor, x: Tensor, grad_x: Tensor) -> None:
    """d/dx x s = s (1 + 1.702 x (1 - s)) with s = sigmoid(1.702 x)."""
    _launch(pointwise_bwd_kernel, grad, x, grad_x, quick=True)


def gelu(x: Tensor, y: Tensor) -> None:
    """See :func:`lamp_fast.ops.gelu`."""
    _launch(pointwise_fwd_kernel, x, y, quick=False)


def gelu_backward(grad: Tensor, x: Tensor, grad_x: Tensor) -> None:
    """d/dx x Phi(x) = Phi(x) + x phi(x)."""
    _launch(pointwise_bwd_kernel, grad, x, grad_x, quick=False)


def _launch(kernel, *tensors: Tensor, quick: bool) -> None:
    *inputs, output = tensors
    size = output.numel()
    if size == 0:
        return
    inputs = [each.contiguous() for each in inputs]
    grid = (triton.cdiv(size, BLOCK),)
    kernel[grid](*inputs, output, size, QUICK=quick, BLOCK=BLOCK, num_warps=WARPS)
