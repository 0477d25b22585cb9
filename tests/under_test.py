"""Which implementations of an op the tests run here, on which device and in which dtypes.

Triton and CUDA run on a GPU where there is one; without one Triton runs in its interpreter
(:mod:`conftest` switches it on) and CUDA is skipped with the reason.
"""

import os

import pytest
import torch

from lamp_fast.ops import contracts

ON_GPU = ("triton", "cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def device(impl: str) -> torch.device:
    """Where the tests run an implementation."""
    gpu = impl in ON_GPU and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def serves(impl: str, dtype: torch.dtype) -> bool:
    """Whether an implementation is tested in a dtype.

    The kernels have no float64, and the interpreter's products of bfloat16 are wrong.
    """
    if impl not in ON_GPU:
        return True
    return dtype != torch.float64 and not (INTERPRETED and dtype == torch.bfloat16)


def cases(op: str, *dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Parametrise a test by ``impl`` and ``dtype``, with a skip where one cannot run."""
    return pytest.mark.parametrize(
        ("impl", "dtype"),
        [
            pytest.param(impl, dtype, marks=_skipped(op, impl), id=f"{impl}-{str(dtype)[6:]}")
            for impl in contracts.IMPLEMENTATIONS[op]
            for dtype in dtypes
            if serves(impl, dtype)
        ],
    )


def implementations(op: str, dtype: torch.dtype = torch.float32) -> pytest.MarkDecorator:
    """Parametrise a test by ``impl``: all that serve a dtype."""
    return pytest.mark.parametrize(
        "impl",
        [
            pytest.param(impl, marks=_skipped(op, impl))
            for impl in contracts.IMPLEMENTATIONS[op]
            if serves(impl, dtype)
        ],
    )


def _skipped(op: str, impl: str):
    call = contracts.Call(device(impl), torch.float32)
    reason = contracts.objection(op, impl, call)
    return pytest.mark.skipif(reason is not None, reason=f"{impl}: {reason}")
