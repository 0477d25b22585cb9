"""add_layer_norm: a residual sum and the frozen LayerNorm that follows it."""

import torch
from torch import Tensor

from lamp_fast.errors import InputError
from lamp_fast.ops import dispatch, reference
from lamp_fast.ops.dispatch import ESTIMATE, REFERENCE, Rule


def add_layer_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise it with a frozen LayerNorm.

    Args:
        x, update: [..., D], alike in shape, dtype and device, floating point.
        weight, bias: [D] in the dtype of ``x``, without gradient.
        eps: added to the variance.
        impl: "reference", "triton" or None.

    Returns:
        x + update, and its rows normalised, scaled by ``weight`` and shifted by ``bias``; both
        [..., D] in the dtype of ``x``, differentiable in x and update.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, a weight that wants a gradient, or an
            ``impl`` that cannot serve.

    *Numerics*: the sum is rounded to the dtype of ``x`` first, so that it is the one that is
    returned; mean and variance are float32 (float64 for float64). *Determinism*: always. Only the
    reference is differentiable twice.
    """
    _check(x, update, weight, bias)
    name = dispatch.choose("add_layer_norm", impl, x)
    if name == REFERENCE:
        return reference.add_layer_norm(x, update, weight, bias, eps)
    if dispatch.differentiates(x, update):
        return _AddLayerNorm.apply(x, update, weight, bias, eps, name)
    return _forward(x, update, weight, bias, eps, name)[:2]


def _check(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> None:
    for name, tensor in (("update", update), ("weight", weight), ("bias", bias)):
        dispatch.check_like("x", x, name, tensor)
    shape = [*x.shape]
    if x.ndim == 0 or shape[-1] == 0:
        raise InputError(f"x: shape {shape}, expected [..., D] with D >= 1")
    if update.shape != x.shape:
        raise InputError(f"update: shape {[*update.shape]}, expected {shape} as x")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[-1:]:
            raise InputError(f"{name}: shape {[*tensor.shape]}, expected {shape[-1:]}, x's last")
        if tensor.requires_grad:
            raise InputError(f"{name}: requires a gradient, expected a frozen LayerNorm")


def _outputs(x: Tensor, *_):
    statistics = [x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2)]
    return x.new_empty(x.shape), x.new_empty(x.shape), *statistics


# -> sum, its normalised rows, and their float32 means and inverse standard deviations
_forward = dispatch.define(
    "add_layer_norm",
    "(Tensor x, Tensor update, Tensor weight, Tensor bias, float eps, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _outputs,
)

# -> the gradient of x and update, which are the same
_backward = dispatch.define(
    "add_layer_norm",
    "(Tensor grad_normed, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd,"
    " str impl) -> Tensor",
    lambda grad_normed, grad_sum, total, *_: total.new_empty(total.shape),
    backward=True,
)


class _AddLayerNorm(torch.autograd.Function):
    """LayerNorm of a sum; both summands share one gradient, the sum's own added in the kernel."""

    @staticmethod
    def forward(ctx, x, update, weight, bias, eps: float, name: str):
        ctx.set_materialize_grads(False)
        total, normed, mean, rstd = _forward(x, update, weight, bias, eps, name)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.name = name
        return total, normed

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, grad_total: Tensor | None, grad_normed: Tensor | None):
        grad = grad_total
        if grad_normed is not None:
            grad = _backward(grad_normed, grad_total, *ctx.saved_tensors, ctx.name)
        needs_x, needs_update = ctx.needs_input_grad[:2]
        return grad if needs_x else None, grad if needs_update else None, None, None, None, None


dispatch.IMPLEMENTATIONS["add_layer_norm"] = {
    REFERENCE: dispatch.eager(),
    "triton": dispatch.triton("add_layer_norm"),
}
dispatch.RULES["add_layer_norm"] = (Rule("cuda", "triton", ESTIMATE),)
