"""Which implementation serves: the table, explicit choices, and what ``info`` says of them."""

import os
import subprocess
import sys
import warnings

import calls
import pytest
import torch
import under_test

from lamp_fast import info, ops
from lamp_fast.errors import InputError
from lamp_fast.ops import dispatch

CPU = dispatch.CallFacts(torch.device("cpu"), torch.float32)
GPU = dispatch.CallFacts(torch.device("cuda", 0), torch.bfloat16)


@pytest.fixture
def table(monkeypatch):
    """Stand-in implementations of one op: missing ones fail to import, the others serve."""

    def forget():
        for cached in (dispatch.pick, dispatch.why_unavailable, dispatch.load):
            cached.cache_clear()

    def install(rules, missing=(), refusing=()):
        forget()
        implementations = {
            name: dispatch.Implementation(
                "lamp_fast.no_such_module" if name in missing else "lamp_fast.ops.reference",
                build_hint="build it",
                limits=lambda call, name=name: "too new" if name in refusing else None,
            )
            for name in ("reference", "first", "second")
        }
        monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "gelu", implementations)
        monkeypatch.setitem(dispatch.RULES, "gelu", rules)

    yield install
    forget()


BOTH = (dispatch.Rule("cpu", "first", "measured"), dispatch.Rule("cpu", "second", "guessed"))


def test_the_first_line_that_can_run_serves(table):
    table(BOTH)
    assert dispatch.pick("gelu", CPU) == ("first", "measured", None)


def test_what_is_missing_or_refuses_gives_way_to_the_next_line_and_is_told(table):
    table(BOTH, missing=["first"])
    name, why, missing = dispatch.pick("gelu", CPU)
    assert (name, why) == ("second", "guessed")
    assert "first" in missing
    assert "build it" in missing
    table(BOTH, refusing=["first"])
    assert dispatch.pick("gelu", CPU) == ("second", "guessed", "first: too new")


def test_lines_of_other_devices_and_calls_do_not_count(table):
    rules = (
        dispatch.Rule("cuda", "first", "other device"),
        dispatch.Rule("cpu", "second", "few keys", lambda call: call.sparse),
    )
    table(rules)
    assert dispatch.pick("gelu", CPU)[0] == "reference"
    sparse = dispatch.CallFacts(CPU.device, CPU.dtype, sparse=True)
    assert dispatch.pick("gelu", sparse)[0] == "second"


