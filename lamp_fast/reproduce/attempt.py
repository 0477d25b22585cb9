"""One job in a process of its own: ``python -m lamp_fast.reproduce.attempt FOLDER NUMBER``.

FOLDER is a job of the queue; the attempt goes on from what an earlier one left of the run.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tyro

from lamp_fast import cli
from lamp_fast.data.settings import DataConfig
from lamp_fast.fields import from_json
from lamp_fast.files import read_json, write_json
from lamp_fast.jobs.process import end_with_parent, peak_memory, run_facts, run_of, train_attempt
from lamp_fast.jobs.queue import OUTCOME, TASK
from lamp_fast.runs.config import TrainConfig, saved_settings
from lamp_fast.runs.experiment import load_run, load_run_on
from lamp_fast.runs.folder import CONFIG, METRICS, RESULT
from lamp_fast.runs.scoring import score_method


def command(job: Path, attempt: int) -> list[str]:
    """The process that makes an attempt at a job."""
    return [sys.executable, "-m", "lamp_fast.reproduce.attempt", str(job), str(attempt)]


@dataclass(frozen=True)
class AttemptConfig:
    """Do one job of a queue."""

    job: Annotated[Path, tyro.conf.Positional]
    """The job's folder."""
    attempt: Annotated[int, tyro.conf.Positional]
    """The number of the attempt, from 1."""


def main(config: AttemptConfig) -> int:
    """Train, or score a trained run, and leave ``outcome.json``."""
    end_with_parent()
    task = read_json(config.job / TASK)
    trained = saved_settings(task["settings"], str(config.job / TASK))
    folder = config.job / f"attempt-{config.attempt}"
    if task["target"] is None:
        outcome = _train(trained, config.job, config.attempt)
    else:
        target = from_json(DataConfig, task["target"], str(config.job / TASK))
        run = run_of(config.job.parent, task["needs"][0])
        outcome = _score(trained, target, run, tte=task.get("tte", False))
    if outcome is None:
        return 1
    write_json(folder / OUTCOME, outcome)
    return 0


def _train(config: TrainConfig, job: Path, attempt: int) -> dict[str, Any] | None:
    run = train_attempt(config, job, attempt)
    if run is None:
        return None
    rows = read_json(run / RESULT)
    history = (run / METRICS).read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in history]
    # Zero-shot CLIP, the method, and the method with the adapted bias: what there is of them.
    names = ("method",) if len(rows) == 1 else ("zeroshot", "method", "transductive")
    return {
        "run": str(run.relative_to(job.parent)),
        "rows": dict(zip(names, rows, strict=False)),
        "figures": {
            "parameters": rows[min(1, len(rows) - 1)]["parameters"],
            "training_seconds": median(seconds) if seconds else None,
            "training_bytes": peak_memory() if seconds else None,
        },
        "record": run_facts(read_json(run / CONFIG)),
    }


def _score(
    config: TrainConfig, target: DataConfig, run: Path, *, tte: bool = False
) -> dict[str, Any]:
    """One pass over test pictures; over the run's own a second one, which is timed, but for
    ``tte``, a score on five crops."""
    own = target.data == config.data.data
    experiment, facts = load_run(run) if own else load_run_on(run, target)
    experiment = experiment.with_tte(True if tte else None)
    row = score_method(experiment, experiment.method, target.data, facts["seconds"])
    seconds = None
    if own and not tte:
        started = time.perf_counter()
        score_method(experiment, experiment.method, target.data, facts["seconds"])
        seconds = time.perf_counter() - started
    return {
        "run": str(run.relative_to(run.parents[2])),
        "rows": {"method": row.row(experiment.benchmark)},
        "figures": {"inference_seconds": seconds, "inference_bytes": peak_memory()},
        "record": run_facts(read_json(run / CONFIG)),
    }


if __name__ == "__main__":
    cli.run(AttemptConfig, main, sys.argv[1:], prog="python -m lamp_fast.reproduce.attempt")
