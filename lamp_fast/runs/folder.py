"""The folder of a run: what its files are called, who may write there, what it says when read."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from lamp_fast.errors import InputError
from lamp_fast.files import load_tensors, read_json
from lamp_fast.runs import config as settings
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.ranks import launch_id, restarted, restarts

CHECKPOINT = "checkpoint.safetensors"
LEARNED = "learned.safetensors"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
LOCK = ".lock"


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it; the lock ends with the process at the latest.

    What a killed process was writing is removed.

    Raises:
        InputError: another run holds it, or it cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(f"--out {folder}: another run is writing there") from None
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror})") from None
    try:
        for partial in folder.glob(".*.partial"):
            partial.unlink()
        yield
    finally:
        # Before it is released: who waits for the lock looks whether its file still has a name.
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def is_filled(folder: Path) -> bool:
    """Whether an ``--out`` holds anything but a lock; one that is not there does not.

    Raises:
        InputError: a file is in its place.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file, expected a folder")
    return folder.is_dir() and any(each.name != LOCK for each in folder.iterdir())


def clear_folder(folder: Path) -> None:
    """Remove everything from a held folder."""
    for each in folder.iterdir():
        if each.name == LOCK:
            continue
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()


def prepare_folder(config: TrainConfig) -> Path:
    """Choose the run folder and refuse one that would be overwritten; nothing is written.

    Raises:
        InputError: a non-empty ``--out`` without ``--resume`` or ``--overwrite``, a file in its
            place, or ``--resume`` where there is nothing to go on from.
    """
    if config.out is None:
        if config.resume:
            raise InputError("--resume: expected --out with the folder of the run")
        name = f"{config.data.data}-{config.method}-seed{config.seed}"
        runs = Path("runs")
        names = [name, *(f"{name}-{number}" for number in range(2, 1_000_000))]
        return next(runs / each for each in names if not (runs / each).exists())
    filled = is_filled(config.out)
    ours = (config.out / CONFIG).is_file()
    if filled and not (config.resume or config.overwrite):
        raise InputError(
            f"--out {config.out}: not empty; give --resume to go on, --overwrite to replace it"
        )
    if filled and config.overwrite and not ours:
        raise InputError(f"--overwrite: {config.out} is not the folder of a run")
    if config.resume and not ours:
        raise InputError(f"--resume: {config.out} holds no run ({CONFIG} is missing)")
    return config.out


def resumed_defaults(given: Mapping[str, Any]) -> TrainConfig:
    """What explicit values override: with ``resume``, the settings that the run was begun with,
    else as :func:`lamp_fast.runs.config.default_config` says.

    So too where torchrun starts the ranks of a run again.

    Args:
        given: values by their flags' names, of the command line or of Python.

    Raises:
        InputError: see :func:`lamp_fast.runs.config.default_config`, or another method than that of
            the run to go on with.
    """
    out = None if given.get("out") is None else Path(given["out"])
    if not (given.get("resume") or _goes_on(out)) or out is None or not (out / CONFIG).is_file():
        return settings.default_config(given)
    config = settings.load_config(out / CONFIG)
    if (method := given.get("method", config.method)) != config.method:
        raise InputError(
            f"--resume --method {method}: the run in {out} was begun with {config.method}"
        )
    return config


def choose_folder(config: TrainConfig) -> tuple[TrainConfig, Path]:
    """The run's folder; settings that go on with it where torchrun starts its ranks again."""
    if config.out is None and restarts():
        raise InputError("--out: missing; torchrun --max-restarts needs it to find the run again")
    if _goes_on(config.out):
        config = replace(config, resume=True, overwrite=False)
    return config, prepare_folder(config)


def _goes_on(folder: Path | None) -> bool:
    """Whether a run in ``folder`` was begun by the same torchrun, before it lost a rank."""
    if folder is None or not restarted():
        return False
    file = folder / CONFIG
    return file.is_file() and read_json(file).get("launch") == launch_id()


def read_learned(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The learned tensors of a finished run, and the facts stored with them.

    Raises:
        InputError: training has not finished, or the file is missing or damaged.
    """
    return load_tensors(_finished(folder, LEARNED))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The rows of the closing table of a finished run.

    Raises:
        InputError: as :func:`read_learned`.
    """
    return read_json(_finished(folder, RESULT))


def _finished(folder: Path, name: str) -> Path:
    """A file that a run writes when its training has ended."""
    file = folder / name
    if not file.is_file() and (folder / CHECKPOINT).is_file():
        raise InputError(
            f"{folder}: training has not finished;"
            f" python -m lamp_fast.train --out {folder} --resume goes on"
        )
    return file