def test_only_the_reference_left_warns_once(table):
    table(BOTH, missing=["first", "second"])
    dispatch._warn_once.cache_clear()
    x = torch.ones(3)
    with pytest.warns(RuntimeWarning, match=r"gelu runs the slower reference: first.*build it"):
        ops.gelu(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.gelu(x)


def test_an_explicit_choice_never_gives_way(table):
    table(BOTH, missing=["first"], refusing=["second"])
    for name, words in (("first", "no_such_module"), ("second", "too new"), ("third", "expected")):
        with pytest.raises(InputError, match=f"impl='{name}': gelu: .*{words}"):
            ops.gelu(torch.ones(3), impl=name)


def test_a_preferred_implementation_serves_where_it_can(table):
    table(BOTH, refusing=["second"])
    assert dispatch.pick("gelu", CPU, "reference")[0] == "reference"
    assert dispatch.pick("gelu", CPU, "second")[0] == "first"
    assert dispatch.pick("retrieve", CPU, "second")[0] == dispatch.pick("retrieve", CPU)[0]


def test_prefer_concerns_calls_that_name_nothing():
    query, keys, bias = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(5)
    assert ops.prefer("reference") is None
    try:
        assert dispatch.choose("retrieve", None, query) == "reference"
        ops.retrieve(query, keys, bias, 2, impl="cpp")
    finally:
        assert ops.prefer(None) == "reference"


def test_a_gpu_below_sm_80_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = dispatch.IMPLEMENTATIONS["retrieve"]["cuda"].limits(GPU)
    assert "sm_80" in reason
    assert "sm_75" in reason
    assert "'triton' and 'reference'" in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert dispatch.IMPLEMENTATIONS["retrieve"]["cuda"].limits(GPU) is None


@pytest.mark.parametrize(
    ("op", "call", "words"),
    [
        (
            "retrieve",
            dispatch.CallFacts(GPU.device, GPU.dtype, large=True),
            "256 and k up to 32",
        ),
        (
            "prefix_attention",
            dispatch.CallFacts(GPU.device, GPU.dtype, large=True),
            "width up to 128",
        ),
        ("retrieve", dispatch.CallFacts(GPU.device, torch.float64), "float64"),
        ("prefix_attention", dispatch.CallFacts(GPU.device, torch.float64), "float64"),
    ],
)
def test_kernels_say_what_they_do_not_take(op, call, words):
    assert words in dispatch.IMPLEMENTATIONS[op]["triton"].limits(call)


@pytest.mark.parametrize(
    ("triton", "numpy", "refused"),
    [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.0", "2.5.5", False)],
)
def test_an_old_interpreter_with_a_new_numpy_is_refused(monkeypatch, triton, numpy, refused):
    versions = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr(dispatch.importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch._interpreter_limits.cache_clear()
    try:
        reason = dispatch.IMPLEMENTATIONS["retrieve"]["triton"].limits(CPU)
    finally:
        dispatch._interpreter_limits.cache_clear()
    assert (reason is not None) == refused
    assert not refused or "numpy below 2.4, it is 2.4.0" in reason


def test_every_rule_names_an_implementation_and_every_implementation_has_its_backward():
    for op, rules in dispatch.RULES.items():
        known = dispatch.IMPLEMENTATIONS[op]
        assert {rule.name for rule in rules} <= known.keys()
        for implementation in known.values():
            assert implementation.backward is None or implementation.backward in known


TWICE = {
    "retrieve": calls.retrieve(3, 5, 4, 2),
    "prefix_attention": calls.prefix_attention(4, 2, 1, 3, 2, 4, causal=True),
    "quick_gelu": calls.gelu("quick_gelu", 3, 4),
    "gelu": calls.gelu("gelu", 3, 4),
    "add_layer_norm": calls.add_layer_norm(3, 4),
}


def smooth_outputs(call, impl):
    """A function of the tensors that take a gradient, and those tensors."""
    live = len(call.tensors) - call.frozen

    def outputs(*leaves):
        frozen = [each.to(leaves[0]) for each in call.tensors[live:]]
        results = getattr(ops, call.op)(
            *leaves, *frozen, *call.positional, **call.options, impl=impl
        )
        results = (results,) if isinstance(results, torch.Tensor) else results
        return tuple(each for each in results if each.is_floating_point())

    return outputs, call.tensors[:live]


@pytest.mark.parametrize("op", TWICE)
def test_second_derivatives_of_the_reference_are_right(op):
    outputs, leaves = smooth_outputs(TWICE[op], "reference")
    # torch refuses them for its fused attention.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(outputs, [x.clone().requires_grad_() for x in leaves])


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(
    ("op", "impl"),
    [
        pytest.param(op, impl, marks=under_test.skipped(op, impl))
        for op in TWICE
        for impl in dispatch.IMPLEMENTATIONS[op]
        if impl != "reference"
    ],
)
def test_second_derivatives_of_the_others_are_refused_and_never_zero(op, impl, power):
    """With a gradient from above that is a constant (power 1), or depends on the tensors."""
    outputs, leaves = smooth_outputs(TWICE[op], impl)
    dtype = torch.float32 if under_test.serves(op, impl, torch.float32) else torch.bfloat16
    leaves = [x.to(under_test.device(impl), dtype).requires_grad_() for x in leaves]
    loss = sum(each.pow(power).sum() for each in outputs(*leaves))
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected impl='reference'"):
        sum(each.sum() for each in gradients).backward()


def test_the_package_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from lamp_fast import errors, ops
print(ops.retrieve(torch.randn(2, 3), torch.randn(4, 3), torch.zeros(4), 2)[0].shape)
try:
    ops.gelu(torch.ones(2), impl="triton")
except errors.InputError as error:
    print(error)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    shape, refusal = done.stdout.splitlines()
    assert shape == "torch.Size([2, 2])"
    assert refusal.startswith("impl='triton': gelu: ")
    assert "install triton" in refusal


def test_info_names_every_op_and_how_cuda_was_built(capsys):
    assert info.main(info.InfoConfig()) == 0
    lines = capsys.readouterr().out.splitlines()
    for op in dispatch.IMPLEMENTATIONS:
        assert any(line.startswith(op) for line in lines)
    cuda = [line for line in lines if line.startswith("cuda: ")]
    assert len(cuda) == 1
    assert cuda[0].startswith(("cuda: built for ", "cuda: not built ("))
