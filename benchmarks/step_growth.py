"""How a LAMP training step grows with classes, batch, name length and layers: a plot and a table.

``python -m benchmarks.step_growth [--out docs]`` (about ten minutes on two CPU cores). Same model
and unit as :mod:`benchmarks.bench_step`: medians of step time over open_clip's image forward of the
same batch, interleaved.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.measuring.names import CALTECH101
from benchmarks.measuring.steps import Cell, random_clip
from benchmarks.measuring.timing import CPU, interleave, write_record
from benchmarks.plots.growth import draw_sweeps
from lamp_fast import cli
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.fields import format_layers
from lamp_fast.runs.figures import save_figure

BASE = {"batch": 4, "classes": 50, "words": 0, "layers": tuple(range(3, 13))}
SWEEPS = {
    "classes": [5, 10, 25, 50, 100],
    "batch": [1, 2, 4, 8],
    "words": [0, 2, 4, 8],
    "layers": [tuple(range(first, 13)) for first in (1, 3, 6, 9, 12)],
}
TITLES = {
    "classes": "classes C",
    "batch": "batch B",
    "words": "words added to each class name",
    "layers": "layers with prompts",
}
# Distinct words, so that no two names begin alike with them.
WORDS = ("spotted", "ancient", "wooden", "northern", "giant", "silver", "painted", "lesser")


@dataclass(frozen=True)
class Settings:
    """Measure how the step grows."""

    out: Path = Path("docs")
    """Folder for step_growth.png and step_growth.json."""
    rounds: int = 3


def measure(clip: FrozenClip, rounds: int, text_query: str, point: dict[str, Any]) -> float:
    """Median ratio of one training step to the image forward."""
    names = [
        " ".join([name, *(WORDS[(index + word) % len(WORDS)] for word in range(point["words"]))])
        for index, name in enumerate(CALTECH101[: point["classes"]])
    ]
    lamp = {"layers": point["layers"], "text_query": text_query}
    cell = Cell(clip, point["batch"], point["classes"], names=names, **lamp)
    return interleave({"train": cell.train}, rounds, unit=cell.image_forward)["train"].ratio


def main(settings: Settings) -> None:
    """Measure every sweep for both text queries, then draw."""
    clip = random_clip(CPU)
    points = [
        (query, axis, value)
        for query in ("image", "class")
        for axis, values in SWEEPS.items()
        for value in values
    ]
    known: dict[tuple, float] = {}
    results: dict[str, dict[str, list[float]]] = {"image": {}, "class": {}}
    for query, axis, value in tqdm(points):
        point = BASE | {axis: value}
        key = (query, *point.values())
        if key not in known:
            known[key] = measure(clip, settings.rounds, query, point)
        results[query].setdefault(axis, []).append(known[key])
    numbers = {"base": BASE, "sweeps": SWEEPS, "ratios": results}
    write_record(settings.out / "step_growth.json", CPU, numbers)
    panels = {
        TITLES[axis]: [format_layers(each) if axis == "layers" else str(each) for each in values]
        for axis, values in SWEEPS.items()
    }
    lines = {f"text per {query}": [*ratios.values()] for query, ratios in results.items()}
    title = "LAMP training step, ViT-B/16, float32 (B=4, C=50, layers 3..12 unless swept)"
    save_figure(draw_sweeps(title, panels, lines), settings.out / "step_growth.png")


if __name__ == "__main__":
    cli.run(Settings, main, prog="python -m benchmarks.step_growth", description=__doc__)
