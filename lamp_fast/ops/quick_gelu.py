"""quick_gelu, the activation of OpenAI's CLIPs, and gelu, that of others."""

from collections.abc import Callable

import torch
from torch import Tensor

from lamp_fast.ops import dispatch, reference
from lamp_fast.ops.dispatch import ESTIMATE, REFERENCE, Rule


def quick_gelu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """x sigmoid(1.702 x), keeping only ``x`` for backward.

    Args:
        x: any shape, floating point.
        impl: "reference", "cpp" (bfloat16 on a CPU), "triton" or None.

    Returns:
        The shape and dtype of ``x``, differentiable.

    Raises:
        InputError: an integer ``x``, or an ``impl`` that cannot serve.

    *Numerics*: the reference is element-wise in the dtype of ``x``, as torch does; triton computes
    in float32 and rounds once; cpp reads float64's results from a table of all bfloat16.
    *Determinism*: always. Only the reference is differentiable twice.
    """
    return _activate("quick_gelu", x, impl, _ReferenceQuickGelu.apply)


def gelu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """x Phi(x) with the standard normal's distribution function (exact, by erf); otherwise as
    :func:`quick_gelu`."""
    return _activate("gelu", x, impl, reference.gelu)


def _activate(
    op: str, x: Tensor, impl: str | None, by_reference: Callable[[Tensor], Tensor]
) -> Tensor:
    dispatch.check_floating("x", x)
    name = dispatch.choose(op, impl, x)
    return by_reference(x) if name == REFERENCE else _Activation.apply(x, op, name)


def _bfloat16_alone(call: dispatch.CallFacts) -> str | None:
    return None if call.dtype == torch.bfloat16 else f"expected bfloat16, x is {call.dtype}"


_WHY = "bfloat16 from a table: 3 times the reference: benchmarks/NOTES.md"
_forward, _backward = {}, {}
for _op in ("quick_gelu", "gelu"):
    _forward[_op] = dispatch.define(
        _op, "(Tensor x, str impl) -> Tensor", lambda x: x.new_empty(x.shape)
    )
    # -> the gradient of x
    _backward[_op] = dispatch.define(
        _op,
        "(Tensor grad, Tensor x, str impl) -> Tensor",
        lambda grad, x: x.new_empty(x.shape),
        backward=True,
    )
    dispatch.IMPLEMENTATIONS[_op] = {
        REFERENCE: dispatch.eager(),
        "cpp": dispatch.cpp(_bfloat16_alone),
        "triton": dispatch.triton("quick_gelu"),
    }
    dispatch.RULES[_op] = (
        Rule("cpu", "cpp", _WHY, lambda call: call.dtype == torch.bfloat16),
        Rule("cuda", "triton", ESTIMATE),
    )


class _Activation(torch.autograd.Function):
    """quick_gelu or gelu of an implementation; keeps the pre-activation alone."""

    @staticmethod
    def forward(ctx, x: Tensor, op: str, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.op, ctx.name = op, name
        return _forward[op](x, name)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, gradient: Tensor):
        (x,) = ctx.saved_tensors
        return _backward[ctx.op](gradient, x, ctx.name), None, None


class _ReferenceQuickGelu(torch.autograd.Function):
    """d/dx x s = s (1 + 1.702 x (1 - s)) with s = sigmoid(1.702 x), formed again from x.

    Left to autograd the reference would keep two more tensors; gelu's own keeps x alone. In plain
    torch, so that autograd differentiates it again.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return reference.quick_gelu(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(1.702 * x)
        return gradient * (gate * (1 + 1.702 * x * (1 - gate)))
