"""What a run keeps on disk: tensors as safetensors, the rest as JSON, every write atomic.

Nothing here unpickles. A file is either the old one or the new one, whenever the process dies.
"""

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lamp_fast.errors import InputError

CHECKPOINT = "checkpoint.safetensors"
LEARNED = "learned.safetensors"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
LOCK = ".lock"


def write_bytes(file: Path, content: bytes) -> None:
    """Replace ``file`` as a whole: written beside it, synced, then renamed over it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except OSError as error:
        # A full disk does not say which file, and the partial one is not what the user asked for.
        error.filename, error.filename2 = str(file), None
        raise
    finally:
        partial.unlink(missing_ok=True)


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


def write_json(file: Path, value: Any) -> None:
    """Write plain JSON values, indented."""
    write_bytes(file, (json.dumps(value, indent=2) + "\n").encode())


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table with a header line.

    Cells hold names exactly as they are, for programs. A spreadsheet may take one that begins with
    ``=``, ``+``, ``-`` or ``@`` for a formula: a quote before it would be safe there, and another
    name for everybody else.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_bytes(file, text.getvalue().encode())


def read_json(file: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        InputError: naming a file that is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: expected a file of a run ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{file}: damaged ({error})") from None


def save_tensors(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write named tensors with JSON facts in the header of one safetensors file."""
    held = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    write_bytes(file, to_safetensors(held, metadata={"facts": json.dumps(facts)}))


def load_tensors(file: Path) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`save_tensors` wrote.

    Raises:
        InputError: naming a file that is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as archive:
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            facts = json.loads((archive.metadata() or {}).get("facts", "{}"))
    except FileNotFoundError:
        raise InputError(f"{file}: expected a file of a run (No such file)") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file}: damaged ({' '.join(str(error).split())})") from None
    return tensors, facts


def load_into(module: torch.nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Load a method's state.

    Raises:
        InputError: tensors of another method, model or setting.
    """
    try:
        module.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file}: not the state of this model ({reason})") from None


@dataclass
class Progress:
    """Everything but tensors that a resumed run needs.

    Attributes:
        epoch: epochs finished.
        steps: optimiser steps applied.
        history: the finished epochs' log lines.
        scaler: the loss scaler's state, empty without one.
    """

    epoch: int
    steps: int
    history: list[dict[str, Any]]
    scaler: dict[str, Any]


def write_metrics(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write the log, one JSON object an epoch."""
    lines = "".join(json.dumps(line) + "\n" for line in history)
    write_bytes(folder / METRICS, lines.encode())


def save_checkpoint(
    folder: Path, method: torch.nn.Module, optimiser: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write the resumable state of a run: parameters, LBO, optimiser, generator and log."""
    tensors = {f"method.{name}": each for name, each in method.state_dict().items()}
    for index, slots in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{slot}": each for slot, each in slots.items()}
    tensors["generator"] = torch.get_rng_state()
    save_tensors(folder / CHECKPOINT, tensors, vars(progress))


def load_checkpoint(
    folder: Path, method: torch.nn.Module, optimiser: torch.optim.Optimizer
) -> Progress:
    """Restore what :func:`save_checkpoint` wrote.

    Raises:
        InputError: a damaged file, or one of another model.
    """
    file = folder / CHECKPOINT
    tensors, facts = load_tensors(file)
    learned = {
        name.removeprefix("method."): each
        for name, each in tensors.items()
        if name.startswith("method.")
    }
    load_into(method, learned, file)
    state: dict[int, dict[str, Tensor]] = {}
    for name, each in tensors.items():
        if name.startswith("optimiser."):
            _, index, slot = name.split(".", 2)
            state.setdefault(int(index), {})[slot] = each
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    torch.set_rng_state(tensors["generator"])
    return Progress(**facts)
