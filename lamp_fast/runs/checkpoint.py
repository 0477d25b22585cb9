"""The state of a run that is under way: what is written after each epoch and read on resuming."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamp_fast.errors import InputError
from lamp_fast.files import load_tensors, save_tensors, write_bytes
from lamp_fast.runs.folder import CHECKPOINT, METRICS


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
