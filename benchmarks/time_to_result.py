"""Seconds of training to a given accuracy, of every method: a table and a plot.

``python -m benchmarks.time_to_result [--out docs]`` trains each method with its published settings
on digits over the carried CLIP and scores it after every epoch on the test pictures of both halves.
The clock runs while a method reads its training set, which includes the features that it starts
from, and while it trains; it stands still while one scores. Nothing is chosen by these scores:
every method trains to its last epoch, and the whole curve is shown. HM-A is the harmonic mean of
both halves' accuracies; a method that has no score for new names has none. One thread, as digits
are small.
"""

import contextlib
import io
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from benchmarks import methods_table
from benchmarks.measuring.timing import CPU, threads, write_record
from lamp_fast import cli
from lamp_fast.methods import METHODS
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.experiment import Experiment, assemble
from lamp_fast.runs.figures import save_figure
from lamp_fast.runs.scoring import score_method
from lamp_fast.runs.trainer import Trainer

Curve = list[tuple[float, float]]
"""Seconds of training, and HM-A then in 0..1: before the first epoch, and after each."""


@dataclass(frozen=True)
class Settings:
    """Measure seconds to a result."""

    out: Path = Path("docs")
    """Folder for time_to_result.png and time_to_result.json."""
    methods: tuple[str, ...] = tuple(METHODS)
    imb: float = 50.0
    seeds: tuple[int, ...] = (1,)
    goals: tuple[float, ...] = (90.0, 91.0)
    """HM-A in percent; zero-shot CLIP has 89.25."""


def run_config(method: str, imb: float, seed: int) -> TrainConfig:
    """As the methods' table has it, with features encoded anew."""
    config = methods_table.run_config("digits", None, imb, method, seed)
    return replace(config, machine=replace(config.machine, cache_size=0.0))


def train(config: TrainConfig) -> Curve:
    """A run's curve; empty where new names have no score."""
    experiment = assemble(config)
    if experiment.method.entry.no_new_names is not None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(experiment, Path(folder))
        seconds = trainer.reading_seconds
        curve = [(seconds, _hm_a(experiment))]
        for epoch in range(experiment.config.optim.epochs if trainer.parameters else 0):
            seconds += trainer._epoch(epoch)["seconds"]
            trainer.progress.epoch = epoch + 1
            if epoch + 1 == experiment.config.optim.epochs:
                experiment.method.settle(trainer.training)
            curve.append((seconds, _hm_a(experiment)))
    return curve


def _hm_a(experiment: Experiment) -> float:
    method = experiment.method
    method.eval()
    scored = score_method(experiment, method, method.entry.title, 0.0)
    return scored.row(experiment.benchmark)["hm_a"]


def seconds_to(curve: Curve, goal: float) -> float | None:
    """When a curve first reaches a goal in 0..1; None where it never does."""
    return next((seconds for seconds, reached in curve if reached >= goal), None)


def table(curves: Mapping[str, Sequence[Curve]], goals: Sequence[float]) -> str:
    """A row a method: medians over its seeds."""
    rows = []
    for name, runs in curves.items():
        if not all(runs):
            rows.append([name, *["n/a"] * (3 + len(goals))])
            continue
        starts, ends = ([100 * run[at][1] for run in runs] for at in (0, -1))
        cells = [f"{statistics.median(each):.2f}" for each in (starts, ends)]
        cells.append(f"{statistics.median(run[-1][0] for run in runs):.1f}")
        for goal in goals:
            reached = [seconds_to(run, goal / 100) for run in runs]
            found = [seconds for seconds in reached if seconds is not None]
            cell = f"{statistics.median(found):.1f}" if found else "not reached"
            few = 0 < len(found) < len(runs)
            cells.append(f"{cell} ({len(found)} of {len(runs)})" if few else cell)
        rows.append([name, *cells])
    header = ["method", "HM-A at first", "at last", "seconds in all"]
    header += [f"seconds to {goal:g}" for goal in goals]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def draw(title: str, curves: Mapping[str, Sequence[Curve]]) -> Figure:
    """A line a method, of its first seed; seconds are logarithmic, a closed form is a point.

    The axes leave out the first twentieth of a second and what lies more than ten points below the
    best, such as Tip-Adapter-F before its last epoch has chosen how much the cache counts.
    """
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    best = max(reached for runs in curves.values() if runs[0] for _, reached in runs[0])
    for number, (name, runs) in enumerate(curves.items()):
        if not runs[0]:
            continue
        seconds, reached = zip(*runs[0], strict=True)
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
        marker = "o" if len(seconds) == 1 else None
        shown = [max(each, 0.05) for each in seconds]  # zero-shot reads nothing
        axes.plot(shown, [100 * each for each in reached], label=name, marker=marker, **style)
    axes.set(xscale="log", xlabel="seconds of training", ylabel="HM-A on test, %", title=title)
    axes.set_ylim(100 * best - 10, 100 * best + 0.5)
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside right center")
    return figure


def main(settings: Settings) -> None:
    """Train everything, print the table, and draw."""
    curves: dict[str, list[Curve]] = {}
    runs = [(name, seed) for name in settings.methods for seed in settings.seeds]
    with threads(1):
        for name, seed in tqdm(runs):
            with contextlib.redirect_stdout(io.StringIO()):
                curve = train(run_config(name, settings.imb, seed))
            curves.setdefault(METHODS[name].title, []).append(curve)
        print(table(curves, settings.goals))
        numbers = {"imb": settings.imb, "seeds": settings.seeds, "curves": curves}
        write_record(settings.out / "time_to_result.json", CPU, numbers)
    title = f"digits, imbalance ratio {settings.imb:g}, seed {settings.seeds[0]}"
    save_figure(draw(title, curves), settings.out / "time_to_result.png")


if __name__ == "__main__":
    cli.run(Settings, main, prog="python -m benchmarks.time_to_result", description=__doc__)
