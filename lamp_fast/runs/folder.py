"""The folder of a run: what its files are called, who may write there, and which it may be."""

import contextlib
import errno
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lamp_fast.cli import expand_path
from lamp_fast.data import catalog
from lamp_fast.data.settings import DESCRIBING, OWN_DATA, PLACES, DataConfig
from lamp_fast.errors import InputError
from lamp_fast.runs import config as settings
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.launch import launch_id, restarted, restarts
from lamp_fast.runs.record import holds_record, read_record
from lamp_fast.runs.tensorboard import FOLDER as EVENTS

CHECKPOINT = "checkpoint.safetensors"
LEARNED = "learned.safetensors"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
# Scores of the validation pictures, and their labels, of a run that holds any.
VALIDATION = "validation.safetensors"
RESULT = "result.json"
ANSWERS = "answers.json"
RELIABILITY = "reliability.json"
LOCK = ".lock"

# Of a saved classifier (lamp_fast.runs.hub), in place of LEARNED.
WEIGHTS = "model.safetensors"

# The run in a run's folder that trains without some classes, to choose an epoch for all of them.
HOLDOUT = "holdout"

# Says what a folder of scores on another data set was scored on.
TARGET = "target.json"

_TABLES = (
    RESULT,
    RELIABILITY,
    "table.md",
    "per_class.csv",
    "confusion_base.csv",
    "confusion_new.csv",
)

# Everything that training, scoring and the report write into a run folder by default.
FILES = (
    CHECKPOINT,
    LEARNED,
    VALIDATION,
    METRICS,
    ANSWERS,
    *_TABLES,
    *("per_class.png", "curves.png", "validation.png", "activations.png", "report.html"),
)

# What a killed writer may leave, see lamp_fast.files.write_bytes.
_PARTIAL = re.compile(r"\..+\.\d+\.partial")


@contextlib.contextmanager
def make_folder(folder: Path, *, new: bool = False) -> Iterator[Path]:
    """Make a folder, and those above it; those of them that are left empty go again.

    Raises:
        FileExistsError: it is there and should be ``new``.
        InputError: it cannot be made or written to.
    """
    made: list[Path] = []
    try:
        try:
            missing = []
            for each in (folder.absolute(), *folder.absolute().parents):
                if each.exists():
                    break
                missing.append(each)
            if new and not missing:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
            for each in reversed(missing):
                # Of two that start at the same time one makes it; above it both may go on.
                try:
                    each.mkdir()
                except FileExistsError:
                    if (new and each == missing[0]) or not each.is_dir():
                        raise
                else:
                    made.append(each)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        except FileExistsError:
            if new:
                raise
            raise InputError(f"--out {folder}: cannot be written (a file is in its way)") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--out {folder}: cannot be written ({reason})") from None
        yield folder
    finally:
        for each in reversed(made):
            with contextlib.suppress(OSError):  # not empty: it has become a run
                each.rmdir()


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it; the lock ends with the process at the latest.

    What a killed process was writing is removed.

    Raises:
        InputError: another run holds it, or it cannot be written.
        FileNotFoundError: it was removed, or another took its place, while it was held.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        ours = os.stat(folder / LOCK)
    except Timeout:
        raise InputError(f"--out {folder}: another run is writing there") from None
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror})") from None
    try:
        for each in folder.iterdir():
            if _PARTIAL.fullmatch(each.name) and each.is_file():
                each.unlink()
        yield
        _require_same(folder, ours)
    finally:
        # Before it is released: who waits for the lock looks whether its file still has a name.
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _require_same(folder: Path, lock: os.stat_result) -> None:
    try:
        same = os.path.samestat(os.stat(folder / LOCK), lock)
    except OSError:
        same = False
    if not same:
        raise removed(folder)


def require_checkpoint(folder: Path) -> None:
    """Stop a run whose earlier checkpoint is gone, since its folder was removed.

    Raises:
        FileNotFoundError: naming the folder.
    """
    if not (folder / CHECKPOINT).is_file():
        raise removed(folder)


def removed(folder: Path) -> OSError:
    """The error of a run whose folder is not there any more."""
    return FileNotFoundError(errno.ENOENT, "was removed while the run was writing", str(folder))


def is_filled(folder: Path) -> bool:
    """Whether an ``--out`` holds anything but a lock and what a killed process left half-written.

    Raises:
        InputError: a file is in its place, or it cannot be read.
    """
    try:
        there = folder.exists()
        names = [each.name for each in folder.iterdir()] if folder.is_dir() else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--out {folder}: cannot be read ({reason})") from None
    if there and names is None:
        raise InputError(f"--out {folder}: is a file, expected a folder")
    return any(name != LOCK and not _PARTIAL.fullmatch(name) for name in names or ())


def is_run(folder: Path) -> bool:
    """Whether a folder is known, by its own record, to be written by a run and nothing else."""
    return holds_record(folder / CONFIG) and not (folder / WEIGHTS).exists()


