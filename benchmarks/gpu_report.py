"""Build, verify and measure everything on a GPU machine, and write one report.

``python -m benchmarks.gpu_report [--parts kernels steps] [--out gpu_report]``. Needs a checkout and
the package's dependencies, but no network: the build is made in place. Each part is one command
and gets its share of the time that is left; one that needs longer is interrupted as by Ctrl-C, so
that what it has measured is kept. What fails or runs out of time is said in the report and stops
nothing else. Without a GPU the parts that need one are named as skipped. ``--parts NAME --seconds
600`` gives all the time to one.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import torch
import tyro

from lamp_fast import cli, info
from lamp_fast.errors import InputError

ROOT = Path(__file__).parents[1]
OUT = "OUT"
GPU_TESTS = (
    "tests/ops/test_on_gpu.py",
    "tests/ops/test_retrieve.py",
    "tests/ops/test_prefix_attention.py",
    "tests/ops/test_gelu.py",
    "tests/ops/test_add_layer_norm.py",
    "tests/runs/test_graph.py",
    "tests/data/test_resample.py",
    "tests/methods/test_lamp.py",
)
SANITIZED = ("tests/ops/test_on_gpu.py", "-k", "replays and (retrieve or short or tree)")


@dataclass(frozen=True)
class Part:
    """One command of the report.

    Attributes:
        command: what runs, after the interpreter; OUT stands for the report's folder.
        seconds: its share of the time of a whole report.
        needs_gpu: skipped without one.
        benchmark: a pytest-benchmark run, whose numbers the report keeps.
        program: what runs the interpreter, and has to be there.
        plot: a picture that it leaves in the report's folder.
    """

    command: tuple[str, ...]
    seconds: int
    needs_gpu: bool = True
    benchmark: bool = False
    program: tuple[str, ...] = ()
    plot: str = ""


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def _benchmark(seconds: int, *arguments: str, needs_gpu: bool = True) -> Part:
    command = _pytest("--benchmark-only", *arguments)
    return Part(command, seconds, needs_gpu=needs_gpu, benchmark=True)


# In the order in which they run.
REPORT_PARTS: dict[str, Part] = {
    "build": Part(
        ("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."),
        seconds=60,
        needs_gpu=False,
    ),
    "info": Part(("-m", "lamp_fast.info"), seconds=15, needs_gpu=False),
    "tests": Part(_pytest(*GPU_TESTS), seconds=90),
    "kernels": _benchmark(90, "benchmarks/bench_kernels.py"),
    "steps": _benchmark(50, "benchmarks/bench_gpu_step.py"),
    "shares": Part(
        ("-m", "benchmarks.step_parts", "--out", OUT), seconds=20, plot="step_parts.png"
    ),
    "methods": Part(
        ("-m", "benchmarks.methods_growth", "--out", OUT), seconds=40, plot="methods_growth.png"
    ),
    "rivals": Part(
        ("-m", "benchmarks.rivals_growth", "--out", OUT, "--classes", "10", "50"),
        seconds=90,
        plot="rivals_growth.png",
    ),
    "memory": _benchmark(20, "benchmarks/bench_memory.py", "--all", "-k", "imagenet or largest"),
    "fuzz": Part(_pytest("-m", "slow", "tests/ops/test_fuzz_ops.py"), seconds=35),
    "sanitizer": Part(
        _pytest(*SANITIZED),
        seconds=30,
        program=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
    ),
}
GRACE = 15
"""Seconds that an interrupted part has to write down what it measured."""


@dataclass
class PartReport:
    """What became of a part.

    Attributes:
        state: "ok", "failed", "out of time" or "skipped".
        why: one line where it is not ok.
        seconds: it took.
        clocks: of the GPU while it was busy, in words.
        output: the last lines that it printed.
        numbers: by benchmark, what it recorded.
    """

    state: str
    why: str = ""
    seconds: float = 0.0
    clocks: str = ""
    output: str = ""
    numbers: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """Build, verify and measure on a GPU machine, and write report.json and report.md."""

    parts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PART ...")] = tuple(REPORT_PARTS)
    """Which parts to run, in the report's own order."""
    out: Path = Path("gpu_report")
    """Folder of the report."""
    seconds: int = 540
    """The whole report ends within this and the quarter of a minute that an interrupted part has to
    write down what it measured."""


