"""LAMP's readings and parts on data that chose nothing: ``python -m benchmarks.readings``.

The paper leaves open what phi is and what the similarity loss moves. This trains LAMP under each of
the four readings, without each of its parts, with Eq. 9's printed sign, with logit adjustment and
with a larger load-balancing step, on drawn letters under a shift of domain
(:mod:`benchmarks.letters`) over the carried CLIP: preset ``tiny`` as it is, imbalance ratios 10 and
50, five seeds. It prints harmonic means with paired tests over seeds, and what load balancing did.
A run that has finished is not run again; several processes share the runs.
"""

import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.letters import letters
from lamp_fast import cli
from lamp_fast.data.benchmark import build_benchmark
from lamp_fast.data.sources import DataSource
from lamp_fast.errors import InputError
from lamp_fast.files import write_json
from lamp_fast.runs import config as settings
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.experiment import assemble
from lamp_fast.runs.figures import save_figure
from lamp_fast.runs.folder import LOCK
from lamp_fast.runs.scoring import evaluate_rows
from lamp_fast.runs.stats import mean, paired_test, spread
from lamp_fast.runs.trainer import Trainer

PRESET = "mlp, keys (the preset)"
"""What every other row is compared with."""

# What each row changes of the preset: settings of LAMP, or of the optimiser.
READINGS: dict[str, dict[str, Any]] = {
    PRESET: {},
    "linear, keys": {"phi": "linear"},
    "mlp, both": {"similarity_gradient": "both"},
    "linear, both": {"phi": "linear", "similarity_gradient": "both"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "without LBO": {"lbo": False},
    "without MSP": {"msp": False},
    "without MPP": {"mpp": False},
    "without the similarity loss": {"beta": 0.0},
    "Eq. 9's printed sign": {"lbo_sign": "printed"},
    "gamma 5e-3": {"gamma": 5e-3},
    "with logit adjustment": {"logit_adjustment": True},
    "without MSP, with logit adjustment": {"msp": False, "logit_adjustment": True},
}
ROWS = READINGS | VARIANTS
# For scale: other methods with their published settings, by name.
OTHERS = ("coop", "maple", "tcp", "mma", "lfa")
ZERO_SHOT = "zero-shot"
METRICS = {"acc_base": "acc base", "acc_new": "acc new", "hm_a": "HM-A", "hm_m": "HM-M"}

# Pictures a class before the long tail: the fewest that realise a ratio of 50.
CAP = 50
# Rows whose load the second half of the page shows.
GAMMAS = {"gamma 0": "without LBO", "gamma 5e-4": PRESET, "gamma 5e-3": "gamma 5e-3"}
MARKS = ("<!-- readings -->", "<!-- end of readings -->")


@dataclass(frozen=True)
class ReadingsConfig:
    """Train what is missing and print the page's tables."""

    out: Path = Path("runs/readings")
    """Where the runs' results go."""
    imb: tuple[float, ...] = (10.0, 50.0)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    rows: tuple[str, ...] = (*ROWS, *OTHERS)
    train: bool = True
    """Off: print what is there."""
    docs: Path | None = None
    """Also put tables and picture into this folder's readings.md and readings.png."""


@dataclass(frozen=True)
class Run:
    """One row at one imbalance ratio and seed."""

    row: str
    imb: float
    seed: int

    def file(self, out: Path) -> Path:
        """Where its result goes."""
        name = "".join(each if each.isalnum() else "-" for each in self.row)
        return out / f"{name}-imb{self.imb:g}-seed{self.seed}.json"


def run_config(run: Run) -> TrainConfig:
    """The preset's settings with what the row changes."""
    method = run.row if run.row in OTHERS else "lamp"
    config = settings.default_config({"method": method})
    changes = dict(ROWS.get(run.row, {}))
    adjustment = changes.pop("logit_adjustment", False)
    return replace(
        config,
        seed=run.seed,
        own=replace(config.own, **changes),
        optim=replace(config.optim, logit_adjustment=adjustment),
        machine=replace(config.machine, device="cpu", precision="fp32", threads=1),
        trim=replace(config.trim, block=1 << 16),
    )


def train(run: Run, source: DataSource, folder: Path) -> dict[str, Any]:
    """Train and score one run; its checkpoints go into ``folder``.

    Returns:
        The table's rows of zero-shot and LAMP, and every epoch's log.
    """
    benchmark = build_benchmark(
        source, split="base-new", imb=run.imb, cap=CAP, shots=None, seed=run.seed
    )
    experiment = assemble(run_config(run), (benchmark, (), source.name))
    trainer = Trainer(experiment, folder)
    trainer.run()
    rows = evaluate_rows(experiment, 0.0, adapted=False)
    return {
        "rows": [each.row(benchmark) for each in rows],
        "history": trainer.progress.history,
        "data": benchmark.describe(),
    }


def train_missing(runs: Sequence[Run], out: Path) -> None:
    """Train every run that has no result and that no other process is at."""
    source = letters()
    for run in tqdm(runs, desc="runs"):
        file = run.file(out)
        folder = file.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout), FileLock(folder / LOCK, timeout=0):
            if not file.is_file():
                with contextlib.redirect_stderr(io.StringIO()):
                    result = train(run, source, folder)
                write_json(file, result)


