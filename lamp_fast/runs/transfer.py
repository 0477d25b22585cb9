"""Scores of a run on another data set: their rows, and the folder that they lie in."""

import contextlib
from dataclasses import replace
from pathlib import Path

from lamp_fast.data.settings import PLACES, DataConfig
from lamp_fast.errors import InputError
from lamp_fast.fields import to_json
from lamp_fast.files import read_json, write_json
from lamp_fast.runs.experiment import Experiment
from lamp_fast.runs.folder import TARGET, hold_folder, is_filled
from lamp_fast.runs.ranks import ALONE, Ranks
from lamp_fast.runs.scoring import Evaluated, evaluate_rows


def transfer_rows(experiment: Experiment, seconds: float, ranks: Ranks = ALONE) -> list[Evaluated]:
    """Score zero-shot CLIP and a run from :func:`load_run_on`, in rows that name the data set."""
    rows = evaluate_rows(experiment, seconds, adapted=False, ranks=ranks)
    return [replace(row, name=f"{row.name} on {experiment.benchmark.name}") for row in rows]


def hold_transfer(
    stack: contextlib.ExitStack, folder: Path, experiment: Experiment, target: DataConfig
) -> None:
    """Own the folder for scores on another data set until ``stack`` closes, and say whose it is.

    Raises:
        InputError: it cannot be written, or holds something else, which is left alone.
    """
    filled, places = is_filled(folder), to_json(target.resolved())
    benchmark, program = experiment.benchmark, experiment.record()
    prior = experiment.prior
    identity = {
        "data": benchmark.name,
        "template": benchmark.template,
        "words": None if benchmark.words is None else to_json(benchmark.words),
        "sha256": experiment.data_hash,
        "prior": None if prior is None else prior.wanted,
    }
    if filled:
        file = folder / TARGET
        held = read_json(file) if file.is_file() else None
        if not isinstance(held, dict) or {name: held.get(name) for name in identity} != identity:
            raise InputError(
                f"--out {folder}: holds something else than scores on these pictures with this"
                " template and prior, expected a new folder"
            )
    stack.enter_context(hold_folder(folder))
    record = {
        **identity,
        **{name: places[name] for name in PLACES},
        "unreadable": list(experiment.unreadable),
        "tte": experiment.config.views.tte,
        **{name: program[name] for name in ("version", "commit", "torch")},
    }
    write_json(folder / TARGET, record)
