"""Which implementations every op has, which one serves by default, and their torch schemas.

The reference is called as it is, so that autograd and torch.compile see through it. Every other
implementation goes through one torch op, named as the op is, that takes the implementation's name:
it has a schema and a fake, is a pure function, and knows nothing of gradients. Implementations are
imported when first called and never import one another.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        module: defines a function with the op's name; imported when first needed.
        devices: types of device that it serves; None for all.
        build_hint: what to do when the module cannot be imported.
    """

    module: str
    devices: tuple[str, ...] | None = None
    build_hint: str = ""


_REFERENCE = Implementation("lamp_fast.ops.reference")
_CPP = Implementation(
    "lamp_fast.ops.cpp", ("cpu",), "build it with: pip install --no-build-isolation --no-deps -e ."
)

IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {
    "retrieve": {"reference": _REFERENCE, "cpp": _CPP},
    "prefix_attention": {"reference": _REFERENCE},
    "quick_gelu": {"reference": _REFERENCE},
}

# Measured by benchmarks/bench_<op>.py. Where nothing is named, the reference serves.
DEFAULTS: dict[tuple[str, str], str] = {
    ("retrieve", "cpu"): "cpp",
}


@cache
def load(op: str, name: str) -> Callable:
    """Import one implementation's function.

    Raises:
        ImportError: it is not built or lacks what it needs.
    """
    return getattr(importlib.import_module(IMPLEMENTATIONS[op][name].module), op)


@cache
def why_unavailable(op: str, name: str) -> str | None:
    """One line on why an implementation cannot run in this installation; None where it can."""
    try:
        load(op, name)
    except ImportError as error:
        return f"{error}; {IMPLEMENTATIONS[op][name].build_hint}"
    return None


@torch.compiler.assume_constant_result
def choose(op: str, impl: str | None, device: str) -> tuple[str, str | None]:
    """The implementation that serves, and what speaks against an explicit choice (None: nothing).

    Without an explicit choice a default that is not built gives way to the reference, with one
    warning. An explicit choice never does.
    """
    known = IMPLEMENTATIONS[op]
    if impl is None:
        name = DEFAULTS.get((op, device), "reference")
        reason = why_unavailable(op, name)
        if reason is None:
            return name, None
        _warn_once(f"{op} runs the slower reference instead of {name}: {reason}")
        return "reference", None
    if impl not in known:
        return impl, f"expected one of {', '.join(known)}"
    devices = known[impl].devices
    if devices is not None and device not in devices:
        return impl, f"expected tensors on {' or '.join(devices)}, they are on {device}"
    return impl, why_unavailable(op, impl)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


torch.library.define(
    "lamp_fast::retrieve",
    "(Tensor query, Tensor keys, Tensor bias, SymInt k, str impl) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("lamp_fast::retrieve", "default")
def _retrieve(query: Tensor, keys: Tensor, bias: Tensor, k: int, impl: str):
    return load("retrieve", impl)(query, keys, bias, k)


@torch.library.register_fake("lamp_fast::retrieve")
def _retrieve_fake(query: Tensor, keys: Tensor, bias: Tensor, k: int, impl: str):
    return (
        query.new_empty((query.shape[0], k), dtype=torch.int64),
        query.new_empty((query.shape[0], k)),
        query.new_empty(keys.shape[0], dtype=torch.int64),
    )


# Looked up once: an overload costs a microsecond or two to find.
retrieve = torch.ops.lamp_fast.retrieve.default
