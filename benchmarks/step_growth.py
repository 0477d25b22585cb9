"""How a LAMP training step grows with classes, batch, name length and layers: a plot and a table.

``python -m benchmarks.step_growth [--out docs]`` (about ten minutes on two CPU cores). Same model
and unit as :mod:`benchmarks.bench_step`: medians of step time over open_clip's image forward of the
same batch, interleaved.
"""

import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.classes import CALTECH101, TEMPLATE
from benchmarks.measure import against
from benchmarks.steps import random_clip
from lamp_fast import cli
from lamp_fast.clip import FrozenClip, Trimming
from lamp_fast.fields import format_layers
from lamp_fast.methods import Lamp
from lamp_fast.methods.lamp import LampSettings

CPU = torch.device("cpu")
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measure how the step grows."""

    out: Path = Path("docs")
    """Folder for step_growth.png and step_growth.json."""
    rounds: int = 3


def measure(clip: FrozenClip, rounds: int, text_query: str, point: dict) -> float:
    """Median ratio of one training step to the image forward."""
    batch, classes, words = point["batch"], point["classes"], point["words"]
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(batch) % classes
    names = [
        " ".join([name, *(WORDS[(index + word) % len(WORDS)] for word in range(words))])
        for index, name in enumerate(CALTECH101[:classes])
    ]
    config = LampSettings(layers=point["layers"], text_query=text_query)
    lamp = Lamp(clip, config, trimming=Trimming(share_routes=False))
    prepared = lamp.prepare(names, TEMPLATE)

    def image_forward():
        with torch.no_grad():
            clip.model.encode_image(images)

    def train():
        lamp.zero_grad(set_to_none=True)
        lamp.step(images, labels, prepared, F.cross_entropy).loss.backward()

    return against(image_forward, train, CPU, rounds)[0]


def main(settings: Settings) -> None:
    """Measure every sweep for both text queries, then draw."""
    torch.manual_seed(0)
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
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "step_growth.json").write_text(
        json.dumps({"base": BASE, "sweeps": SWEEPS, "ratios": results}, indent=2) + "\n"
    )
    draw(results, settings.out / "step_growth.png")


def draw(results: dict[str, dict[str, list[float]]], file: Path) -> None:
    """One panel a sweep, one line a text query."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (axis, values) in zip(
        figure.subplots(1, len(SWEEPS), sharey=True), SWEEPS.items(), strict=True
    ):
        labels = [format_layers(each) if axis == "layers" else str(each) for each in values]
        for query, marker in (("image", "o"), ("class", "s")):
            axes.plot(labels, results[query][axis], marker=marker, label=f"text per {query}")
        axes.set(xlabel=TITLES[axis])
        axes.grid(alpha=0.3)
    most = max(each for lines in results.values() for line in lines.values() for each in line)
    figure.axes[0].set(ylabel="step / image forward", ylim=(0, 1.05 * most))
    figure.axes[0].legend(frameon=False)
    figure.suptitle("LAMP training step, ViT-B/16, float32 (B=4, C=50, layers 3..12 unless swept)")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    cli.run(Settings, main, prog="python -m benchmarks.step_growth", description=__doc__)