def clear_folder(folder: Path) -> tuple[str, ...]:
    """Remove from a held run folder what a run writes, but for its record, which is replaced.

    Links are removed and not followed.

    Returns:
        The names of everything else, which stays.
    """
    if (folder / CONFIG).is_symlink():
        (folder / CONFIG).unlink()
    inner = folder / HOLDOUT
    if not inner.is_symlink() and is_run(inner):
        clear_folder(inner)
        for name in (CONFIG, LOCK):
            _remove_file(inner / name)
        _remove_if_empty(inner)
    for name in FILES:
        _remove_file(folder / name)
    events = folder / EVENTS
    if events.is_dir() and not events.is_symlink():
        for each in events.glob("events.out.tfevents.*"):
            _remove_file(each)
        _remove_if_empty(events)
    for each in folder.glob("on_*"):
        if not each.is_symlink() and (each / TARGET).is_file():
            for name in (TARGET, LOCK, *_TABLES):
                _remove_file(each / name)
            _remove_if_empty(each)
    return tuple(sorted(each.name for each in folder.iterdir() if each.name not in (LOCK, CONFIG)))


def _remove_file(file: Path) -> None:
    if file.is_symlink() or file.is_file():
        file.unlink()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def choose_folder(config: TrainConfig, stack: contextlib.ExitStack) -> Path:
    """Choose and make the run folder, which goes again with ``stack`` if it is left empty.

    Raises:
        InputError: one that cannot be written or would be overwritten: a non-empty ``--out``
            without ``--resume`` or ``--overwrite``, a file in its place, ``--resume`` where there
            is nothing to go on from; or one among the pictures, or around them.
    """
    if config.out is None:
        if config.resume:
            raise InputError("--resume: expected --out with the folder of the run")
        return _new_folder(f"{config.data.data}-{config.method}-seed{config.seed}", config, stack)
    refuse_nested(config.out, config.data)
    filled, ours = is_filled(config.out), is_run(config.out)
    if filled and not (config.resume or config.overwrite):
        raise InputError(
            f"--out {config.out}: not empty; give --resume to go on, --overwrite to replace it"
        )
    if filled and config.overwrite and not ours:
        raise InputError(f"--overwrite: {config.out} is not the folder of a run")
    if config.resume and not ours:
        there = (config.out / CONFIG).is_file()
        why = "is not a run's" if there else "is missing"
        raise InputError(f"--resume: {config.out} holds no run ({CONFIG} {why})")
    return stack.enter_context(make_folder(config.out))


def _new_folder(name: str, config: TrainConfig, stack: contextlib.ExitStack) -> Path:
    runs = Path("runs")
    refuse_nested(runs / name, config.data)
    for number in range(1, 1_000_000):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            return stack.enter_context(make_folder(folder, new=True))
        except FileExistsError:
            continue
    raise InputError(f"--out: missing, and {runs} has a million runs of this name")


def refuse_nested(out: Path, data: DataConfig) -> None:
    """Keep a run's files out of its pictures, whose classes they would become, and the reverse.

    Raises:
        InputError: ``--out`` lies in the data set's folder, or that or a file of it in ``--out``.
    """
    named = (*PLACES, *DESCRIBING)
    files = {f"--{name}": getattr(data, name) for name in named if name != "root"}
    sources = [(flag, expand_path(file)) for flag, file in files.items() if file is not None]
    if data.root is not None:
        entry = None if data.data in OWN_DATA else catalog.CATALOG.get(data.data)
        root = expand_path(data.root)
        sources.append(("--root", root if entry is None else root / entry.folder))
    try:
        inner = out.resolve()
        places = [(flag, place, place.resolve()) for flag, place in sources]
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise InputError(f"--out {out}: cannot be compared with the data ({error})") from None
    for flag, place, where in places:
        if flag == "--root" and inner.is_relative_to(where):
            raise InputError(f"--out {out}: lies in {flag} {place}, expected another folder")
        if where.is_relative_to(inner):
            raise InputError(f"--out {out}: holds {flag} {place}, expected another folder")


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
    out = None if given.get("out") is None else expand_path(given["out"])
    if not (given.get("resume") or _goes_on(out)) or out is None or not (out / CONFIG).is_file():
        return settings.default_config(given)
    config = read_record(out / CONFIG).settings
    if (method := given.get("method", config.method)) != config.method:
        raise InputError(
            f"--resume --method {method}: the run in {out} was begun with {config.method}"
        )
    return config


def resume_or_choose_folder(
    config: TrainConfig, stack: contextlib.ExitStack
) -> tuple[TrainConfig, Path]:
    """The folder that torchrun restarts, with settings that go on with it, or a chosen one."""
    if config.out is None and restarts():
        raise InputError("--out: missing; torchrun --max-restarts needs it to find the run again")
    if _goes_on(config.out):
        config = replace(config, resume=True, overwrite=False)
    return config, choose_folder(config, stack)


def _goes_on(folder: Path | None) -> bool:
    """Whether a run in ``folder`` was begun by the same torchrun, before it lost a rank."""
    if folder is None or not restarted():
        return False
    file = folder / CONFIG
    return file.is_file() and read_record(file).launch == launch_id()


def finished_file(folder: Path, name: str) -> Path:
    """A file that a run writes when its training has ended.

    Raises:
        InputError: training has not.
    """
    file = folder / name
    if not file.is_file() and (folder / CHECKPOINT).is_file():
        raise InputError(f"{folder}: training has not finished; {how_to_go_on(folder)} goes on")
    return file


def how_to_go_on(folder: Path) -> str:
    """The command that resumes a run, as a shell takes it."""
    return f"python -m lamp_fast.train --out {shlex.quote(str(folder))} --resume"
