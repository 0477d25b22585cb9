"""frozen_linear: a product with a weight that is never trained."""

import platform

import torch
from torch import Tensor

from lamp_fast.errors import InputError
from lamp_fast.ops import dispatch, reference
from lamp_fast.ops.dispatch import REFERENCE, Rule

WORTH_PACKING = 1 << 15
"""Numbers of a weight from which the time gained outweighs the call from Python."""


class FrozenLinear:
    """x W^T + b with a frozen weight, which a CPU packs when it is first used.

    A product of torch rearranges the weight each time; packed once, the product runs near the rate
    of the multiply-adds alone. The copy is as large as the weight, and a second one, of its
    transpose, is made by the first backward. A weight that was written to since is packed again.

    Args:
        weight: [N, K], floating point, without gradient.
        bias: [N] in the dtype of ``weight``; none by default.

    Attributes:
        weight, bias: the tensors given.

    Raises:
        InputError: a weight that wants a gradient, or shapes or dtypes that do not fit.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.ndim != 2:
            raise InputError(f"weight: shape {[*weight.shape]}, expected [N, K]")
        if bias is not None:
            dispatch.check_like("weight", weight, "bias", bias)
            if bias.shape != weight.shape[:1]:
                raise InputError(
                    f"bias: shape {[*bias.shape]}, expected {[len(weight)]}, weight's first"
                )
        if any(each is not None and each.requires_grad for each in (weight, bias)):
            raise InputError("weight: requires a gradient, expected a frozen one")
        self.weight, self.bias = weight, bias
        # By whether it is the transpose: the weight's version, and the packed copy.
        self._packed: dict[bool, tuple[int, Tensor]] = {}

    def __getstate__(self) -> dict:
        """For copies: packed weights are opaque to torch's, and are made again."""
        return {**vars(self), "_packed": {}}

    def outputs(self, first: int = 0, last: int | None = None) -> "FrozenLinear":
        """The product that gives only outputs ``first`` up to ``last``; it packs its own copy."""
        bias = None if self.bias is None else self.bias[first:last]
        return FrozenLinear(self.weight[first:last], bias)

    def __call__(self, x: Tensor, *, impl: str | None = None) -> Tensor:
        """The product.

        Args:
            x: [..., K] in the dtype of the weight.
            impl: "reference" (torch's own), "packed" (float32 or bfloat16 on a CPU) or None.

        Returns:
            [..., N] in the dtype of ``x``, differentiable in ``x``.

        Raises:
            InputError: ``x`` of another width, dtype or device, or an ``impl`` that cannot serve.

        Under torch.compile and torch.export, which pack by themselves, and of tensors without
        memory the reference serves whatever is asked for.

        *Numerics*: both sum in float32 for float32 and bfloat16, in different orders, and round
        once. *Determinism*: always. Only the reference is differentiable twice.
        """
        if torch.compiler.is_compiling():
            return reference.frozen_linear(x, self.weight, self.bias)
        self._check(x)
        if impl is None and self.weight.numel() < WORTH_PACKING:
            impl = REFERENCE
        name = dispatch.choose("frozen_linear", impl, x)
        if name == REFERENCE or not _has_memory(x) or x.numel() == 0:
            return reference.frozen_linear(x, self.weight, self.bias)
        if dispatch.differentiates(x):
            return _FrozenLinear.apply(x, self, name)
        return self.product(x, name)

    def product(self, x: Tensor, name: str) -> Tensor:
        """x W^T + b by an implementation with packed weights; autograd knows nothing of it."""
        return _run(name, x, self._packed_weight(name, transposed=False), self.bias)

    def product_backward(self, grad: Tensor, name: str) -> Tensor:
        """The gradient of x [..., K] from that of the outputs [..., N]."""
        return _run(name, grad, self._packed_weight(name, transposed=True), None)

    def _packed_weight(self, name: str, *, transposed: bool) -> Tensor:
        version = 0 if self.weight.is_inference() else self.weight._version
        known = self._packed.get(transposed)
        if known is None or known[0] != version:
            weight = self.weight.mT if transposed else self.weight
            known = version, dispatch.load("frozen_linear", name, "pack")(weight)
            self._packed[transposed] = known
        return known[1]

    def _check(self, x: Tensor) -> None:
        dispatch.check_like("weight", self.weight, "x", x)
        if x.ndim == 0 or x.shape[-1] != self.weight.shape[1]:
            raise InputError(
                f"x: shape {[*x.shape]}, expected [..., {self.weight.shape[1]}] as weight's second"
            )


def _run(name: str, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return dispatch.load("frozen_linear", name, "frozen_linear")(x, packed, bias)


def _has_memory(x: Tensor) -> bool:
    """Whether x is a tensor of torch itself, no stand-in that only knows its shape."""
    return type(x) in (Tensor, torch.nn.Parameter)


class _FrozenLinear(torch.autograd.Function):
    """The packed product; keeps nothing for backward but the weight, which was there before."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: FrozenLinear, name: str) -> Tensor:
        ctx.linear, ctx.name = linear, name
        return linear.product(x, name)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.linear.product_backward(grad, ctx.name), None, None


def _multiplied(call: dispatch.CallFacts) -> str | None:
    """Why oneDNN has no fast product of such numbers on this CPU."""
    if call.dtype == torch.bfloat16 and not dispatch.cpu_bfloat16():
        return "expected a CPU that multiplies bfloat16 (AVX512_BF16 or AMX)"
    if call.dtype not in (torch.float32, torch.bfloat16):
        return f"expected float32 or bfloat16, x is {call.dtype}"
    return None


def _pays(call: dispatch.CallFacts) -> bool:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and _multiplied(call) is None


dispatch.IMPLEMENTATIONS["frozen_linear"] = {
    REFERENCE: dispatch.eager(),
    "packed": dispatch.Implementation("lamp_fast.ops.onednn", ("cpu",), limits=_multiplied),
}
dispatch.RULES["frozen_linear"] = (
    Rule("cpu", "packed", "weights packed once: 1.1 times torch's: benchmarks/NOTES.md", _pays),
)
