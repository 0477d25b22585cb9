"""What the process of a job does whatever the job is: goes on, trains, tells of itself, ends."""

import os
import resource
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lamp_fast.files import read_json
from lamp_fast.jobs.queue import OUTCOME
from lamp_fast.runs.config import TrainConfig, load_config
from lamp_fast.runs.folder import CHECKPOINT, CONFIG, METRICS
from lamp_fast.runs.training import train

RUN = "run"
SECONDS_BETWEEN_LOOKS = 2.0


def train_attempt(
    config: TrainConfig, job: Path, attempt: int, *, scored: bool = True
) -> Path | None:
    """Train in an attempt's folder, from where an earlier attempt came.

    Args:
        config: of the run; its ``out`` does not matter.
        job: the job's folder.
        attempt: its number, from 1.
        scored: see :func:`lamp_fast.runs.training.train`.

    Returns:
        The run's folder; None where training diverged.
    """
    run = job / f"attempt-{attempt}" / RUN
    take_over(job, attempt)
    begun = (run / CONFIG).is_file()
    if begun:
        # With what was resolved when it began, such as layers that follow the CLIP's.
        config = load_config(run / CONFIG)
    code = train(replace(config, out=run, resume=begun), scored=scored)
    return run if code == 0 else None


def run_of(jobs: Path, address: str) -> Path:
    """The run that a done job left.

    Args:
        jobs: the folder of all jobs' folders.
        address: of the job.
    """
    return jobs / read_json(jobs / address / OUTCOME)["run"]


def take_over(job: Path, attempt: int) -> None:
    """Copy into an attempt's folder the run that the last earlier one with a checkpoint left.

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


def run_facts(record: dict[str, Any]) -> dict[str, Any]:
    """What a table says of a run that it was made of.

    Args:
        record: the run's ``config.json``.
    """
    machine, data = record["settings"]["machine"], record["settings"]["data"]
    counts = record["data"]["counts"]
    return {
        "commit": record["commit"],
        "torch": record["torch"],
        "device": device_name(machine["device"]),
        "precision": machine["precision"],
        "data_sha256": record["data"]["sha256"],
        "drawn": {
            "cap": None if data["shots"] is not None else data["cap"],
            "pictures": sum(counts),
            "most": max(counts),
            "least": min(counts),
        },
    }


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.getdevice_name(device)
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return f"{torch.get_num_threads()} threads of {line.partition(':')[2].strip()}"
    return f"{torch.get_num_threads()} threads of a CPU"


def peak_memory() -> int:
    """Bytes at most: of tensors on the GPU, or of the whole process without one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def end_with_parent() -> None:
    """Stop when the worker that started this process is gone: its job is another's by then."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
