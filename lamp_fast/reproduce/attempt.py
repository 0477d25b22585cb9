"""One job in a process of its own: ``python -m lamp_fast.reproduce.attempt FOLDER NUMBER``.

FOLDER is a job of the queue; the attempt goes on from what an earlier one left of the run.
"""

import json
import os
import resource
import shutil
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro

from lamp_fast import cli, train
from lamp_fast.data.settings import DataConfig
from lamp_fast.fields import from_json
from lamp_fast.files import read_json, write_json
from lamp_fast.reproduce.queue import OUTCOME, TASK
from lamp_fast.runs import config as settings
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.experiment import load_run, load_run_on
from lamp_fast.runs.folder import CHECKPOINT, CONFIG, METRICS, RESULT
from lamp_fast.runs.scoring import score_method

RUN = "run"
SECONDS_BETWEEN_LOOKS = 2.0


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
    _end_with_parent()
    task = read_json(config.job / TASK)
    trained = settings.saved_settings(task["settings"], str(config.job / TASK))
    folder = config.job / f"attempt-{config.attempt}"
    if task["target"] is None:
        outcome = _train(trained, config.job, config.attempt)
    else:
        target = from_json(DataConfig, task["target"], str(config.job / TASK))
        run = _trained_run(config.job.parent, task["needs"][0])
        outcome = _score(trained, target, run, tte=task.get("tte", False))
    if outcome is None:
        return 1
    write_json(folder / OUTCOME, outcome)
    return 0


def _train(config: TrainConfig, job: Path, attempt: int) -> dict[str, Any] | None:
    run = job / f"attempt-{attempt}" / RUN
    _take_over(job, attempt)
    begun = (run / CONFIG).is_file()
    if begun:
        # With what was resolved when it began, such as layers that follow the CLIP's.
        config = settings.load_config(run / CONFIG)
    if train.main(replace(config, out=run, resume=begun)) != 0:
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
            "training_bytes": _peak_memory() if seconds else None,
        },
        "record": _facts(read_json(run / CONFIG)),
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
        "figures": {"inference_seconds": seconds, "inference_bytes": _peak_memory()},
        "record": _facts(read_json(run / CONFIG)),
    }


def _take_over(job: Path, attempt: int) -> None:
    """Copy the run that the last earlier attempt with a checkpoint left.

    Its holder may still be writing, if it is not as dead as it seems: every file is whole, and
    what goes on here is a copy.
    """
    for earlier in range(attempt - 1, 0, -1):
        run = job / f"attempt-{earlier}" / RUN
        if (run / CHECKPOINT).is_file():
            # The record last: without it this attempt begins anew.
            names = (CHECKPOINT, METRICS, CONFIG)
            for name in names:
                if (run / name).is_file():
                    new = job / f"attempt-{attempt}" / RUN
                    new.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(run / name, new / name)
            return


def _trained_run(jobs: Path, address: str) -> Path:
    return jobs / read_json(jobs / address / OUTCOME)["run"]


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    """What a table says of the runs that it was made of."""
    machine, data = record["settings"]["machine"], record["settings"]["data"]
    counts = record["data"]["counts"]
    return {
        "commit": record["commit"],
        "torch": record["torch"],
        "device": _device_name(machine["device"]),
        "precision": machine["precision"],
        "data_sha256": record["data"]["sha256"],
        "drawn": {
            "cap": None if data["shots"] is not None else data["cap"],
            "pictures": sum(counts),
            "most": max(counts),
            "least": min(counts),
        },
    }


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return f"{torch.get_num_threads()} threads of {line.partition(':')[2].strip()}"
    return f"{torch.get_num_threads()} threads of a CPU"


def _peak_memory() -> int:
    """Bytes at most: of tensors on the GPU, or of the whole process without one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _end_with_parent() -> None:
    """Stop when the worker that started this process is gone: its job is another's by then."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    cli.run(AttemptConfig, main, sys.argv[1:], prog="python -m lamp_fast.reproduce.attempt")
