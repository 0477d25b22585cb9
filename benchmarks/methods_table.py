"""Accuracy of every method, side by side: ``python -m benchmarks.methods_table --root DIR``.

Trains each method with its published settings on digits and Caltech101 over the carried CLIP, for
two imbalance ratios and five seeds, and prints one table of means and standard deviations. A run
that has finished is not run again, so the command can be stopped and goes on. To fit two cores,
Caltech101 gets a twentieth of every method's epochs, at least 1, and its pictures, of which the
carried CLIP sees 32 x 32, are first copied at a shorter side of 64. CLIP-LoRA and 2SFS, whose
length is a number of steps a shot, get a tenth of it on digits: of so few pictures the whole is
thousands of epochs.
"""

import contextlib
import io
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from lamp_fast import cli, train
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.data.catalog import CATALOG
from lamp_fast.errors import InputError
from lamp_fast.methods import METHODS
from lamp_fast.methods.base import Method
from lamp_fast.runs import config as settings
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.folder import CONFIG, RESULT

# Their epochs are over features, and cost next to nothing.
WHOLE = ("lfa", "tip-f", "clip-adapter", "zs-lp", "clap", "prolip")
SHORTER_SIDE = 64
MARKS = ("<!-- methods_table -->", "<!-- end of methods_table -->")
COLUMNS = {"acc_base": "acc base", "acc_new": "acc new", "hm_a": "HM-A", "hm_m": "HM-M"}


@dataclass(frozen=True)
class TableConfig:
    """Train what is missing and print the table."""

    root: Path | None = None
    """The folder with caltech-101/; without it digits alone."""
    out: Path = Path("runs/methods")
    """Where the runs go."""
    data: tuple[str, ...] = ("digits", "caltech101")
    imb: tuple[float, ...] = (50.0, 10.0)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    methods: tuple[str, ...] = tuple(METHODS)
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the frozen CLIP computes in; runs of both do not share --out."""
    train: bool = True
    """Off: print what is there."""
    docs: Path | None = None
    """Also put the table into this page, between its two marks."""


def run_config(
    data: str, root: Path | None, imb: float, method: str, seed: int, precision: str = "fp32"
) -> TrainConfig:
    """The settings of one run."""
    clip = ClipConfig("tiny")
    config = settings.default_config({"method": method, "data": data, "clip": clip.clip})
    digits = data == "digits"
    if config.optim.epochs is None:
        steps = config.own.steps_per_shot // (10 if digits else 20)
        config = replace(config, own=replace(config.own, steps_per_shot=steps))
    elif not digits and method not in WHOLE:
        epochs = max(1, config.optim.epochs // 20)
        config = replace(config, optim=replace(config.optim, epochs=epochs))
    return replace(
        config,
        seed=seed,
        clip=clip,
        data=replace(config.data, data=data, root=None if digits else root, imb=imb),
        machine=replace(config.machine, device="cpu", precision=precision, threads=1),
    )


def small_copy(root: Path, target: Path) -> Path:
    """Copy Caltech101 with its pictures scaled down, once; the root of the copy."""
    layout = CATALOG["caltech101"]
    source, copy = root / layout.folder, target / layout.folder
    split_file = copy / layout.split_file
    if split_file.is_file():
        return target
    split = json.loads((source / layout.split_file).read_text())
    for part in split.values():
        for name, _, _ in part:
            file = copy / layout.images / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(source / layout.images / name) as image:
                scale = SHORTER_SIDE / min(image.size)
                size = [max(SHORTER_SIDE, round(side * scale)) for side in image.size]
                image.resize(size, Image.Resampling.BICUBIC).save(file, quality=95)
    split_file.write_text(json.dumps(split))
    return target


def finished(folder: Path) -> bool:
    return (folder / RESULT).is_file()


def check_precision(folder: Path, precision: str) -> None:
    """A finished run computed in what is asked for.

    Raises:
        InputError: it did not.
    """
    done = json.loads((folder / CONFIG).read_text())["settings"]["machine"]["precision"]
    if done != precision:
        raise InputError(f"--precision {precision}: {folder} is in {done}; expected another --out")


def train_missing(runs: dict[tuple, Path], root: Path | None, precision: str) -> None:
    """Train, in this process, every run that has no result."""
    for (data, imb, method, seed), folder in tqdm(runs.items()):
        if finished(folder):
            continue
        config = run_config(data, root, imb, method, seed, precision)
        config = replace(config, out=folder, overwrite=folder.exists())
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = train.main(config)
        if code:
            raise SystemExit(f"{folder}: exit code {code}")


def rows_of(runs: dict[tuple, Path]) -> list[list[Any]]:
    """Mean and standard deviation over seeds, a row a data set, imbalance ratio and method."""
    values: dict[tuple, list[dict]] = defaultdict(list)
    for (data, imb, method, _), folder in runs.items():
        if not finished(folder):
            continue
        # Zero-shot is the first row of every run; a method's own come behind it.
        found = json.loads((folder / RESULT).read_text())
        for row in found if method == "zeroshot" else found[1:]:
            epochs = json.loads((folder / CONFIG).read_text())["settings"]["optim"]
            shown = 0 if METHODS[method].load().step is Method.step else epochs["epochs"]
            values[data, imb, row["name"]].append({**row, "epochs": shown})
    table = []
    for (data, imb, name), results in values.items():
        cells = [data, f"{imb:g}", name, results[0]["epochs"], f"{results[0]['parameters']:,}"]
        for column in COLUMNS:
            if results[0][column] is None:
                cells.append("n/a")
                continue
            percents = [100 * row[column] for row in results]
            spread = f" ± {statistics.pstdev(percents):.2f}" if len(percents) > 1 else ""
            cells.append(f"{statistics.mean(percents):.2f}{spread}")
        table.append([*cells, len(results)])
    return table


def main(config: TableConfig) -> int:
    root = None if config.root is None else small_copy(config.root, config.out / "pictures")
    runs = {
        (data, imb, method, seed): config.out / f"{data}-imb{imb:g}-{method}-seed{seed}"
        for data in config.data
        if data == "digits" or root is not None
        for seed in config.seeds
        for imb in config.imb
        for method in config.methods
    }
    for folder in filter(finished, runs.values()):
        check_precision(folder, config.precision)
    if config.train:
        train_missing(runs, root, config.precision)
    order = {key: at for at, key in enumerate(dict.fromkeys((d, i) for d, i, _, _ in runs))}
    rows = sorted(rows_of(runs), key=lambda row: order[row[0], float(row[1])])
    header = ["data", "imb", "method", "epochs", "parameters", *COLUMNS.values(), "seeds"]
    table = tabulate(rows, header, tablefmt="github", disable_numparse=True)
    print(table)
    if config.docs is not None:
        before, _, rest = config.docs.read_text().partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        config.docs.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")
    return 0


if __name__ == "__main__":
    cli.run(TableConfig, main, sys.argv[1:], prog="python -m benchmarks.methods_table")
