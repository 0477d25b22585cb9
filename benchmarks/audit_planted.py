"""How many planted errors an audit finds: ``python -m benchmarks.audit_planted --data digits``.

Writes the pictures of a data set into a folder, where a share of the training pictures has another
class and resized copies of a share of the test pictures are in training, and runs
``python -m lamp_fast.data --audit`` over it. Precision is the share that was planted of the labels
that are suspected in training, and of the copies that are found there; what was wrong or twice in
the data set before counts as a false alarm.
"""

import csv
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from tabulate import tabulate
from torchvision.transforms.v2.functional import to_pil_image

from lamp_fast import cli
from lamp_fast.audit.auditing import TABLE, audit
from lamp_fast.audit.settings import AuditConfig
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.data.entries import SPLIT_PARTS
from lamp_fast.data.settings import DataConfig
from lamp_fast.data.sources import DataSource
from lamp_fast.fields import Bounds, Seed, validate
from lamp_fast.runs.experiment import find_source
from lamp_fast.runs.settings import MachineConfig

# A copy has between these shares of a side, and is saved as JPEG.
SMALLEST, LARGEST, QUALITY = 0.5, 0.9, 75


@dataclass(frozen=True)
class PlantedConfig:
    """Plant errors, audit, and print precision and recall."""

    share: Annotated[float, Bounds(above=0, below=0.5)] = 0.05
    """Of the training pictures with another class, and of the test pictures that are copied."""
    shorter_side: Annotated[int, Bounds(1, 4096)] = 64
    """Pictures are scaled to this before anything is planted: less to read, and of those that are
    smaller (digits has 8 x 8) a copy then still shows what is in them."""
    out: Path | None = None
    """Keep the pictures and what was found here."""
    seed: Seed = 1
    data: DataConfig = field(default_factory=DataConfig)
    looks: AuditConfig = field(default_factory=AuditConfig)
    clip: ClipConfig = field(default_factory=lambda: ClipConfig(clip="tiny"))
    machine: MachineConfig = field(default_factory=MachineConfig)


@dataclass(frozen=True)
class Planted:
    """Paths of pictures with another class, with the right one, and of copies, with the test
    picture."""

    wrong: dict[str, str]
    copies: dict[str, str]


def plant(source: DataSource, root: Path, share: float, shorter_side: int, seed: int) -> Planted:
    """Write the pictures of a data set below ``root``, a folder a part, with errors."""
    rng = np.random.default_rng(seed)
    names = [name.replace(" ", "_").replace("/", "_") for name in source.classnames]
    planted = Planted({}, {})
    count = len(source.train)
    wrong = set(rng.choice(count, round(share * count), replace=False).tolist())
    copied = set(
        rng.choice(len(source.test), round(share * len(source.test)), replace=False).tolist()
    )
    for part in SPLIT_PARTS:
        pictures = getattr(source, part)
        for row, label in enumerate(pictures.labels.tolist()):
            image = _scaled(to_pil_image(pictures.load(row)), shorter_side)
            given = label
            if part == "train" and row in wrong:
                given = (label + int(rng.integers(1, len(names)))) % len(names)
            path = f"{part}/{names[given]}/{row:06d}.png"
            _save(image, root / path)
            if given != label:
                planted.wrong[path] = names[label]
            if part == "test" and row in copied:
                size = rng.uniform(SMALLEST, LARGEST)
                small = image.resize([max(1, round(size * side)) for side in image.size])
                copy = f"train/{names[label]}/copy_{row:06d}.jpg"
                _save(small, root / copy)
                planted.copies[copy] = path
    return planted


def _scaled(image: Image.Image, shorter_side: int) -> Image.Image:
    scale = shorter_side / min(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size])


def _save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, quality=QUALITY)


def score(table: Path, planted: Planted) -> list[list[str]]:
    """Rows of what was planted, found, planted and found, precision and recall."""
    with open(table, newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["part"] == "train"]
    labels = {row["path"] for row in rows if row["kind"] == "label"}
    copies = {row["path"] for row in rows if row["kind"] == "leak"}
    result = []
    for title, found, there in (
        ("wrong labels", labels, planted.wrong.keys()),
        ("resized copies", copies, planted.copies.keys()),
    ):
        hit = len(found & there)
        precision = f"{hit / len(found):.2f}" if found else "-"
        recall = f"{hit / len(there):.2f}"
        result.append([title, str(len(there)), str(len(found)), str(hit), precision, recall])
    return result


def main(config: PlantedConfig) -> int:
    """Plant, audit, print."""
    validate(config)
    source = find_source(config.data)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) if config.out is None else config.out
        root, found = out / "pictures", out / "audit"
        planted = plant(source, root, config.share, config.shorter_side, config.seed)
        data = DataConfig(data="folder", root=root)
        audit(found, data, config.looks, config.clip, config.machine, config.seed)
        rows = score(found / TABLE, planted)
    header = ["", "planted", "found", "both", "precision", "recall"]
    print(tabulate(rows, header, disable_numparse=True))
    return 0


if __name__ == "__main__":
    cli.run(
        PlantedConfig,
        main,
        sys.argv[1:],
        prog="python -m benchmarks.audit_planted",
        description=__doc__,
    )