def run_part(name: str, part: Part, out: Path, limit: float) -> PartReport:
    """Run one command from the checkout's root, its whole output in ``out``.

    Args:
        name, part: see :data:`REPORT_PARTS`.
        out: folder of the report.
        limit: seconds until it is interrupted.
    """
    if limit <= 0:
        return PartReport("skipped", "no time was left")
    if part.needs_gpu and not torch.cuda.is_available():
        return PartReport("skipped", "torch sees no GPU")
    if part.program and shutil.which(part.program[0]) is None:
        return PartReport("skipped", f"{part.program[0]} is not on PATH")
    record = out / f"{name}.benchmark.json"
    extra = (f"--benchmark-json={record}",) if part.benchmark else ()
    words = (str(out) if word == OUT else word for word in part.command)
    command = (*part.program, sys.executable, *words, *extra)
    log = out / f"{name}.log"
    started = time.perf_counter()
    with sampled_clocks(out / f"{name}.clocks.csv") as clocks:
        code = run_command(command, log, limit)
    seconds = time.perf_counter() - started
    state = {None: "out of time", 0: "ok"}.get(code, "failed")
    why = {"ok": "", "failed": f"exit code {code}"}.get(state, f"interrupted after {limit:.0f} s")
    output = "\n".join(log.read_text(encoding="utf-8").splitlines()[-120:])
    return PartReport(state, why, seconds, busy_clocks(clocks), output, _numbers(record))


def run_command(command: Sequence[str], log: Path, limit: float) -> int | None:
    """Run a command with its output in a file: its exit code; None where it had to be interrupted.

    It is interrupted as by Ctrl-C, and what is left of it ended :data:`GRACE` seconds later.
    """
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return None
        finally:
            # Also what it started in turn, such as compilers.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def sampled_clocks(file: Path) -> Iterator[Path]:
    """Write the GPU's clocks down twice a second, where nvidia-smi is there to read them."""
    if shutil.which("nvidia-smi") is None:
        yield file
        return
    query = "clocks.sm,clocks.mem,temperature.gpu,utilization.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-lms", "500"]
    with open(file, "w", encoding="utf-8") as samples:
        process = subprocess.Popen(command, stdout=samples, stderr=subprocess.DEVNULL)
        try:
            yield file
        finally:
            process.kill()
            process.wait()


def busy_clocks(file: Path) -> str:
    """The samples of :func:`sampled_clocks` in words, those of the first GPU's busy moments."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with suppress(ValueError):  # a line that was being written, or a number that it lacks
            multiprocessor, memory, temperature, busy = map(int, line.split(","))
            if busy > 0:
                rows.append((multiprocessor, memory, temperature))
    if not rows:
        return ""
    multiprocessor, memory, temperature = zip(*rows, strict=True)
    return (
        f"SM {statistics.median(multiprocessor):.0f} MHz (least {min(multiprocessor)}),"
        f" memory {statistics.median(memory):.0f} MHz, up to {max(temperature)} C"
    )


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


def markdown(when: str, facts: dict[str, object], outcomes: dict[str, PartReport]) -> str:
    """The report for people: the machine, a line a part, plots, then each part's output."""
    lines = ["# GPU report", "", f"{when}, `python -m benchmarks.gpu_report`", ""]
    lines += [f"- {name} {version}" for name, version in facts["versions"].items()]
    lines += [f"- {facts['cuda_build']}", *(f"- {each}" for each in facts["devices"])]
    lines += [f"- {each}" for each in facts.get("nvidia_smi", ())]
    lines += ["", "| part | state | seconds | clocks while busy |", "|:--|:--|--:|:--|"]
    for name, each in outcomes.items():
        state = f"{each.state}: {each.why}" if each.why else each.state
        lines.append(f"| {name} | {state} | {each.seconds:.0f} | {each.clocks} |")
    for name, each in outcomes.items():
        plot = REPORT_PARTS[name].plot
        if plot and each.state == "ok":
            lines += ["", f"![{plot}]({plot})"]
    for name, each in outcomes.items():
        if each.output:
            lines += ["", f"## {name}", "", "```", each.output, "```"]
    return "\n".join(lines) + "\n"


def main(settings: Settings) -> int:
    """Run the parts; 0 where none failed."""
    unknown = [each for each in settings.parts if each not in REPORT_PARTS]
    if unknown:
        raise InputError(f"--parts {unknown[0]}: expected some of {', '.join(REPORT_PARTS)}")
    out = settings.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    started = time.perf_counter()
    outcomes: dict[str, PartReport] = {}
    chosen = [name for name in REPORT_PARTS if name in settings.parts]
    for at, name in enumerate(chosen):
        print(f"{name} ...", flush=True)
        left = settings.seconds - (time.perf_counter() - started)
        still_to_run = sum(REPORT_PARTS[each].seconds for each in chosen[at:])
        limit = left * REPORT_PARTS[name].seconds / still_to_run
        shown = outcomes[name] = run_part(name, REPORT_PARTS[name], out, limit)
        print(f"{name}: {shown.state} {shown.why} ({shown.seconds:.0f} s)", flush=True)
        # Written after each part, so that a machine that is taken away leaves what it gave.
        _write(out, when, outcomes)
    print(f"{out / 'report.md'}\n{out / 'report.json'}")
    return int(any(each.state in ("failed", "out of time") for each in outcomes.values()))


def _write(out: Path, when: str, outcomes: dict[str, PartReport]) -> None:
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
