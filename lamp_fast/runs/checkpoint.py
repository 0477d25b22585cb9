"""The state of a run that is under way: what is written between epochs and read on resuming."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamp_fast.errors import InputError
from lamp_fast.files import write_bytes
from lamp_fast.runs.folder import CHECKPOINT, METRICS, require_checkpoint
from lamp_fast.runs.record import check_history
from lamp_fast.runs.saved import check_state
from lamp_fast.runs.selection import selected_epoch
from lamp_fast.tensors import load_tensors, save_tensors


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


@dataclass(frozen=True)
class Snapshot:
    """The resumable state of a run at the end of an epoch, as it is written.

    Attributes:
        tensors: parameters, LBO, optimiser, generator and the state of the best epoch, by the
            checkpoint's names.
        progress: the rest.
    """

    tensors: Mapping[str, Tensor]
    progress: Progress

    @classmethod
    def take(
        cls,
        method: torch.nn.Module,
        optimiser: torch.optim.Optimizer,
        progress: Progress,
        selected: Mapping[str, Tensor] | None = None,
    ) -> "Snapshot":
        """The state of now, which later steps change in place unless it is :meth:`kept`.

        ``selected`` is the method's state after the best epoch so far, where epochs are compared.
        """
        tensors = {f"method.{name}": each for name, each in method.state_dict().items()}
        for index, slots in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{slot}": each for slot, each in slots.items()}
        tensors |= {f"selected.{name}": each for name, each in (selected or {}).items()}
        tensors["generator"] = torch.get_rng_state()
        return cls(tensors, replace(progress, history=list(progress.history)))

    def kept(self) -> "Snapshot":
        """The same in memory of its own."""
        return replace(self, tensors={name: each.clone() for name, each in self.tensors.items()})

    def write(self, folder: Path, expected: bool) -> None:
        """Write the checkpoint, then the log that belongs to it.

        Args:
            folder: of the run.
            expected: whether there must be an earlier one.

        Raises:
            FileNotFoundError: the folder was removed since the last one.
        """
        if expected:
            require_checkpoint(folder)
        save_tensors(folder / CHECKPOINT, self.tensors, vars(self.progress))
        write_metrics(folder, self.progress.history)


def load_checkpoint(
    folder: Path,
    method: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    scaler: Mapping[str, Any],
) -> tuple[Progress, dict[str, Tensor] | None]:
    """Restore what :meth:`Snapshot.write` wrote; nothing is changed where it is refused.

    Args:
        folder: of the run.
        method, optimiser: what to restore.
        scaler: the loss scaler's state, whose names a saved one must have; empty without one.

    Returns:
        The progress, and the method's state after the best epoch, where epochs were compared.

    Raises:
        InputError: a damaged file, or one of another model.
    """
    file = folder / CHECKPOINT
    tensors, facts = load_tensors(file)
    progress = _progress(facts, scaler, file)
    learned = _part(tensors, "method.")
    check_state(method.state_dict(), learned, file)
    selected = _part(tensors, "selected.")
    if selected or selected_epoch(progress.history) is not None:
        check_state(method.state_dict(), selected, file)
    state = _optimiser_state(tensors, optimiser, file)
    before = torch.get_rng_state()
    try:
        torch.set_rng_state(tensors["generator"])
    except (KeyError, RuntimeError, TypeError):
        torch.set_rng_state(before)
        raise InputError(f"{file}: damaged (no state of the random generator)") from None
    method.load_state_dict(learned, strict=True)
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    return progress, selected or None


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)
    }


def _progress(facts: Any, scaler: Mapping[str, Any], file: Path) -> Progress:
    names = {"epoch", "steps", "history", "scaler"}
    if not isinstance(facts, dict) or facts.keys() != names:
        raise InputError(f"{file}: damaged (expected the facts {', '.join(sorted(names))})")
    history = check_history(facts["history"], f"{file}: history")
    for name in ("epoch", "steps"):
        if type(facts[name]) is not int or facts[name] < 0:
            raise InputError(f"{file}: {name} {facts[name]!r}: expected a number from 0")
    if facts["epoch"] != len(history):
        raise InputError(f"{file}: epoch {facts['epoch']}, but {len(history)} of them in its log")
    saved = facts["scaler"]
    if not isinstance(saved, dict) or (saved and scaler and saved.keys() != scaler.keys()):
        raise InputError(f"{file}: scaler: not the state of a loss scaler")
    for name, value in saved.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise InputError(f"{file}: scaler.{name} {value!r}: expected a number")
    return Progress(**facts)


def _optimiser_state(
    tensors: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, file: Path
) -> dict[int, dict[str, Tensor]]:
    """The slots of each parameter that has been stepped, by its number."""
    parameters = [each for group in optimiser.param_groups for each in group["params"]]
    adam = isinstance(optimiser, (torch.optim.Adam, torch.optim.AdamW))
    slots = {"step", "exp_avg", "exp_avg_sq"} if adam else {"momentum_buffer"}
    state: dict[int, dict[str, Tensor]] = {}
    for name, each in tensors.items():
        if not name.startswith("optimiser."):
            continue
        _, number, slot = (name + "..").split(".")[:3]
        known = number.isdecimal() and int(number) < len(parameters) and slot in slots
        if not known or name != f"optimiser.{int(number)}.{slot}":
            raise InputError(f"{file}: {name} is of no such optimiser")
        shape = () if slot == "step" else tuple(parameters[int(number)].shape)
        if tuple(each.shape) != shape or not each.is_floating_point():
            raise InputError(
                f"{file}: {name} is {each.dtype} {list(each.shape)}, expected floats {list(shape)}"
            )
        state.setdefault(int(number), {})[slot] = each
    for number, held in state.items():
        if missing := sorted(slots - held.keys()):
            raise InputError(f"{file}: optimiser.{number}.{missing[0]} is missing")
    return state
