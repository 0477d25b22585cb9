"""Seconds that methods over features take, from features that are in the cache, beside LAMP's.

``LAMP_FAST_BENCH_CALTECH=DIR pytest benchmarks/bench_feature_methods.py --benchmark-only`` reads
DIR/caltech-101 and, where the cache does not have them yet, encodes its pictures once (of ProLIP
300 views each; LAMP_FAST_CACHE says where the cache lies). Without it features are drawn at that
size: 50 classes, at most 100 pictures each, imbalance ratio 10, as wide as the carried CLIP's.
Settings as published, two threads; what is imported, read and encoded before does not count. LAMP's
seconds are those of one of its steps times their number. No floor stands beside them: the
arithmetic of such steps is microseconds, and what they take is Python's. ``--all`` takes the median
of three.
"""

import os
import statistics
from pathlib import Path

import pytest

from benchmarks.measuring.feature_runs import CLOSED, TRAINED, FeatureRuns, run_config, train
from benchmarks.measuring.steps import Cell
from benchmarks.measuring.timing import interleave, threads

FOLDER = os.environ.get("LAMP_FAST_BENCH_CALTECH")
AIMS = dict.fromkeys(CLOSED, 2.0) | dict.fromkeys(TRAINED, 10.0)
"""Seconds."""
CORES = 2
LAMP_ROUNDS = 20


@pytest.fixture(scope="module")
def runs():
    return FeatureRuns(Path(FOLDER) if FOLDER else None)


@pytest.mark.parametrize("name", AIMS)
def bench_feature_method(benchmark, closing, request, runs, name):
    rounds = 3 if request.config.getoption("--all") else 1
    if FOLDER:
        train(runs.experiment(name))  # encodes what the cache lacks
    with threads(CORES):

        def measure():
            return statistics.median(train(runs.experiment(name)) for _ in range(rounds))

        seconds = benchmark.pedantic(measure, rounds=1)
        experiment = runs.experiment(name)
        seen = runs.pictures() * (experiment.config.optim.epochs if _has_epochs(name) else 1)
        closing.add(
            f"{experiment.method.entry.title}, trained on the features of {_data(runs)}",
            seconds,
            "s",
            beside=f"{seen / seconds:,.0f} pictures/s",
            aim=f"at most {AIMS[name]:g} s",
        )
    benchmark.extra_info.update({"seconds": seconds, "pictures": runs.pictures()})


def bench_lamp_beside(benchmark, closing, runs):
    config = run_config("lamp", None)
    count, optim = runs.pictures(), config.optim
    steps = optim.epochs * (count // optim.batch)
    with threads(CORES):
        cell = Cell(runs.clip, optim.batch, runs.size.classes)
        arguments = ({"step": cell.train}, LAMP_ROUNDS)
        step = benchmark.pedantic(interleave, arguments, rounds=1)["step"].median
        closing.add(
            f"LAMP, {steps:,} steps on as many pictures (one step times their number)",
            steps * step,
            "s",
            beside=f"{optim.batch / step:,.0f} pictures/s",
        )
    benchmark.extra_info.update({"seconds": steps * step, "steps": steps})


def _data(runs: FeatureRuns) -> str:
    what = "Caltech101's" if FOLDER else "as many drawn"
    return f"{runs.pictures():,} pictures ({what})"


def _has_epochs(name: str) -> bool:
    return name in TRAINED and name not in ("linear-probe", "lp++")