def results(runs: Sequence[Run], out: Path) -> dict[Run, dict[str, Any]]:
    """What has finished."""
    return {run: json.loads(run.file(out).read_text()) for run in runs if run.file(out).is_file()}


def scores(found: Mapping[Run, dict], row: str, imb: float, metric: str) -> dict[int, float]:
    """A row's percentages by seed."""
    of = PRESET if row == ZERO_SHOT else row
    return {
        run.seed: 100 * result["rows"][0 if row == ZERO_SHOT else 1][metric]
        for run, result in found.items()
        if (run.row, run.imb) == (of, imb)
    }


def score_table(found: Mapping[Run, dict], rows: Sequence[str], imb: float) -> str:
    """Means, spreads, and each row's HM-A against the preset's on the same seeds."""
    body = []
    preset = scores(found, PRESET, imb, "hm_a")
    for row in [ZERO_SHOT, *rows]:
        by_metric = {metric: scores(found, row, imb, metric) for metric in METRICS}
        values = by_metric["hm_a"]
        if not values:
            continue
        cells = []
        for each in by_metric.values():
            of_seeds = tuple(each.values())
            deviation = spread(of_seeds)
            cells.append(
                f"{mean(of_seeds):.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
            )
        test = paired_test(
            {("letters", seed): value for seed, value in values.items()},
            {("letters", seed): value for seed, value in preset.items()},
        )
        against, p = "", ""
        if row != PRESET and test is not None:
            against = f"{test.difference:+.2f}"
            higher = sum(values[seed] > preset[seed] for seed in values.keys() & preset.keys())
            against += f" ({higher} of {test.pairs})"
            p = "n/a" if test.p_pairs is None else f"{test.p_pairs:.3f}"
        body.append([row, *cells, against, p, len(values)])
    header = [
        f"imb {imb:g}",
        *METRICS.values(),
        "HM-A against the preset (seeds above it)",
        "p",
        "seeds",
    ]
    return tabulate(body, header, tablefmt="github", disable_numparse=True)


def loads(found: Mapping[Run, dict], row: str, imb: float) -> np.ndarray:
    """Each prompt's load in units of the even share: [seeds, epochs, layers, M]."""
    histories = [
        result["history"] for run, result in found.items() if (run.row, run.imb) == (row, imb)
    ]
    counts = np.array(
        [[line["activations"] for line in history] for history in histories], dtype=float
    )
    return counts * counts.shape[-1] / counts.sum(axis=-1, keepdims=True)


