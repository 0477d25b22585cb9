"""One job in a process of its own: ``python -m lamp_fast.compare.attempt FOLDER NUMBER``.

FOLDER is a job of the queue; the attempt goes on from what an earlier one left.
"""

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from lamp_fast import cli
from lamp_fast.compare.jobs import FIT, PROBE
from lamp_fast.compare.probe import measure_all
from lamp_fast.files import read_json, write_json
from lamp_fast.jobs.here import stoppable
from lamp_fast.jobs.process import RUN, end_with_parent, run_facts, run_of, train_attempt
from lamp_fast.jobs.queue import CLAIM, OUTCOME, TASK
from lamp_fast.runs.config import TrainConfig, saved_settings
from lamp_fast.runs.folder import CONFIG
from lamp_fast.runs.training import test_run
from lamp_fast.tensors import save_tensors

ANSWERS = "answers.safetensors"


def command(job: Path, attempt: int) -> list[str]:
    """The process that makes an attempt at a job."""
    return [sys.executable, "-m", "lamp_fast.compare.attempt", str(job), str(attempt)]


@dataclass(frozen=True)
class AttemptConfig:
    """Do one job of a comparison."""

    job: Annotated[Path, tyro.conf.Positional]
    """The job's folder."""
    attempt: Annotated[int, tyro.conf.Positional]
    """The number of the attempt, from 1."""


def main(config: AttemptConfig) -> int:
    """Time, fit or test, and leave ``outcome.json``."""
    task, folder = read_json(config.job / TASK), config.job / f"attempt-{config.attempt}"
    where = str(config.job / TASK)
    with stoppable():
        if task["kind"] == PROBE:
            settings = {
                method: saved_settings(values, where) for method, values in task["settings"].items()
            }
            measure_all(settings, config.job, _begun(folder))
            outcome: dict[str, Any] | None = {}
        elif task["kind"] == FIT:
            outcome = _fit(saved_settings(task["settings"], where), config.job, config.attempt)
        else:
            outcome = _test(run_of(config.job.parent, task["needs"][0]), folder)
    if outcome is None:
        return 1
    write_json(folder / OUTCOME, outcome)
    return 0


def _begun(folder: Path) -> float:
    """When this process was started, of ``time.time``: who starts it has just written its claim."""
    claim = folder / CLAIM
    return claim.stat().st_mtime if claim.is_file() else time.time()


def _fit(settings: TrainConfig, job: Path, attempt: int) -> dict[str, Any] | None:
    run = train_attempt(settings, job, attempt, scored=False)
    if run is None:
        return None
    return {
        "run": str(run.relative_to(job.parent)),
        "record": run_facts(read_json(run / CONFIG)),
    }


def _test(fitted: Path, folder: Path) -> dict[str, Any]:
    run = folder / RUN
    shutil.copytree(fitted, run, dirs_exist_ok=True)
    experiment, rows = test_run(run)
    own = rows[-1].base
    answers = {
        "labels": torch.from_numpy(experiment.benchmark.test_base.labels.copy()),
        "predicted": torch.from_numpy(own.predicted.copy()),
    }
    save_tensors(folder / ANSWERS, answers, {})
    return {
        "run": str(run.relative_to(folder.parents[1])),
        "answers": str((folder / ANSWERS).relative_to(folder.parents[1])),
        "row": rows[-1].row(experiment.benchmark),
        "per_class": [None if np.isnan(each) else each for each in own.per_class.tolist()],
    }


if __name__ == "__main__":
    end_with_parent()
    cli.run(AttemptConfig, main, sys.argv[1:], prog="python -m lamp_fast.compare.attempt")
