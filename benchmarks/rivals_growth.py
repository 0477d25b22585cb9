"""Rivals by name beside LAMP, against classes and batch: a table and a plot.

``python -m benchmarks.rivals_growth [--out docs]``: ViT-B/16 with random weights (bfloat16 on a
GPU, float32 on a CPU unless ``--bfloat16``), B = 4 and 32, C = 10, 50, 200 and 1,000; a training
step and an evaluation batch in units of open_clip's image forward of the batch, which runs before
and after each; medians. Rivals go through torch.compile, a minute a point on a CPU at B=4:
``--batches 4 --classes 10 50`` is ten minutes. Points that do not fit the memory of a GPU say so.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.measuring.steps import random_clip
from benchmarks.measuring.timing import (
    device_name,
    device_seconds,
    interleave,
    this_device,
    write_record,
)
from benchmarks.rivals.lines import GRID, LINES, Line
from lamp_fast import cli
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.runs.figures import save_figure

PIECES = ("train", "evaluate")


@dataclass(frozen=True)
class Settings:
    """Measure rivals beside LAMP."""

    out: Path = Path("docs")
    """Folder for rivals_growth.png and rivals_growth.json."""
    rounds: int = 3
    """Of each point."""
    batches: tuple[int, ...] = tuple(dict.fromkeys(batch for batch, _ in GRID))
    classes: tuple[int, ...] = tuple(dict.fromkeys(classes for _, classes in GRID))
    compiled: bool = True
    """Put the rivals through torch.compile."""
    bfloat16: bool = False
    """The frozen CLIP in bfloat16 on a CPU, too."""


@dataclass(frozen=True)
class Point:
    """Ratios to the image forward, and seconds; None where it did not run.

    Attributes:
        train, evaluate: ratios.
        seconds: of both.
        refused: why it did not run.
    """

    train: float | None = None
    evaluate: float | None = None
    seconds: tuple[float, float] | None = None
    refused: str = ""


def measure(
    clip: FrozenClip, line: Line, batch: int, classes: int, rounds: int, compiled: bool
) -> Point:
    """One point; a GPU's lack of memory is a point that says so."""
    device = next(clip.parameters()).device
    torch.compiler.reset()  # of no use to another size, and it holds memory
    try:
        pieces, unit = line.pieces(clip, batch, classes, compiled=compiled)
        times = interleave(pieces, rounds, clock=device_seconds(device), unit=unit)
    except torch.OutOfMemoryError as error:
        return Point(refused=str(error).splitlines()[0])
    trained, evaluated = (times[piece] for piece in PIECES)
    return Point(trained.ratio, evaluated.ratio, (trained.median, evaluated.median))


def draw(title: str, results: Mapping[str, Mapping[tuple[int, int], Point]]) -> Figure:
    """A panel a batch size and piece; one line each, both axes logarithmic; rivals are dashed."""
    batches = sorted({batch for found in results.values() for batch, _ in found})
    rivals = {line.title for line in LINES if line.rival}
    figure = Figure(figsize=(4.6 * len(batches), 7.2), layout="constrained")
    panels = figure.subplots(len(PIECES), len(batches), squeeze=False)
    ticks = sorted({classes for found in results.values() for _, classes in found})
    for axes_row, piece in zip(panels, PIECES, strict=True):
        for axes, batch in zip(axes_row, batches, strict=True):
            for colour, (name, found) in enumerate(results.items()):
                points = {
                    classes: getattr(point, piece)
                    for (size, classes), point in found.items()
                    if size == batch and not point.refused
                }
                style = {"linestyle": "--", "marker": "x"} if name in rivals else {"marker": "o"}
                label = name if axes is panels[0][0] else None
                axes.plot([*points], [*points.values()], color=f"C{colour}", label=label, **style)
            axes.set(xscale="log", yscale="log", title=f"{piece}, B={batch}", xlabel="classes C")
            axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
        axes_row[0].set(ylabel="/ image forward of the batch")
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure


def table(results: Mapping[str, Mapping[tuple[int, int], Point]]) -> str:
    """A row a line and piece, a column a size."""
    sizes = list(dict.fromkeys(size for found in results.values() for size in found))
    rows = [
        [f"{name}: {piece}", *(_cell(found[size], piece) for size in sizes)]
        for name, found in results.items()
        for piece in PIECES
    ]
    header = ["/ image forward", *(f"B={batch}, C={classes:,}" for batch, classes in sizes)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def _cell(point: Point, piece: str) -> str:
    return point.refused or f"{getattr(point, piece):.2f}"


def main(settings: Settings) -> None:
    """Measure every point, print the table, and draw."""
    device = this_device()
    low = settings.bfloat16 or device.type == "cuda"
    clip = random_clip(device, torch.bfloat16 if low else torch.float32)
    sizes = [(batch, classes) for batch in settings.batches for classes in settings.classes]
    results: dict[str, dict[tuple[int, int], Point]] = {line.title: {} for line in LINES}
    for (batch, classes), line in tqdm([(size, line) for size in sizes for line in LINES]):
        compiled = settings.compiled and line.rival
        point = measure(clip, line, batch, classes, settings.rounds, compiled)
        results[line.title][batch, classes] = point
        # An interrupted run leaves no table, but what it has measured.
        cells = ", ".join(f"{piece} {_cell(point, piece)}" for piece in PIECES)
        tqdm.write(f"{line.title} B={batch} C={classes:,}: {cells}", file=sys.stderr)
    print(table(results))
    steps = {
        name: [{"batch": b, "classes": c, **asdict(point)} for (b, c), point in found.items()]
        for name, found in results.items()
    }
    numbers = {"dtype": str(clip.dtype), "compiled": settings.compiled, "steps": steps}
    write_record(settings.out / "rivals_growth.json", device, numbers)
    how = "rivals compiled" if settings.compiled else "rivals not compiled"
    title = f"ViT-B/16, {str(clip.dtype)[6:]}, {device_name(device)}, {how}"
    save_figure(draw(title, results), settings.out / "rivals_growth.png")


if __name__ == "__main__":
    cli.run(Settings, main, prog="python -m benchmarks.rivals_growth", description=__doc__)
