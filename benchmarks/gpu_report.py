"""Build, verify and measure everything on a GPU machine, and write one report.

``python -m benchmarks.gpu_report [--parts kernels steps] [--out gpu_report]``. Needs a checkout and
the package's dependencies, but no network: the build is made in place. Each part is one command
with a time limit; what fails or runs out of time is said in the report and stops nothing else.
Without a GPU the parts that need one are named as skipped.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import torch
import tyro

from lamp_fast import cli, info
from lamp_fast.errors import InputError

ROOT = Path(__file__).parents[1]
GPU_TESTS = (
    "tests/test_on_gpu.py",
    "tests/test_retrieve.py",
    "tests/test_prefix_attention.py",
    "tests/test_gelu.py",
    "tests/test_add_layer_norm.py",
    "tests/test_graph.py",
    "tests/test_resample.py",
    "tests/test_lamp.py",
)
SANITIZED = ("tests/test_on_gpu.py", "-k", "replays and (retrieve or short or tree)")


@dataclass(frozen=True)
class Part:
    """One command of the report.

    Attributes:
        command: what runs, after the interpreter.
        seconds: its time limit.
        needs_gpu: skipped without one.
        benchmark: a pytest-benchmark run, whose numbers the report keeps.
        program: what runs the interpreter, and has to be there.
    """

    command: tuple[str, ...]
    seconds: int
    needs_gpu: bool = True
    benchmark: bool = False
    program: tuple[str, ...] = ()


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def _benchmark(seconds: int, *arguments: str, needs_gpu: bool = True) -> Part:
    command = _pytest("--benchmark-only", "-o", "timeout=0", *arguments)
    return Part(command, seconds, needs_gpu=needs_gpu, benchmark=True)


# In the order in which they run.
PARTS: dict[str, Part] = {
    "build": Part(
        ("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."),
        seconds=120,
        needs_gpu=False,
    ),
    "info": Part(("-m", "lamp_fast.info"), seconds=30, needs_gpu=False),
    "tests": Part(_pytest(*GPU_TESTS), seconds=120),
    "kernels": _benchmark(90, "benchmarks/bench_kernels.py"),
    "steps": _benchmark(90, "benchmarks/bench_gpu_step.py"),
    "methods": _benchmark(60, "benchmarks/bench_methods.py"),
    "memory": _benchmark(40, "benchmarks/bench_memory.py", "-k", "imagenet"),
    "fuzz": Part(_pytest("-m", "slow", "tests/test_fuzz_ops.py"), seconds=60),
    "sanitizer": Part(
        _pytest(*SANITIZED),
        seconds=60,
        program=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
    ),
}


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        state: "ok", "failed", "out of time" or "skipped".
        why: one line where it is not ok.
        seconds: it took.
        output: the last lines that it printed.
        numbers: by benchmark, what it recorded.
    """

    state: str
    why: str = ""
    seconds: float = 0.0
    output: str = ""
    numbers: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """Build, verify and measure on a GPU machine, and write report.json and report.md."""

    parts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PART ...")] = tuple(PARTS)
    """Which parts to run, in the report's own order."""
    out: Path = Path("gpu_report")
    """Folder of the report."""
    seconds: int = 470
    """The whole report ends within this."""


def run_part(name: str, part: Part, out: Path, left: float) -> Outcome:
    """Run one command from the checkout's root, its whole output in ``out``.

    Args:
        name, part: see :data:`PARTS`.
        out: folder of the report.
        left: seconds until the whole report has to end.
    """
    if left <= 0:
        return Outcome("skipped", "no time was left")
    if part.needs_gpu and not torch.cuda.is_available():
        return Outcome("skipped", "torch sees no GPU")
    if part.program and shutil.which(part.program[0]) is None:
        return Outcome("skipped", f"{part.program[0]} is not on PATH")
    record = out / f"{name}.benchmark.json"
    extra = (f"--benchmark-json={record}",) if part.benchmark else ()
    command = (*part.program, sys.executable, *part.command, *extra)
    limit = min(part.seconds, left)
    started = time.perf_counter()
    with open(out / f"{name}.log", "w+", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=limit,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
            state = "ok" if done.returncode == 0 else "failed"
            why = "" if state == "ok" else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            state, why = "out of time", f"stopped after {limit:.0f} s"
        log.flush()
        log.seek(0)
        output = "\n".join(log.read().splitlines()[-120:])
    seconds = time.perf_counter() - started
    return Outcome(state, why, seconds, output, _numbers(record))


def _numbers(record: Path) -> dict[str, dict]:
    """What each benchmark of a pytest-benchmark file recorded beside its own clock."""
    if not record.is_file() or record.stat().st_size == 0:
        return {}
    runs = json.loads(record.read_text(encoding="utf-8"))["benchmarks"]
    return {each["name"]: each["extra_info"] for each in runs}


def machine() -> dict[str, object]:
    """The device, its clocks as they are, and the versions."""
    found: dict[str, object] = {"versions": info.versions(), "cuda_build": info.cuda_line()}
    found["devices"] = [f"{device}: {words}" for device, words in info.devices()]
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv"],
            capture_output=True,
            text=True,
            timeout=30,
        )
        found["nvidia_smi"] = answer.stdout.strip().splitlines()
    return found


def markdown(when: str, facts: dict[str, object], outcomes: dict[str, Outcome]) -> str:
    """The report for people: the machine, a line a part, then each part's output."""
    lines = ["# GPU report", "", f"{when}, `python -m benchmarks.gpu_report`", ""]
    lines += [f"- {name} {version}" for name, version in facts["versions"].items()]
    lines += [f"- {facts['cuda_build']}", *(f"- {each}" for each in facts["devices"])]
    lines += [f"- {each}" for each in facts.get("nvidia_smi", ())]
    lines += ["", "| part | state | seconds |", "|:--|:--|--:|"]
    for name, each in outcomes.items():
        state = f"{each.state}: {each.why}" if each.why else each.state
        lines.append(f"| {name} | {state} | {each.seconds:.0f} |")
    for name, each in outcomes.items():
        if each.output:
            lines += ["", f"## {name}", "", "```", each.output, "```"]
    return "\n".join(lines) + "\n"


def main(settings: Settings) -> int:
    """Run the parts; 0 where none failed."""
    unknown = [each for each in settings.parts if each not in PARTS]
    if unknown:
        raise InputError(f"--parts {unknown[0]}: expected some of {', '.join(PARTS)}")
    out = settings.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    started = time.perf_counter()
    outcomes: dict[str, Outcome] = {}
    for name in (each for each in PARTS if each in settings.parts):
        print(f"{name} ...", flush=True)
        left = settings.seconds - (time.perf_counter() - started)
        shown = outcomes[name] = run_part(name, PARTS[name], out, left)
        print(f"{name}: {shown.state} {shown.why} ({shown.seconds:.0f} s)", flush=True)
        # Written after each part, so that a machine that is taken away leaves what it gave.
        _write(out, when, outcomes)
    print(f"{out / 'report.md'}\n{out / 'report.json'}")
    return int(any(each.state in ("failed", "out of time") for each in outcomes.values()))


def _write(out: Path, when: str, outcomes: dict[str, Outcome]) -> None:
    facts = machine()
    parts = {name: asdict(each) for name, each in outcomes.items()}
    record = {"when": when, "machine": facts, "parts": parts}
    (out / "report.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(when, facts, outcomes), encoding="utf-8")


def run(argv: Sequence[str] | None = None) -> None:
    """The command."""
    cli.run(Settings, main, argv, prog="python -m benchmarks.gpu_report", description=__doc__)


if __name__ == "__main__":
    run()
