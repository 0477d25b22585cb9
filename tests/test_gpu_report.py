"""The GPU report: what it does with parts that fail, run out of time or cannot run here."""

import json

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.gpu_report import Part
from lamp_fast.errors import InputError

BENCHMARK = """
import json, sys
file = sys.argv[1].partition("=")[2]
runs = [{"name": "bench_x", "extra_info": {"ours_us": 3.0}}]
json.dump({"benchmarks": runs}, open(file, "w"))
print("a table")
"""

PARTS = {
    "fine": Part(("-c", "print('first'); print('last')"), 60, needs_gpu=False),
    "broken": Part(("-c", "raise SystemExit(3)"), 60, needs_gpu=False),
    "slow": Part(("-c", "import time; time.sleep(60)"), 1, needs_gpu=False),
    "numbers": Part(("-c", BENCHMARK), 60, needs_gpu=False, benchmark=True),
    "gpu": Part(("-c", "print()"), 60),
    "tool": Part(("-c", "print()"), 60, needs_gpu=False, program=("no-such-tool",)),
}


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "PARTS", PARTS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(parts=tuple(PARTS), seconds=470):
        settings = gpu_report.Settings(parts=parts, out=tmp_path / "out", seconds=seconds)
        code = gpu_report.main(settings)
        record = json.loads((tmp_path / "out" / "report.json").read_text())
        return code, record, (tmp_path / "out" / "report.md").read_text()

    return run


def test_every_part_is_told(report):
    code, record, text = report()
    parts = record["parts"]
    assert code == 1
    assert {name: each["state"] for name, each in parts.items()} == {
        "fine": "ok",
        "broken": "failed",
        "slow": "out of time",
        "numbers": "ok",
        "gpu": "skipped",
        "tool": "skipped",
    }
    assert parts["fine"]["output"] == "first\nlast"
    assert parts["broken"]["why"] == "exit code 3"
    assert parts["slow"]["why"] == "stopped after 1 s"
    assert parts["numbers"]["numbers"] == {"bench_x": {"ours_us": 3.0}}
    assert "no-such-tool" in parts["tool"]["why"]
    assert record["machine"]["versions"]["torch"] in text
    assert "| gpu | skipped: torch sees no GPU | 0 |" in text
    assert "## fine\n\n```\nfirst\nlast\n```" in text


def test_parts_run_in_the_reports_order_and_alone_succeed(report):
    code, record, _ = report(("numbers", "fine"))
    assert code == 0
    assert list(record["parts"]) == ["fine", "numbers"]


def test_it_ends_in_time(report):
    _, record, _ = report(("fine", "slow"), seconds=0)
    assert {each["why"] for each in record["parts"].values()} == {"no time was left"}


def test_an_unknown_part_is_refused(report):
    with pytest.raises(InputError, match=r"--parts nothing: expected some of fine"):
        report(("nothing",))


def test_the_real_parts_name_files_that_exist():
    for part in gpu_report.PARTS.values():
        for word in part.command:
            if word.endswith(".py"):
                assert (gpu_report.ROOT / word).is_file(), word
