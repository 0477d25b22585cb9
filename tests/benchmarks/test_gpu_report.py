"""The GPU report: what it does with parts that fail, run out of time or cannot run here."""

import importlib.util
import json
import os

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

INTERRUPTED = """
import os, signal
def bench_first(benchmark):
    benchmark.pedantic(int, rounds=1)
    benchmark.extra_info["ours"] = 3.0
def bench_second(benchmark):
    os.kill(os.getpid(), signal.SIGINT)
"""

PARTS = {
    "fine": Part(("-c", "print('first'); print('last')"), 60, needs_gpu=False),
    "broken": Part(("-c", "raise SystemExit(3)"), 60, needs_gpu=False),
    "slow": Part(("-c", "import time; time.sleep(60)"), 1, needs_gpu=False),
    "plot": Part(
        ("-c", "open(__import__('sys').argv[1] + '/a.png', 'w')", gpu_report.OUT),
        60,
        needs_gpu=False,
        plot="a.png",
    ),
    "numbers": Part(("-c", BENCHMARK), 60, needs_gpu=False, benchmark=True),
    "gpu": Part(("-c", "print()"), 60),
    "tool": Part(("-c", "print()"), 60, needs_gpu=False, program=("no-such-tool",)),
}


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "REPORT_PARTS", PARTS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(parts=tuple(PARTS), seconds=300):
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
        "plot": "ok",
        "numbers": "ok",
        "gpu": "skipped",
        "tool": "skipped",
    }
    assert parts["fine"]["output"] == "first\nlast"
    assert parts["broken"]["why"] == "exit code 3"
    assert parts["slow"]["why"].startswith("interrupted after ")
    assert parts["slow"]["seconds"] < 10
    assert parts["numbers"]["numbers"] == {"bench_x": {"ours_us": 3.0}}
    assert "no-such-tool" in parts["tool"]["why"]
    assert record["machine"]["versions"]["torch"] in text
    assert "| gpu | skipped: torch sees no GPU | 0 |  |" in text
    assert "![a.png](a.png)" in text
    assert "## fine\n\n```\nfirst\nlast\n```" in text


def test_parts_run_in_the_reports_order_and_alone_succeed(report):
    code, record, _ = report(("numbers", "fine"))
    assert code == 0
    assert list(record["parts"]) == ["fine", "numbers"]


def test_it_ends_in_time(report):
    _, record, _ = report(("fine", "slow"), seconds=0)
    assert {each["why"] for each in record["parts"].values()} == {"no time was left"}


def test_what_an_interrupted_benchmark_measured_is_kept(tmp_path, monkeypatch, report):
    for name in [each for each in os.environ if each.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # a run of its own, which measures nothing as somebody's worker
    (tmp_path / "bench_x.py").write_text(INTERRUPTED)
    command = ("-m", "pytest", "-q", "-c", str(tmp_path / "pytest.ini"), "--benchmark-only")
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_functions = bench_*\n")
    part = Part((*command, str(tmp_path / "bench_x.py")), 60, needs_gpu=False, benchmark=True)
    monkeypatch.setitem(PARTS, "benchmark", part)
    _, record, _ = report(("benchmark",))
    (kept,) = record["parts"].values()
    assert kept["why"] == "exit code 2"  # pytest's for an interrupt
    assert kept["numbers"] == {"bench_first": {"ours": 3.0}}


def test_unused_time_goes_to_the_parts_that_follow(monkeypatch, report):
    limits = {}

    def instead(name, part, out, limit):
        limits[name] = limit
        return gpu_report.PartReport("ok")

    monkeypatch.setattr(gpu_report, "run_part", instead)
    report(("fine", "slow", "numbers"), seconds=121)
    assert limits["fine"] == pytest.approx(60, abs=1)
    assert limits["slow"] == pytest.approx(121 / 61, abs=0.1)
    assert limits["numbers"] == pytest.approx(121, abs=1)


def test_clocks_are_those_of_a_busy_gpu(tmp_path):
    samples = tmp_path / "clocks.csv"
    samples.write_text("345, 2619, 30, 0\n1980, 2619, 41, 98\n1755, 2619, 60, 100\n1965, 26")
    assert gpu_report.busy_clocks(samples) == (
        "SM 1868 MHz (least 1755), memory 2619 MHz, up to 60 C"
    )
    assert gpu_report.busy_clocks(tmp_path / "none.csv") == ""


def test_an_unknown_part_is_refused(report):
    with pytest.raises(InputError, match=r"--parts nothing: expected some of fine"):
        report(("nothing",))


def test_the_real_parts_name_files_that_exist():
    for part in gpu_report.REPORT_PARTS.values():
        for word in part.command:
            if word.endswith(".py"):
                assert (gpu_report.ROOT / word).is_file(), word
            if word.startswith(("benchmarks.", "lamp_fast.")):
                assert importlib.util.find_spec(word) is not None, word
