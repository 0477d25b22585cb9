"""How the training step of each method grows with the number of classes: a table and a plot.

``python -m benchmarks.methods_growth [--out docs]``. ViT-B/16 with random weights (bfloat16 on a
GPU, float32 on a CPU), B=4, Caltech101's names; a step is forward, loss and backward, in units of
open_clip's own image forward of the batch, which runs before and after each; medians. Dashed lines
compute as the methods' authors do (``--as-published``; LAMP's is ``--path literal``: the equations
as printed), solid ones as this package does, with the same results.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.measure import against, device_name, this_device, write_record
from benchmarks.methods import AS_PUBLISHED, MethodCell
from benchmarks.steps import random_clip
from lamp_fast import cli
from lamp_fast.clip import FrozenClip, Trimming
from lamp_fast.methods import METHODS
from lamp_fast.runs.graph import CapturedStep, CudaRecorder

BATCH = 4
CLASSES = {"cpu": (10, 25, 50, 100), "cuda": (10, 50, 100, 200, 500)}
DISTINCT = Trimming(share_routes=False)


@dataclass(frozen=True)
class Settings:
    """Measure how every method's step grows with the number of classes."""

    out: Path = Path("docs")
    """Folder for methods_growth.png and methods_growth.json."""
    rounds: int = 5
    """Of each point."""
    classes: tuple[int, ...] = ()
    """Numbers of classes; by default 10 to 100 on a CPU, 10 to 500 on a GPU."""


@dataclass(frozen=True)
class Contender:
    """A line of the plot.

    Attributes:
        title: in words.
        colour: a number, shared by the two ways of a method.
        slow: computes as published.
        build: the step for (clip, classes).
    """

    title: str
    colour: int
    slow: bool
    build: Callable[[FrozenClip, int], MethodCell]
    captured: bool = False


@dataclass(frozen=True)
class Point:
    """What was measured of a contender at one number of classes.

    Attributes:
        ratio: to the image forward; None where it did not run.
        seconds: of a step.
        peak_bytes: of GPU memory, the CLIP included.
        refused: why it did not run.
    """

    ratio: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    refused: str = ""


def contenders(device: torch.device) -> list[Contender]:
    """All lines for a device; only a GPU has CUDA graphs."""

    def lamp(**options) -> Callable[[FrozenClip, int], MethodCell]:
        return lambda clip, classes: MethodCell(clip, "lamp", BATCH, classes, DISTINCT, **options)

    def peer(name: str, slow: bool) -> Callable[[FrozenClip, int], MethodCell]:
        trim = Trimming(as_published=slow)
        return lambda clip, classes: MethodCell(clip, name, BATCH, classes, trim)

    lines = [
        Contender("LAMP, text per (image, class)", 0, False, lamp()),
        Contender("LAMP, text per class", 1, False, lamp(text_query="class")),
        Contender("LAMP, literal", 0, True, lamp(path="literal")),
    ]
    if device.type == "cuda":
        graphed = "LAMP, text per (image, class), one graph"
        lines.append(Contender(graphed, 7, False, lamp(), captured=True))
    for colour, name in enumerate(AS_PUBLISHED, 2):
        title = METHODS[name].title
        lines.append(Contender(title, colour, False, peer(name, False)))
        lines.append(Contender(f"{title}, as published", colour, True, peer(name, True)))
    return lines


def measure(clip: FrozenClip, contender: Contender, classes: int, rounds: int) -> Point:
    """Time a contender's step; a GPU's lack of memory is a point that says so."""
    device = next(clip.parameters()).device
    try:
        return _measure(clip, contender, classes, rounds, device)
    except torch.OutOfMemoryError as error:
        return Point(refused=str(error).splitlines()[0])


def _measure(clip, contender, classes, rounds, device) -> Point:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    cell = contender.build(clip, classes)
    run = captured(cell, device) if contender.captured else cell.train
    ratio, seconds = against(cell.image_forward, run, device, rounds)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return Point(ratio, seconds, peak)


def captured(cell: MethodCell, device: torch.device) -> Callable[[], object]:
    """The cell's training step as one CUDA graph; it changes nothing but gradients."""

    def step(images, labels):
        cell.train()
        return {}

    graph = CapturedStep(step, list, CudaRecorder(device))
    return lambda: graph(cell.images, cell.labels)


def draw(title: str, results: dict[str, dict[int, Point]], lines: list[Contender], file: Path):
    """One line a contender, both axes logarithmic."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for line in lines:
        points = {x: each.ratio for x, each in results[line.title].items() if each.ratio}
        style = {"linestyle": "--", "marker": "x"} if line.slow else {"marker": "o"}
        colour = f"C{line.colour}"
        axes.plot([*points], [*points.values()], color=colour, label=line.title, **style)
    ticks = sorted({x for each in results.values() for x in each})
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel="classes C", ylabel="training step / image forward of the batch")
    axes.set_xticks(ticks, [str(each) for each in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside right center")
    figure.savefig(file, dpi=110)


def main(settings: Settings) -> None:
    """Measure every point, print the table, and draw."""
    device = this_device()
    clip, lines = random_clip(device), contenders(device)
    classes = settings.classes or CLASSES[device.type]
    points = [(line, count) for count in classes for line in lines]
    results: dict[str, dict[int, Point]] = {line.title: {} for line in lines}
    for line, count in tqdm(points):
        results[line.title][count] = measure(clip, line, count, settings.rounds)
    rows = [
        [name, *(f"{each.ratio:.2f}" if each.ratio else each.refused for each in found.values())]
        for name, found in results.items()
    ]
    header = ["step / image forward", *(f"C={count}" for count in classes)]
    print(tabulate(rows, header, tablefmt="github", disable_numparse=True))
    steps = {
        title: {count: asdict(each) for count, each in found.items()}
        for title, found in results.items()
    }
    numbers = {"batch": BATCH, "steps": steps}
    write_record(settings.out / "methods_growth.json", device, numbers)
    title = f"Training step of ViT-B/16, B={BATCH}, {device_name(device)}"
    draw(title, results, lines, settings.out / "methods_growth.png")


if __name__ == "__main__":
    cli.run(Settings, main, prog="python -m benchmarks.methods_growth", description=__doc__)
