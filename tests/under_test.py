"""Which implementations of an op the tests run here, on which device and in which dtypes.

Triton and CUDA run on a GPU where there is one; without one Triton runs in its interpreter
(:mod:`conftest` switches it on) and CUDA is skipped with the reason.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lamp_fast import ops
from lamp_fast.ops import dispatch

ON_GPU = ("triton", "cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def device(impl: str) -> torch.device:
    """Where the tests run an implementation."""
    gpu = impl in ON_GPU and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def serves(op: str, impl: str, dtype: torch.dtype) -> bool:
    """Whether an implementation is tested in a dtype.

    The native activations have bfloat16 alone. The kernels have no float64, and the interpreter's
    products of bfloat16 are wrong.
    """
    if impl == "cpp" and op in ("quick_gelu", "gelu"):
        return dtype == torch.bfloat16
    if impl not in ON_GPU:
        return True
    return dtype != torch.float64 and not (INTERPRETED and dtype == torch.bfloat16)


def cases(op: str, *dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Parametrise a test by ``impl`` and ``dtype``, with a skip where one cannot run."""
    return pytest.mark.parametrize(
        ("impl", "dtype"),
        [
            pytest.param(impl, dtype, marks=skipped(op, impl, dtype), id=f"{impl}-{str(dtype)[6:]}")
            for impl in dispatch.IMPLEMENTATIONS[op]
            for dtype in dtypes
            if serves(op, impl, dtype)
        ],
    )


def implementations(op: str, dtype: torch.dtype = torch.float32) -> pytest.MarkDecorator:
    """Parametrise a test by ``impl``: all that serve a dtype."""
    return pytest.mark.parametrize(
        "impl",
        [
            pytest.param(impl, marks=skipped(op, impl, dtype))
            for impl in dispatch.IMPLEMENTATIONS[op]
            if serves(op, impl, dtype)
        ],
    )


def skipped(op: str, impl: str, dtype: torch.dtype | None = None) -> pytest.MarkDecorator:
    """The mark of a test that needs an implementation, with the reason where it cannot run; by
    default in the first of float32 and bfloat16 that it is tested in."""
    if dtype is None:
        dtype = torch.float32 if serves(op, impl, torch.float32) else torch.bfloat16
    call = dispatch.CallFacts(device(impl), dtype)
    reason = dispatch.why_it_cannot_serve(op, impl, call)
    return pytest.mark.skipif(reason is not None, reason=f"{impl}: {reason}")


def assert_as_accurate(
    name: str, got: Tensor, eager: Tensor, exact: Tensor, budget: Tensor | float
) -> None:
    """The criterion of every op: an error against float64 within twice eager's and a budget.

    Args:
        name: of what is compared.
        got: from the implementation under test.
        eager: from the reference in the same dtype.
        exact: from the reference in float64, given the same inputs.
        budget: what rounding may add, derived from the op's arithmetic, by element.
    """
    assert got.shape == exact.shape, name
    assert got.dtype == eager.dtype, name
    if got.numel() == 0:
        return
    allowed = 2 * (eager.double() - exact).abs().max() + budget
    excess = (got.double() - exact).abs() - allowed
    # Written so that NaN fails.
    assert (excess <= 0).all(), f"{name}: {excess.max().item():.2e} over {allowed.max().item():.2e}"


def assert_errs_as_eager(draws: list[tuple[dict[str, Tensor], ...]]) -> None:
    """What a whole model gives in low precision errs, over several draws, at most twice as much as
    plain torch in the same precision.

    Rounding errors of a whole model are no more than random, so that single numbers tell nothing:
    root mean squares over some draws of two programs that round alike differ by some tens of
    percent. Neither does one parameter's gradient: over 60 draws of MMA, half of which have a ReLU
    that rounding turns on or off, ours errs more than twice as much as eager's in 135 of 1,200
    cases, and less than half as much in 191. The one parameter of CoOp errs 1.03 times as much as
    eager's over 150 draws (0.95 to 1.12 by bootstrap).

    Args:
        draws: what was got, what eager gives, and the exact result, each by name.
    """
    for name in draws[0][0]:
        sums = [0.0, 0.0]
        for *rounded, exact in draws:
            for index, each in enumerate(rounded):
                error = (each[name].double() - exact[name]).norm() / exact[name].norm()
                sums[index] += float(error) ** 2
        # Written so that NaN fails.
        assert sums[0] <= 4 * sums[1] < math.inf, f"{name}: {sums[0]:.2e}, eager {sums[1]:.2e}"


@contextmanager
def preferring(impl: str) -> Iterator[None]:
    """Serve every call by one implementation."""
    before = ops.prefer(impl)
    try:
        yield
    finally:
        ops.prefer(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN, or absurd integers, so that what is not written shows."""
    create = {
        (torch, "empty"): torch.empty,
        (torch, "empty_like"): torch.empty_like,
        (torch.Tensor, "new_empty"): torch.Tensor.new_empty,
    }

    def poisoned(function: Callable) -> Callable:
        def call(*given, **named):
            new = function(*given, **named)
            return new.fill_(math.nan if new.is_floating_point() else -(2**30))

        return call

    for (owner, name), function in create.items():
        setattr(owner, name, poisoned(function))
    try:
        yield
    finally:
        for (owner, name), function in create.items():
            setattr(owner, name, function)