def key_cosines(found: Mapping[Run, dict], row: str, imb: float) -> np.ndarray:
    """Mean cosine between a layer's keys: [seeds, epochs, layers]."""
    return np.array(
        [
            [line["key_cosine"] for line in result["history"]]
            for run, result in found.items()
            if (run.row, run.imb) == (row, imb)
        ]
    )


def load_table(found: Mapping[Run, dict], imb: float) -> str:
    """Largest and smallest load and key cosines of the last epoch, means over seeds."""
    body = []
    shown = {**GAMMAS, "printed sign": "Eq. 9's printed sign"}
    shown |= {row: row for row in READINGS if row != PRESET}
    for title, row in shown.items():
        load = loads(found, row, imb)
        if not load.size:
            continue
        last, cosines = load[:, -1], key_cosines(found, row, imb)
        body.append(
            [
                title,
                *(f"{each:.1f}" for each in last.max(axis=-1).mean(axis=0)),
                f"{100 * (last == 0).mean():.0f}%",
                f"{cosines[:, 0].mean():.3f}",
                f"{cosines[:, -1].mean():.3f}",
            ]
        )
    layers = next(iter(found.values()))["history"][0]["layers"]
    header = [
        f"imb {imb:g}",
        *(f"layer {layer}" for layer in layers),
        "never retrieved",
        "key cosine, first epoch",
        "last epoch",
    ]
    return tabulate(body, header, tablefmt="github", disable_numparse=True)


def draw(found: Mapping[Run, dict], imb: float) -> Figure:
    """By layer and epoch, the spread of the load and the key-to-key cosine; means over seeds."""
    layers = next(iter(found.values()))["history"][0]["layers"]
    figure = Figure(figsize=(2.8 * len(layers) + 1, 5.4), layout="constrained")
    grid = figure.subplots(2, len(layers), sharex=True, sharey="row", squeeze=False)
    for title, row in GAMMAS.items():
        load, cosines = loads(found, row, imb), key_cosines(found, row, imb)
        if not load.size:
            continue
        epochs = np.arange(1, load.shape[1] + 1)
        spreads = load.std(axis=-1).mean(axis=0)  # [epochs, layers]
        for column in range(len(layers)):
            grid[0, column].plot(epochs, spreads[:, column], label=title)
            grid[1, column].plot(epochs, cosines.mean(axis=0)[:, column], label=title)
    for column, layer in enumerate(layers):
        grid[0, column].set(title=f"layer {layer}")
        grid[1, column].set(xlabel="epoch")
    grid[0, 0].set(ylabel="std of the load\n(1: the even share)", ylim=(0, None))
    grid[1, 0].set(ylabel="mean cosine\nbetween keys")
    grid[0, 0].legend(frameon=False)
    return figure


def main(config: ReadingsConfig) -> int:
    """Train what is missing, print, and fill the page."""
    for row in config.rows:
        if row not in ROWS and row not in OTHERS:
            raise InputError(f"--rows {row!r}: expected some of {', '.join([*ROWS, *OTHERS])}")
    runs = [
        Run(row, imb, seed) for seed in config.seeds for imb in config.imb for row in config.rows
    ]
    if config.train:
        train_missing(runs, config.out)
    found = results(runs, config.out)
    if not found:
        print("nothing has finished yet")
        return 1
    some = next(iter(found.values()))
    blocks = ["\n".join(some["data"])]
    for imb in config.imb:
        blocks.append(score_table(found, [*ROWS, *OTHERS], imb))
    for imb in config.imb:
        blocks.append(load_table(found, imb))
    text = "\n\n".join(blocks)
    print(text)
    if config.docs is not None:
        page = config.docs / "readings.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
        save_figure(draw(found, config.imb[-1]), config.docs / "readings.png")
    return 0


if __name__ == "__main__":
    cli.run(ReadingsConfig, main, sys.argv[1:], prog="python -m benchmarks.readings")
