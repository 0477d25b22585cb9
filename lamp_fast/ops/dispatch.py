"""Which implementation serves a call of an op, and how torch knows the op.

The reference is called as it is, so that autograd and torch.compile see through it. Every other
implementation goes through one torch op a direction, named as the op is (``<op>`` and
``<op>_backward``), that takes the implementation's name: it has a schema and a fake, is a pure
function, and knows nothing of gradients. It allocates its outputs here, alike for the fake and the
real call, and an implementation fills them. Implementations are modules, imported when first
called, and never import one another.
"""

import functools
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from lamp_fast.errors import InputError

REFERENCE = "reference"


@dataclass(frozen=True)
class CallFacts:
    """What the choice of an implementation may depend on, all of it static under torch.compile.

    Attributes:
        device, dtype: of the tensors.
        large: beyond what the op's GPU kernels are written for.
        sparse: prefix_attention whose rows see few keys each: a mask, or short causal rows.
    """

    device: torch.device
    dtype: torch.dtype
    large: bool = False
    sparse: bool = False


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        module: defines functions with the op's name (and ``<op>_backward``); imported when needed.
        devices: types of device that it serves; None for all.
        build_hint: what to do when the module cannot be imported.
        backward: which implementation runs the backward of this one's forward, by default itself.
        limits: of a call, why it cannot serve it; None where it can.
    """

    module: str
    devices: tuple[str, ...] | None = None
    build_hint: str = ""
    backward: str | None = None
    limits: Callable[[CallFacts], str | None] = lambda call: None


@dataclass(frozen=True)
class Rule:
    """One line of the table that picks: the implementation for a device, and for which calls.

    Attributes:
        device: its type.
        name: the implementation.
        why: for people who ask, in words.
        applies: to which calls; all by default.
    """

    device: str
    name: str
    why: str
    applies: Callable[[CallFacts], bool] = lambda call: True


ESTIMATE = "by estimate, not measured"


@cache
def cpu_has(instructions: str) -> bool:
    """Whether torch says that this CPU has instructions, such as "avx512_bf16"; where it says
    nothing (before torch 2.11, another architecture) it has not."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get(instructions))


def cpu_bfloat16() -> tuple[str, ...]:
    """The instructions by which this CPU multiplies bfloat16; none where it cannot."""
    return tuple(name for name in ("avx512_bf16", "amx_bf16") if cpu_has(name))


IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}
"""Of every op, by name; an op's file fills in its own."""

RULES: dict[str, tuple[Rule, ...]] = {}
"""The first line that applies and can run serves; where none does, the reference."""


# The kinds of implementations there are; ``accepted`` says what an op's kernels take, in words.

_BUILD = "build it with: pip install --no-build-isolation --no-deps -e ."


def eager() -> Implementation:
    return Implementation("lamp_fast.ops.reference")


def cpp(limits: Callable[[CallFacts], str | None] = lambda call: None) -> Implementation:
    return Implementation("lamp_fast.ops.cpp", ("cpu",), _BUILD, limits=limits)


def triton(module: str, accepted: str = "") -> Implementation:
    def limits(call: CallFacts) -> str | None:
        return _beyond(accepted, call) or (_interpreter_limits() if _interpreting() else None)

    return Implementation(f"lamp_fast.kernels.{module}", ("cuda",), "install triton", limits=limits)


def cuda(accepted: str = "", backward: str | None = None) -> Implementation:
    def limits(call: CallFacts) -> str | None:
        major, minor = torch.cuda.get_device_capability(call.device)
        if major < 8:
            return (
                f"expected a GPU of sm_80 or newer, {call.device} is sm_{major}{minor};"
                " 'triton' and 'reference' serve it"
            )
        return _beyond(accepted, call)

    return Implementation("lamp_fast.ops.cuda", ("cuda",), _BUILD, backward, limits)


def _beyond(accepted: str, call: CallFacts) -> str | None:
    if call.large:
        return f"expected {accepted}"
    if call.dtype == torch.float64:
        return "expected float32, float16 or bfloat16, the tensors are float64"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _interpreter_limits() -> str | None:
    """Triton before 3.7 makes a number of an array [1], as numpy up to 2.3 did."""
    triton, numpy = (TorchVersion(importlib.metadata.version(p)) for p in ("triton", "numpy"))
    if triton >= "3.7" or numpy < "2.4":
        return None
    return (
        f"Triton {triton}'s interpreter expected numpy below 2.4, it is {numpy};"
        " unset TRITON_INTERPRET, or install Triton 3.7 or newer"
    )


# The choice.

_preferred: str | None = None


def prefer(name: str | None) -> str | None:
    """Let one implementation serve every call that names none; None goes back to the table.

    Returns:
        What was preferred before.
    """
    global _preferred
    before, _preferred = _preferred, name
    return before


