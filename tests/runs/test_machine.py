"""What --precision auto computes in, by what the device multiplies."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lamp_fast import info
from lamp_fast.files import read_json, write_json
from lamp_fast.ops import dispatch
from lamp_fast.runs import machine as runs_machine
from lamp_fast.runs.folder import CONFIG, resumed_defaults
from lamp_fast.runs.machine import auto_precision, resolve_machine
from lamp_fast.runs.settings import MachineConfig

CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16")
BEFORE = Path(__file__).parents[1] / "before" / "lamp"


@pytest.fixture
def cpu_with(monkeypatch):
    # The rest of the suite runs as on a CPU without.
    monkeypatch.setattr(runs_machine, "auto_precision", auto_precision)

    def install(*instructions):
        monkeypatch.setattr(dispatch, "cpu_has", lambda name: name in instructions)
        dispatch.pick.cache_clear()

    yield install
    dispatch.pick.cache_clear()


def test_a_cpu_without_products_of_bfloat16_computes_in_float32(cpu_with):
    cpu_with("avx512_f")
    machine, device = resolve_machine(MachineConfig(device="cpu"))
    assert (machine.precision, device) == ("fp32", torch.device("cpu"))
    assert auto_precision(torch.device("cuda")) == "bf16"


@pytest.mark.parametrize("instruction", CPU_BFLOAT16)
def test_a_cpu_with_products_of_bfloat16_computes_in_it(cpu_with, instruction):
    cpu_with("avx512_f", instruction)
    machine, _ = resolve_machine(MachineConfig(device="cpu"))
    assert machine.precision == "bf16"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("instructions", [(), CPU_BFLOAT16])
def test_an_explicit_precision_is_kept(cpu_with, precision, instructions):
    cpu_with(*instructions)
    machine, _ = resolve_machine(MachineConfig(device="cpu", precision=precision))
    assert machine.precision == precision


@pytest.mark.parametrize(("precision", "instructions"), [("fp32", CPU_BFLOAT16), ("bf16", ())])
def test_a_run_goes_on_as_it_was_begun_whatever_the_cpu(
    cpu_with, tmp_path, precision, instructions
):
    cpu_with(*instructions)
    record = read_json(BEFORE / CONFIG)
    record["settings"]["machine"]["precision"] = precision
    write_json(tmp_path / CONFIG, record)
    config = resumed_defaults({"resume": True, "out": tmp_path})
    machine, _ = resolve_machine(replace(config.machine, device="cpu"))
    assert machine.precision == precision


@pytest.mark.parametrize(
    ("instructions", "words"),
    [((), "no products of bfloat16"), (("amx_bf16",), "products of bfloat16 (AMX_BF16)")],
)
def test_info_says_what_the_cpu_multiplies(cpu_with, capsys, instructions, words):
    cpu_with(*instructions)
    assert info.main(info.InfoConfig()) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("cpu: "))
    assert line.endswith(words)
    precision = "bf16" if instructions else "fp32"
    assert any(line.startswith(f"op in {precision} ") for line in lines)


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [((), "reference"), (("avx512_bf16",), "cpp"), (CPU_BFLOAT16, "reference")],
)
def test_own_attention_serves_bfloat16_where_torch_has_no_better(cpu_with, instructions, expected):
    if dispatch.why_unavailable("prefix_attention", "cpp") is not None:
        pytest.skip("not built")
    cpu_with(*instructions)
    call = dispatch.CallFacts(torch.device("cpu"), torch.bfloat16)
    assert dispatch.pick("prefix_attention", call)[0] == expected
    full = dispatch.CallFacts(torch.device("cpu"), torch.float32)
    assert dispatch.pick("prefix_attention", full)[0] == "reference"
