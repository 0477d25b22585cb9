"""How the training step of each method grows with the number of classes: a table and a plot.

``python -m benchmarks.methods_growth [--out docs]``. ViT-B/16 with random weights (bfloat16 on a
GPU, float32 on a CPU), B=4, Caltech101's names, beyond 100 classes ImageNet's; a step in units of
open_clip's own image forward of the batch, which runs before and after each; medians. Dashed lines
compute as the methods' authors do (``--as-published``; LAMP's is ``--path literal``: the equations
as printed), solid ones as this package does, with the same results.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.measuring.steps import AS_PUBLISHED, Cell, random_clip
from benchmarks.measuring.timing import (
    device_name,
    device_seconds,
    interleave,
    this_device,
    write_record,
)
from benchmarks.plots.growth import draw_methods
from lamp_fast import cli
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.methods import METHODS
from lamp_fast.runs.figures import save_figure
from lamp_fast.runs.graph import CudaRecorder

BATCH = 4
CLASSES = {"cpu": (10, 25, 50, 100), "cuda": (10, 50, 100, 200, 500)}


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
        build: the cell for (clip, classes).
        captured: its step is one CUDA graph.
    """

    title: str
    colour: int
    slow: bool
    build: Callable[[FrozenClip, int], Cell]
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

    def lamp(**options) -> Callable[[FrozenClip, int], Cell]:
        return lambda clip, classes: Cell(clip, BATCH, classes, **options)

    def peer(name: str, slow: bool) -> Callable[[FrozenClip, int], Cell]:
        trim = Trimming(as_published=slow)
        return lambda clip, classes: Cell(clip, BATCH, classes, name, trim=trim)

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
    run = cell.captured(CudaRecorder(device)) if contender.captured else cell.train
    options = {"clock": device_seconds(device), "unit": cell.image_forward}
    time = interleave({"train": run}, rounds, **options)["train"]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return Point(time.ratio, time.median, peak)


def draw(title: str, results: dict[str, dict[int, Point]], lines: list[Contender]) -> Figure:
    """The plot of all points that ran."""
    ratios = {
        name: {count: point.ratio for count, point in points.items() if point.ratio}
        for name, points in results.items()
    }
    styles = {line.title: (line.colour, line.slow) for line in lines}
    return draw_methods(title, ratios, styles)


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
    save_figure(draw(title, results, lines), settings.out / "methods_growth.png")


if __name__ == "__main__":
    cli.run(Settings, main, prog="python -m benchmarks.methods_growth", description=__doc__)
