"""Which implementations every op has, which one serves a call, and their torch schemas.

The reference is called as it is, so that autograd and torch.compile see through it. Every other
implementation goes through one torch op a direction, named as the op is (``<op>`` and
``<op>_backward``), that takes the implementation's name: it has a schema and a fake, is a pure
function, and knows nothing of gradients. It allocates its outputs here, alike for the fake and the
real call, and an implementation fills them. Implementations are imported when first called and
never import one another.
"""

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

REFERENCE = "reference"


@dataclass(frozen=True)
class Call:
    """What the choice of an implementation may depend on, all of it static under torch.compile.

    Attributes:
        device, dtype: of the tensors.
        large: beyond what GPU kernels are written for: retrieve with M over 256 or k over 32,
            prefix_attention with heads wider than 128.
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
        objection: why it cannot serve a call; None where it can.
    """

    module: str
    devices: tuple[str, ...] | None = None
    build_hint: str = ""
    backward: str | None = None
    objection: Callable[[Call], str | None] = lambda call: None


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
    applies: Callable[[Call], bool] = lambda call: True


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernel_limits(call: Call) -> str | None:
    if call.large:
        return "expected M up to 256 and k up to 32, or heads of width up to 128"
    if call.dtype == torch.float64:
        return "expected float32, float16 or bfloat16, the tensors are float64"
    return None


def _triton_limits(call: Call) -> str | None:
    return _kernel_limits(call) or (_interpreter_limits() if _interpreting() else None)


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


def _cuda_limits(call: Call) -> str | None:
    major, minor = torch.cuda.get_device_capability(call.device)
    if major < 8:
        return (
            f"expected a GPU of sm_80 or newer, {call.device} is sm_{major}{minor};"
            " 'triton' and 'reference' serve it"
        )
    return _kernel_limits(call)


_BUILD = "build it with: pip install --no-build-isolation --no-deps -e ."
_TRITON = "install triton"


def _reference() -> Implementation:
    return Implementation("lamp_fast.ops.reference")


def _cpp() -> Implementation:
    return Implementation("lamp_fast.ops.cpp", ("cpu",), _BUILD)


def _triton(module: str) -> Implementation:
    return Implementation(
        f"lamp_fast.kernels.{module}", ("cuda",), _TRITON, objection=_triton_limits
    )


def _cuda(backward: str | None = None) -> Implementation:
    return Implementation("lamp_fast.ops.cuda", ("cuda",), _BUILD, backward, _cuda_limits)


IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {
    "retrieve": {
        REFERENCE: _reference(),
        "cpp": _cpp(),
        "triton": _triton("retrieve"),
        "cuda": _cuda(backward="triton"),
    },
    "prefix_attention": {
        REFERENCE: _reference(),
        "cpp": _cpp(),
        "triton": _triton("prefix_attention"),
        "cuda": _cuda(),
    },
    "quick_gelu": {REFERENCE: _reference(), "triton": _triton("pointwise")},
    "gelu": {REFERENCE: _reference(), "triton": _triton("pointwise")},
    "add_layer_norm": {REFERENCE: _reference(), "triton": _triton("add_layer_norm")},
}

_ESTIMATE = "by estimate, not measured"

# The first line that applies and can run serves; where none does, the reference.
RULES: dict[str, tuple[Rule, ...]] = {
    "retrieve": (
        Rule("cpu", "cpp", "2.4 to 3 times eager: benchmarks/NOTES.md"),
        Rule("cuda", "cuda", _ESTIMATE),
        Rule("cuda", "triton", _ESTIMATE),
    ),
    "prefix_attention": (
        Rule(
            "cpu",
            "cpp",
            "few keys a row: 1.3 to 8 times the reference (long rows 0.6): benchmarks/NOTES.md",
            lambda call: call.sparse,
        ),
        Rule("cuda", "triton", _ESTIMATE),
    ),
    "quick_gelu": (Rule("cuda", "triton", _ESTIMATE),),
    "gelu": (Rule("cuda", "triton", _ESTIMATE),),
    "add_layer_norm": (Rule("cuda", "triton", _ESTIMATE),),
}

_preferred: str | None = None


def prefer(name: str | None) -> str | None:
    """Let one implementation serve every call that names none; None goes back to the table.

    Returns:
        What was preferred before.
    """
    global _preferred
    before, _preferred = _preferred, name
    return before


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
def why_unavailable(op: str, name: str) -> str | None:
    """One line on why an implementation cannot run in this installation; None where it can."""
    try:
        load(op, name, op)
    except ImportError as error:
        return f"{error}; {IMPLEMENTATIONS[op][name].build_hint}"
    backward = IMPLEMENTATIONS[op][name].backward
    return None if backward is None else why_unavailable(op, backward)


def objection(op: str, name: str, call: Call) -> str | None:
    """Why an implementation cannot serve a call in this installation; None where it can."""
    implementation = IMPLEMENTATIONS[op][name]
    devices = implementation.devices
    if devices == ("cuda",) and name == "triton" and _interpreting():
        devices = ("cuda", "cpu")
    if devices is not None and call.device.type not in devices:
        return f"expected tensors on {' or '.join(devices)}, they are on {call.device.type}"
    return why_unavailable(op, name) or implementation.objection(call)


