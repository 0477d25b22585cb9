"""Where the time of a step goes, part by part, beside the floor of each: a table and a plot.

``python -m benchmarks.step_parts [--out docs]``. A step of ViT-B/16 with random weights (bfloat16
on a GPU, float32 on a CPU) runs under torch's profiler, launched op by op; the time that each op
spends itself, on a GPU that of the kernels which it launches, is added up by part. "waits" is the
rest of the step's time: Python between the ops of a CPU, launches that the GPU waits for.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring.floors import (
    ACTIVATION,
    ATTENTION,
    NORMS,
    OPTIMISER,
    PRODUCTS,
    floor_by_part,
    measure_ceilings,
)
from benchmarks.measuring.steps import Line, random_clip
from benchmarks.measuring.timing import device_name, this_device, time_steps, write_record
from benchmarks.plots.parts import draw_parts
from lamp_fast import cli
from lamp_fast.runs.figures import save_figure

LINES = {
    "cuda": (Line(128, 50, "image"), Line(128, 50, "class"), Line(4, 50, "image")),
    "cpu": (Line(4, 50, "image"), Line(4, 50, "class")),
}
RETRIEVAL, OTHER, WAITS = "retrieval", "other ops", "waits"
# By a word of torch's name for the op; the first that fits.
WORDS = {
    "lamp_fast::retrieve": RETRIEVAL,
    "lamp_fast::prefix_attention": ATTENTION,
    "scaled_dot_product": ATTENTION,
    "flash_attention": ATTENTION,
    "layer_norm": NORMS,
    "lamp_fast::quick_gelu": ACTIVATION,
    "lamp_fast::gelu": ACTIVATION,
    "aten::silu": ACTIVATION,
    "aten::gelu": ACTIVATION,
    "linear_pointwise": PRODUCTS,
    "addmm": PRODUCTS,
    "aten::mm": PRODUCTS,
    "bmm": PRODUCTS,
    "convolution": PRODUCTS,
}
KINDS_OF_WORK = (PRODUCTS, ATTENTION, NORMS, ACTIVATION, RETRIEVAL, OPTIMISER, OTHER, WAITS)


@dataclass(frozen=True)
class Settings:
    """Measure where the time of a step goes."""

    out: Path = Path("docs")
    """Folder for step_parts.png and step_parts.json."""
    steps: int = 3
    """Profiled steps of each line."""


@dataclass(frozen=True)
class Shares:
    """A step's time by part.

    Attributes:
        what: the step in words.
        seconds: by part, of one step.
        floor: by part, of one step; parts without arithmetic or traffic of their own are missing.
        others: the ops of "other ops" that take longest, with their seconds.
    """

    what: str
    seconds: dict[str, float]
    floor: dict[str, float]
    others: dict[str, float]

    def rows(self) -> list[list[str]]:
        """Table rows in milliseconds, largest loss over the floor first."""
        total = sum(self.seconds.values())
        lost = {part: taken - self.floor.get(part, 0.0) for part, taken in self.seconds.items()}
        return [
            [
                self.what,
                part,
                f"{1e3 * self.seconds[part]:.2f}",
                f"{self.seconds[part] / total:.1%}",
                f"{1e3 * self.floor[part]:.2f}" if part in self.floor else "",
                f"{1e3 * lost[part]:.2f}",
            ]
            for part in sorted(lost, key=lost.__getitem__, reverse=True)
        ]


HEADER = ["step", "part", "ms", "share", "floor, ms", "above it, ms"]


def part_of(event: FunctionEvent) -> str:
    """The part that an op of torch's profiler belongs to."""
    above = event
    while above is not None:
        if above.name.startswith("Optimizer."):
            return OPTIMISER
        above = above.cpu_parent
    return next((part for word, part in WORDS.items() if word in event.name), OTHER)


def seconds_by_op(
    run: Callable[[], object], device: torch.device, steps: int
) -> dict[tuple[str, str], float]:
    """Seconds that each op of a part spends itself in one run, a mean over ``steps``."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            run()
        if cuda:
            torch.cuda.synchronize()
    taken: dict[tuple[str, str], float] = {}
    for event in profiler.events():
        # A kernel is listed once more by its own name; its time belongs to the op that launched it.
        if event.device_type != DeviceType.CPU or "::" not in event.name:
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds > 0:
            key = part_of(event), event.name
            taken[key] = taken.get(key, 0.0) + microseconds / 1e6 / steps
    return taken


def measure(
    what: str, run: Callable[[], object], floor: dict[str, float], device: torch.device, steps: int
) -> Shares:
    """Time a step by part.

    Args:
        what: the step in words.
        run: takes it, with whatever graph or optimiser it has.
        floor: seconds by part.
        device: where it runs.
        steps: how many are profiled.
    """
    whole = time_steps(run, device, replays=10 * steps)[0]
    by_op = seconds_by_op(run, device, steps)
    seconds = dict.fromkeys(KINDS_OF_WORK, 0.0)
    for (part, _), taken in by_op.items():
        seconds[part] += taken
    # The profiler slows the host, so that what it counts may exceed a step without it.
    seconds[WAITS] = max(0.0, whole - sum(seconds.values()))
    others = sorted((key for key in by_op if key[0] == OTHER), key=by_op.get, reverse=True)
    return Shares(what, seconds, floor, {key[1]: by_op[key] for key in others[:8]})


def draw(shares: Sequence[Shares], title: str) -> Figure:
    """Two bars a step: measured and floor."""
    bars = {}
    for each in shares:
        bars |= {f"{each.what}\nmeasured": each.seconds, f"{each.what}\nfloor": each.floor}
    return draw_parts(title, bars, KINDS_OF_WORK)


def main(settings: Settings) -> None:
    """Measure every line of this device, print the table, and draw."""
    device = this_device()
    clip, ceilings = random_clip(device), measure_ceilings(device)
    shares = []
    for line in LINES[device.type]:
        cell = line.cell(clip)
        floor = floor_by_part(cell.kernels(train=True), ceilings)
        shares.append(measure(line.what, cell.train, floor, device, settings.steps))
    rows = [row for each in shares for row in each.rows()]
    print(tabulate(rows, HEADER, tablefmt="github", disable_numparse=True))
    numbers = {"ceilings": ceilings.record(), "steps": [asdict(each) for each in shares]}
    write_record(settings.out / "step_parts.json", device, numbers)
    title = f"LAMP training step, ViT-B/16, {device_name(device)}"
    save_figure(draw(shares, title), settings.out / "step_parts.png")


if __name__ == "__main__":
    cli.run(Settings, main, prog="python -m benchmarks.step_parts", description=__doc__)
