"""A few steps of each method, timed on this machine: what predictions of cost are made of.

The methods are timed one after the other in one process. What was timed of a method is kept at
once, so that a process that dies with one method (memory, mostly) leaves the others' times, and the
next attempt goes on behind it.
"""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamp_fast.clip.towers import FrozenClip
from lamp_fast.compare.cost import Measured
from lamp_fast.data.pictures import Pictures
from lamp_fast.errors import InputError
from lamp_fast.files import read_json, write_json
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.experiment import Checked, Experiment, assemble, check_data
from lamp_fast.runs.scoring import Scorer
from lamp_fast.runs.trainer import Trainer

FOLDER = "measured"
# Steps are timed until so many seconds or steps; the first one warms up, if another one follows.
SECONDS, STEPS = 0.5, 4
# Pictures that scoring is timed on.
SCORED = 16
# Twice may be bad luck, such as a kill from outside.
MAX_DEATHS = 2


def measured_file(job: Path, method: str) -> Path:
    """Where a probe keeps what it timed of a method."""
    return job / FOLDER / f"{method}.json"


def measure_all(settings: Mapping[str, TrainConfig], job: Path, started: float) -> None:
    """Time every method that has not been timed.

    Args:
        settings: by method.
        job: the folder of the probe's job, of which this process alone is at work.
        started: when this process began, of ``time.time``.
    """
    checked: Checked | None = None
    clip: LoadedClip | None = None
    start = 0.0
    for method, config in settings.items():
        file = measured_file(job, method)
        held = read_json(file) if file.is_file() else {}
        deaths = held.get("deaths", 0)
        if "step" in held or "failed" in held:
            continue
        if deaths >= MAX_DEATHS:
            write_json(file, {"failed": "the process died when it was tried, perhaps for memory"})
            continue
        if checked is None:
            checked = check_data(config)
            start = time.time() - started
        write_json(file, {"deaths": deaths + 1})
        try:
            timed, clip = measure(config, checked, start, clip)
            found: dict[str, Any] = asdict(timed)
        except KeyboardInterrupt:
            write_json(file, held)
            raise
        except Exception as error:
            found = {"failed": one_line(error)}
        write_json(file, found)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    """What went wrong, for a table: a refusal's words alone, other errors with their kind."""
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class LoadedClip:
    """The CLIP that all methods are timed over, and the seconds that it took to load with one."""

    clip: FrozenClip
    seconds: float


def measure(
    config: TrainConfig, checked: Checked, start: float = 0.0, loaded: LoadedClip | None = None
) -> tuple[Measured, LoadedClip]:
    """Time the parts of a run on as few of its pictures as they can be timed on.

    Args:
        config: of the run.
        checked: its pictures.
        start: see :class:`lamp_fast.compare.cost.Measured`.
        loaded: its CLIP, where another method was timed over it.

    Raises:
        InputError: settings that cannot be served.
    """
    given = None if loaded is None else loaded.clip
    build, experiment = _timed(lambda: assemble(config, checked, clip=given), None)
    if loaded is None:
        loaded = LoadedClip(experiment.clip, build)
    else:
        build += loaded.seconds
    device = experiment.device
    optim, pictures = experiment.config.optim, len(experiment.benchmark.train)
    few = few_of(experiment)
    reading, trainer = _timed(lambda: Trainer(few, Path()), device)
    read_once, trainer = _timed(lambda: Trainer(few, Path()), device)
    step, steps = 0.0, 0
    if trainer.parameters:
        step = _seconds_a_step(trainer)
        steps = optim.epochs * max(1, pictures // optim.batch)
    settling, _ = _timed(lambda: few.method.settle(trainer.training), device)
    scorer = Scorer(few, few.method, few.benchmark.base_names, few.benchmark.val)
    scoring, _ = _timed(lambda: list(scorer.logits()), device)
    compared = 0 if trainer.validation is None else trainer.stages[-1]
    measured = Measured(
        start=start,
        build=build,
        read_once=read_once + settling,
        read_picture=max(0.0, reading - read_once) / len(few.benchmark.train),
        step=step,
        steps=steps,
        passes=compared + 1,
        score_picture=scoring / len(few.benchmark.val),
    )
    return measured, loaded


def few_of(experiment: Experiment) -> Experiment:
    """The same with one training picture a class and at least a batch of them, and with a few
    validation pictures."""
    benchmark = experiment.benchmark
    labels = benchmark.train.labels
    _, first = np.unique(labels, return_index=True)
    others = np.setdiff1d(np.arange(len(labels)), first)
    wanted = min(experiment.config.optim.batch, len(labels))
    rows = np.sort(np.concatenate([first, others[: max(0, wanted - len(first))]]))
    few = replace(benchmark, train=benchmark.train.select(rows), val=_first(benchmark.val, SCORED))
    return replace(experiment, benchmark=few)


def _first(pictures: Pictures, count: int) -> Pictures:
    return pictures.select(range(min(count, len(pictures))))


def _seconds_a_step(trainer: Trainer) -> float:
    taken: list[float] = []
    for seconds in trainer.time_steps(STEPS):
        taken.append(seconds)
        if sum(taken) > SECONDS:
            break
    return min(taken)


def _timed(work: Callable[[], Any], device: torch.device | None) -> tuple[float, Any]:
    """Seconds of some work, what a GPU does of it included, and its result."""
    started = time.perf_counter()
    result = work()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result