@torch.compiler.assume_constant_result
def choose(
    op: str,
    impl: str | None,
    device: torch.device,
    dtype: torch.dtype,
    large: bool = False,
    sparse: bool = False,
) -> tuple[str, str | None]:
    """The implementation that serves, and what speaks against an explicit choice (None: nothing).

    Without an explicit choice what cannot run gives way to the next line of :data:`RULES`; where
    that leaves the reference, one warning says so. An explicit choice never gives way. For the
    arguments see :class:`Call`.
    """
    call = Call(device, dtype, large, sparse)
    if impl is not None:
        known = IMPLEMENTATIONS[op]
        if impl not in known:
            return impl, f"expected one of {', '.join(known)}"
        return impl, objection(op, impl, call)
    name, _, missing = pick(op, call, _preferred)
    if name == REFERENCE and missing is not None:
        _warn_once(f"{op} runs the slower reference: {missing}")
    return name, None


@cache
def pick(op: str, call: Call, preferred: str | None = None) -> tuple[str, str, str | None]:
    """What serves a call that names no implementation: its name, why, and what kept a better one.

    ``preferred`` serves wherever it can; see :func:`prefer`.
    """
    if preferred in IMPLEMENTATIONS[op] and objection(op, preferred, call) is None:
        return preferred, "preferred", None
    missing = None
    for rule in RULES[op]:
        if rule.device != call.device.type or not rule.applies(call):
            continue
        reason = objection(op, rule.name, call)
        if reason is None:
            return rule.name, rule.why, missing
        missing = missing or f"{rule.name}: {reason}"
    return REFERENCE, "nothing serves better", missing


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def _op(op: str, schema: str, outputs: Callable, *, backward: bool = False) -> Callable:
    """One direction of an op: ``outputs`` allocates from the arguments, an implementation fills.

    Args:
        op: its name.
        schema: arguments and results without the name; the last argument is the implementation's.
        outputs: from the arguments without the implementation's name to the results.
        backward: the op's backward.
    """
    function = f"{op}_backward" if backward else op

    def run(*arguments):
        *given, impl = arguments
        results = outputs(*given)
        filled = (results,) if isinstance(results, Tensor) else results
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


def _retrieve_outputs(query: Tensor, keys: Tensor, bias: Tensor, k: int):
    rows = query.shape[0]
    return (
        query.new_empty((rows, k), dtype=torch.int64),
        query.new_empty((rows, k)),
        query.new_empty(keys.shape[0], dtype=torch.int64),
    )


def _retrieve_backward_outputs(query: Tensor, keys: Tensor, *_):
    return query.new_empty(query.shape), keys.new_empty(keys.shape)


def _rows_first(x: Tensor) -> Tensor:
    """Room for an x [N, H, rows, d], in the memory order [N, rows, H, d] of the projections."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _prefix_attention_outputs(q: Tensor, *_):
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _rows_first(q), q.new_empty(q.shape[:3], dtype=precision)


def _prefix_attention_backward_outputs(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *rest
):
    *_, needs_own, needs_prefix = rest
    # In the first layer with prompts nothing below wants a gradient: no room is made for one.
    own = [_rows_first(each) if needs_own else q.new_empty(0) for each in (q, k, v)]
    prefix = [
        _rows_first(each) if needs_prefix else q.new_empty(0) for each in (prefix_k, prefix_v)
    ]
    return (*own, *prefix)


def _like_contiguous(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _add_layer_norm_outputs(x: Tensor, *_):
    rows = x.shape[:-1]
    statistics = [x.new_empty(rows, dtype=torch.float32) for _ in range(2)]
    return _like_contiguous(x), _like_contiguous(x), *statistics


retrieve = _op(
    "retrieve",
    "(Tensor query, Tensor keys, Tensor bias, SymInt k, str impl) -> (Tensor, Tensor, Tensor)",
    _retrieve_outputs,
)
"""(query, keys, bias, k, impl) -> indices, similarity, counts."""

retrieve_backward = _op(
    "retrieve",
    "(Tensor query, Tensor keys, Tensor indices, Tensor similarity, Tensor grad, str impl)"
    " -> (Tensor, Tensor)",
    _retrieve_backward_outputs,
    backward=True,
)
"""(query, keys, indices, similarity, its gradient, impl) -> gradients of query and keys."""

prefix_attention = _op(
    "prefix_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? prefix_index,"
    " Tensor? mask, bool causal, SymInt blind, float scale, str impl) -> (Tensor, Tensor)",
    _prefix_attention_outputs,
)
"""As the public op -> output, and log-sum-exp of each row's scores [N, H, R] for backward."""

prefix_attention_backward = _op(
    "prefix_attention",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor out,"
    " Tensor lse, Tensor? prefix_index, Tensor? mask, bool causal, SymInt blind, float scale,"
    " bool needs_own, bool needs_prefix, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _prefix_attention_backward_outputs,
    backward=True,
)
"""-> gradients of q, k, v (empty unless needs_own), prefix_k and prefix_v (unless needs_prefix)."""

pointwise, pointwise_backward = {}, {}
"""quick_gelu and gelu: (x, impl) -> y; (grad, x, impl) -> gradient of x."""
for _name in ("quick_gelu", "gelu"):
    pointwise[_name] = _op(_name, "(Tensor x, str impl) -> Tensor", lambda x: _like_contiguous(x))
    pointwise_backward[_name] = _op(
        _name,
        "(Tensor grad, Tensor x, str impl) -> Tensor",
        lambda grad, x: _like_contiguous(x),
        backward=True,
    )

add_layer_norm = _op(
    "add_layer_norm",
    "(Tensor x, Tensor update, Tensor weight, Tensor bias, float eps, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _add_layer_norm_outputs,
)
"""-> sum, its normalised rows, and their float32 means and inverse standard deviations."""

add_layer_norm_backward = _op(
    "add_layer_norm",
    "(Tensor grad_normed, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd,"
    " str impl) -> Tensor",
    lambda grad_normed, grad_sum, total, *_: _like_contiguous(total),
    backward=True,
)
"""-> the gradient of x and update, which are the same."""
