"""Which implementation serves: the table, explicit choices, and what ``info`` says of them."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from lamp_fast import info, ops
from lamp_fast.errors import InputError
from lamp_fast.ops import contracts

CPU = contracts.Call(torch.device("cpu"), torch.float32)
GPU = contracts.Call(torch.device("cuda", 0), torch.bfloat16)


@pytest.fixture
def table(monkeypatch):
    """Stand-in implementations of one op: missing ones fail to import, the others serve."""

    def forget():
        for cached in (contracts.pick, contracts.why_unavailable, contracts.load):
            cached.cache_clear()

    def install(rules, missing=(), refusing=()):
        forget()
        implementations = {
            name: contracts.Implementation(
                "lamp_fast.no_such_module" if name in missing else "lamp_fast.ops.reference",
                build_hint="build it",
                objection=lambda call, name=name: "too new" if name in refusing else None,
            )
            for name in ("reference", "first", "second")
        }
        monkeypatch.setitem(contracts.IMPLEMENTATIONS, "gelu", implementations)
        monkeypatch.setitem(contracts.RULES, "gelu", rules)

    yield install
    forget()


BOTH = (contracts.Rule("cpu", "first", "measured"), contracts.Rule("cpu", "second", "guessed"))


def test_the_first_line_that_can_run_serves(table):
    table(BOTH)
    assert contracts.pick("gelu", CPU) == ("first", "measured", None)


def test_what_is_missing_or_refuses_gives_way_to_the_next_line_and_is_told(table):
    table(BOTH, missing=["first"])
    name, why, missing = contracts.pick("gelu", CPU)
    assert (name, why) == ("second", "guessed")
    assert "first" in missing
    assert "build it" in missing
    table(BOTH, refusing=["first"])
    assert contracts.pick("gelu", CPU) == ("second", "guessed", "first: too new")


def test_lines_of_other_devices_and_calls_do_not_count(table):
    rules = (
        contracts.Rule("cuda", "first", "other device"),
        contracts.Rule("cpu", "second", "few keys", lambda call: call.sparse),
    )
    table(rules)
    assert contracts.pick("gelu", CPU)[0] == "reference"
    sparse = contracts.Call(CPU.device, CPU.dtype, sparse=True)
    assert contracts.pick("gelu", sparse)[0] == "second"


def test_only_the_reference_left_warns_once(table):
    table(BOTH, missing=["first", "second"])
    contracts._warn_once.cache_clear()
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
    assert contracts.pick("gelu", CPU, "reference")[0] == "reference"
    assert contracts.pick("gelu", CPU, "second")[0] == "first"
    assert contracts.pick("retrieve", CPU, "second")[0] == contracts.pick("retrieve", CPU)[0]


def test_prefer_concerns_calls_that_name_nothing():
    query, keys, bias = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(5)
    assert ops.prefer("reference") is None
    try:
        assert contracts.choose("retrieve", None, query.device, query.dtype) == ("reference", None)
        ops.retrieve(query, keys, bias, 2, impl="cpp")
    finally:
        assert ops.prefer(None) == "reference"


def test_a_gpu_below_sm_80_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    objection = contracts.IMPLEMENTATIONS["retrieve"]["cuda"].objection(GPU)
    assert "sm_80" in objection
    assert "sm_75" in objection
    assert "'triton' and 'reference'" in objection
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert contracts.IMPLEMENTATIONS["retrieve"]["cuda"].objection(GPU) is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (contracts.Call(GPU.device, GPU.dtype, large=True), "256"),
        (contracts.Call(GPU.device, torch.float64), "float64"),
    ],
)
def test_kernels_say_what_they_do_not_take(call, words):
    for op in ("retrieve", "prefix_attention"):
        assert words in contracts.IMPLEMENTATIONS[op]["triton"].objection(call)


@pytest.mark.parametrize(
    ("triton", "numpy", "refused"),
    [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.0", "2.5.5", False)],
)
def test_an_old_interpreter_with_a_new_numpy_is_refused(monkeypatch, triton, numpy, refused):
    versions = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr(contracts.importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    contracts._interpreter_limits.cache_clear()
    try:
        reason = contracts.IMPLEMENTATIONS["retrieve"]["triton"].objection(CPU)
    finally:
        contracts._interpreter_limits.cache_clear()
    assert (reason is not None) == refused
    assert not refused or "numpy below 2.4, it is 2.4.0" in reason


def test_every_rule_names_an_implementation_and_every_implementation_has_its_backward():
    for op, rules in contracts.RULES.items():
        known = contracts.IMPLEMENTATIONS[op]
        assert {rule.name for rule in rules} <= known.keys()
        for implementation in known.values():
            assert implementation.backward is None or implementation.backward in known


def test_the_package_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from lamp_fast import ops
print(ops.retrieve(torch.randn(2, 3), torch.randn(4, 3), torch.zeros(4), 2)[0].shape)
try:
    ops.gelu(torch.ones(2), impl="triton")
except ops.InputError as error:
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
    for op in contracts.IMPLEMENTATIONS:
        assert any(line.startswith(op) for line in lines)
    cuda = [line for line in lines if line.startswith("cuda: ")]
    assert len(cuda) == 1
    assert cuda[0].startswith(("cuda: built for ", "cuda: not built ("))