def implementations(op: str) -> dict[str, str | None]:
    """Every implementation of an op and why it cannot run in this installation (None: it can).

    Raises:
        InputError: an op that does not exist.
    """
    if op not in IMPLEMENTATIONS:
        raise InputError(f"op={op!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    return {name: why_unavailable(op, name) for name in IMPLEMENTATIONS[op]}


def choose(
    op: str, impl: str | None, tensor: Tensor, large: bool = False, sparse: bool = False
) -> str:
    """The implementation that serves a call; for the arguments see :class:`CallFacts`.

    Without an explicit choice what cannot run gives way to the next line of :data:`RULES`; where
    that leaves the reference, one warning says so. An explicit choice never gives way.

    Raises:
        InputError: what speaks against an explicit choice.
    """
    # torch.compile may keep a size open, and so what is compared with it. A branch, unlike bool(),
    # decides it and has it compile again on the other side.
    large, sparse = (True if each else False for each in (large, sparse))  # noqa: SIM210
    name, reason = _chosen(op, impl, tensor.device, tensor.dtype, large, sparse)
    if reason is not None:
        raise InputError(f"impl={impl!r}: {op}: {reason}")
    return name


@torch.compiler.assume_constant_result
def _chosen(
    op: str, impl: str | None, device: torch.device, dtype: torch.dtype, large: bool, sparse: bool
) -> tuple[str, str | None]:
    """The implementation, and what speaks against an explicit choice (None: nothing)."""
    call = CallFacts(device, dtype, large, sparse)
    if impl is not None:
        known = IMPLEMENTATIONS[op]
        if impl not in known:
            return impl, f"expected one of {', '.join(known)}"
        return impl, why_it_cannot_serve(op, impl, call)
    name, _, missing = pick(op, call, _preferred)
    if name == REFERENCE and missing is not None:
        _warn_once(f"{op} runs the slower reference: {missing}")
    return name, None


@cache
def pick(op: str, call: CallFacts, preferred: str | None = None) -> tuple[str, str, str | None]:
    """What serves a call that names no implementation: its name, why, and what kept a better one.

    ``preferred`` serves wherever it can; see :func:`prefer`.
    """
    if preferred in IMPLEMENTATIONS[op] and why_it_cannot_serve(op, preferred, call) is None:
        return preferred, "preferred", None
    missing = None
    for rule in RULES[op]:
        if rule.device != call.device.type or not rule.applies(call):
            continue
        reason = why_it_cannot_serve(op, rule.name, call)
        if reason is None:
            return rule.name, rule.why, missing
        missing = missing or f"{rule.name}: {reason}"
    return REFERENCE, "nothing serves better", missing


def why_it_cannot_serve(op: str, name: str, call: CallFacts) -> str | None:
    """Why an implementation cannot serve a call in this installation; None where it can."""
    implementation = IMPLEMENTATIONS[op][name]
    devices = implementation.devices
    if devices == ("cuda",) and name == "triton" and _interpreting():
        devices = ("cuda", "cpu")
    if devices is not None and call.device.type not in devices:
        return f"expected tensors on {' or '.join(devices)}, they are on {call.device.type}"
    return why_unavailable(op, name) or implementation.limits(call)


@cache
def why_unavailable(op: str, name: str) -> str | None:
    """One line on why an implementation cannot run in this installation; None where it can."""
    try:
        load(op, name, op)
    except ImportError as error:
        return f"{error}; {IMPLEMENTATIONS[op][name].build_hint}"
    backward = IMPLEMENTATIONS[op][name].backward
    return None if backward is None else why_unavailable(op, backward)


@cache
def load(op: str, name: str, function: str) -> Callable:
    """Import one function of an implementation.

    Raises:
        ImportError: it is not built or lacks what it needs.
    """
    module = importlib.import_module(IMPLEMENTATIONS[op][name].module)
    try:
        return getattr(module, function)
    except AttributeError:
        raise ImportError(f"{module.__name__} has no {function}") from None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


# What torch is told of an op.


def define(op: str, schema: str, outputs: Callable, *, backward: bool = False) -> Callable:
    """One direction of an op: ``outputs`` allocates from the arguments, an implementation fills.

    Args:
        op: its name.
        schema: arguments and results without the name; the last argument, ``str impl``, is the
            implementation's name.
        outputs: from the arguments without the implementation's name to the results.
        backward: the op's backward; ``impl`` is then the name of the forward's implementation.
    """
    function = f"{op}_backward" if backward else op

    def run(*arguments):
        *given, impl = arguments
        results = outputs(*given)
        filled = (results,) if isinstance(results, Tensor) else results
        if backward:
            impl = IMPLEMENTATIONS[op][impl].backward or impl
        # Kernels launch on the current device, which need not be that of the tensors.
        with torch.cuda.device(filled[0].device) if filled[0].is_cuda else nullcontext():
            load(op, impl, function)(*given, *filled)
        return results

    def fake(*arguments):
        return outputs(*arguments[:-1])

    name = f"lamp_fast::{function}"
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", run)
    torch.library.register_fake(name, fake)
    # Looked up once: an overload costs a microsecond or two to find.
    return getattr(torch.ops.lamp_fast, function).default


def differentiates(*tensors: Tensor) -> bool:
    """Whether autograd watches a call."""
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def once_differentiable(backward: Callable) -> Callable:
    """For the backward of a ``torch.autograd.Function``: to differentiate it again is an error.

    torch's own decorator takes notice of the incoming gradient alone: with one that is constant,
    as of a plain sum, the second derivative would silently be zero.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *above):
        gradients = backward(ctx, *above)
        if not torch.is_grad_enabled():  # nobody asked for create_graph
            return gradients
        single = not isinstance(gradients, tuple)
        gradients = (gradients,) if single else gradients
        refused = _Refused.apply(len(gradients), *gradients, *above, *ctx.saved_tensors)
        return refused[0] if single else refused

    return wrapper


class _Refused(torch.autograd.Function):
    """Hands on its first ``count`` inputs; has no gradient."""

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if each is None else each.view_as(each) for each in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "second derivatives of lamp_fast.ops: expected impl='reference', the other"
            " implementations have first ones alone"
        )


# What the checks of all ops share.


def check_like(first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    """Refuse a tensor of another dtype or device than the first, which is floating point."""
    check_floating(first_name, first)
    if tensor.dtype != first.dtype:
        raise InputError(f"{name}: {tensor.dtype}, expected {first.dtype} as {first_name}")
    if tensor.device != first.device:
        raise InputError(f"{name}: on {tensor.device}, expected {first.device} as {first_name}")


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise InputError(f"{name}: {tensor.dtype}, expected floating point")
