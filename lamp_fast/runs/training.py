"""A run from its settings to its folder: train, adapt to new classes, score, draw."""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamp_fast import cli
from lamp_fast.clip.load import completed_record
from lamp_fast.data.loading import report_dead_workers
from lamp_fast.data.settings import PLACES
from lamp_fast.errors import InputError
from lamp_fast.fields import flag_of, parse_layers
from lamp_fast.files import write_json
from lamp_fast.runs import figures
from lamp_fast.runs.checkpoint import Progress
from lamp_fast.runs.config import TrainConfig, from_saved, to_saved
from lamp_fast.runs.experiment import Experiment, assemble, check_data, load_run
from lamp_fast.runs.folder import (
    CHECKPOINT,
    CONFIG,
    LEARNED,
    choose_folder,
    clear_folder,
    hold_folder,
    how_to_go_on,
    require_checkpoint,
    resume_or_choose_folder,
    resumed_defaults,
)
from lamp_fast.runs.launch import launch_id
from lamp_fast.runs.ranks import ALONE, Ranks, join, place
from lamp_fast.runs.record import Record, read_record
from lamp_fast.runs.scoring import Evaluated, evaluate_rows, write_results
from lamp_fast.runs.tensorboard import need_tensorboard
from lamp_fast.runs.trainer import NonFiniteLossError, Trainer, adapt_to_new_classes
from lamp_fast.tensors import save_tensors

# What of a run's record says where files lie; a resumed run compares their content by hash.
_PLACES = {"data": (*PLACES, "unreadable"), "clip": ("pretrained", "weights", "weights_of")}


def _by_flag(values: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """Settings by group and name; one that is in no group by its name twice."""
    return {
        (group, name): value
        for group, each in values.items()
        for name, value in (each.items() if isinstance(each, dict) else [(group, each)])
    }


def _refuse_other_settings(experiment: Experiment, record: Record, folder: Path) -> None:
    """A resumed run must be the run that was begun, wherever its files lie now."""
    now = experiment.record()
    then = {**record.values, "clip": completed_record(record.values["clip"])}
    begun = _by_flag(to_saved(record.settings))
    for (group, name), value in _by_flag(now["settings"]).items():
        free = group in ("out", "config", "machine", "tensorboard")
        if free or name in _PLACES.get(group, ()) or value == begun[group, name]:
            continue
        before = begun[group, name]
        raise InputError(
            f"--resume {flag_of(name)} {value}: the run in {folder} was begun with {before}"
        )
    for kind, places in _PLACES.items():
        found = [{**each[kind], **dict.fromkeys(places)} for each in (then, now)]
        if found[0] != found[1]:
            raise InputError(f"--resume: the {kind} differs from the run in {folder}")


def train(config: TrainConfig, *, scored: bool = True) -> int:
    """Train, adapt, score, and leave everything in the run folder.

    Args:
        config: the settings.
        scored: False leaves the test pictures alone, for a run whose settings may yet lose against
            others; :func:`test_run` scores it then.

    Returns:
        An exit code: 0, or 1 where training diverged.

    Raises:
        InputError: a setting that cannot be served; nothing has been written.
    """
    if config.tensorboard:
        need_tensorboard()
    # A folder that was made for a run that is refused goes again.
    with (
        report_dead_workers(),
        join(config.machine.device) as ranks,
        contextlib.ExitStack() as made,
    ):
        return _run(*ranks.once(resume_or_choose_folder, config, made), ranks, scored=scored)


def _refuse_split_batches(config: TrainConfig, ranks: Ranks) -> None:
    """Ranks take parts of each batch, which not every loss can be put together from."""
    if ranks.size > 1 and not config.optim.splits_batches:
        raise InputError(
            f"--loss {config.optim.loss}: compares the pictures of a whole batch, expected one"
            f" process, got {ranks.size}"
        )


def _run(config: TrainConfig, folder: Path, ranks: Ranks, *, scored: bool = True) -> int:
    ranks.together(_refuse_split_batches, config, ranks)
    # A large data set is read by one process, not by all at the same time.
    checked = None if ranks.size == 1 else ranks.once(check_data, config)
    placed = place(replace(config, out=folder), ranks)
    begun = ranks.once(read_record, folder / CONFIG) if config.resume else None
    experiment = ranks.together(assemble, placed, checked, begun)
    cli.say(*experiment.describe())
    if begun is not None:
        ranks.once(_refuse_other_settings, experiment, begun, folder)
    trainer = Trainer(experiment, folder, ranks)
    if experiment.device.type == "cuda" and trainer.parameters:
        reason = trainer.not_captured
        print("step    one CUDA graph" if reason is None else f"step    not captured: {reason}")
    with contextlib.ExitStack() as stack:
        ranks.once(_enter, stack, config, folder)
        if config.resume and ranks.once((folder / CHECKPOINT).is_file):
            ranks.together(trainer.restore)
            epochs = experiment.config.optim.epochs
            print(f"resume  after epoch {trainer.progress.epoch} of {epochs}")
        else:
            ranks.once(_begin, trainer)
        cli.say(f"run     {folder}")
        try:
            if trainer.parameters:
                trainer.run()
            experiment.method.settle(trainer.training)
            finish(experiment, trainer, folder, ranks, scored=scored)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped after epoch {trainer.progress.epoch}; {how_to_go_on(folder)} goes on"
            ) from None
        except NonFiniteLossError as error:
            cli.say(f"error: {error}", stream=sys.stderr)
            return 1
    return 0


def _enter(stack: contextlib.ExitStack, config: TrainConfig, folder: Path) -> None:
    """Own the folder until ``stack`` closes; another run may have filled it since it was chosen."""
    stack.enter_context(hold_folder(folder))
    choose_folder(replace(config, out=folder), stack)


def _begin(trainer: Trainer) -> None:
    """Leave nothing of a run to be replaced, then write what this one starts from."""
    folder, experiment = trainer.folder, trainer.experiment
    if experiment.config.overwrite and (kept := clear_folder(folder)):
        cli.say(f"kept    {', '.join(map(repr, kept))}: not written by a run")
    record = experiment.record()
    if (launch := launch_id()) is not None:
        record["launch"] = launch
    write_json(folder / CONFIG, record)
    trainer.save()


def finish(
    experiment: Experiment,
    trainer: Trainer,
    folder: Path,
    ranks: Ranks = ALONE,
    *,
    scored: bool = True,
) -> None:
    """Adapt, save what was learned, draw the curves and, where it is to be ``scored``, test it.

    The seconds of a run are those of its epochs; of a method that has none, those that it took to
    read the training set, where features that were not kept are computed.
    """
    progress = trainer.progress
    adaptation = adapt_to_new_classes(experiment, ranks)
    if progress.epoch:
        ranks.once(require_checkpoint, folder)
    seconds = sum(line["seconds"] for line in progress.history)
    if not trainer.parameters:
        seconds = trainer.reading_seconds
    facts = {"seconds": seconds, "epochs": progress.epoch, "adaptation": adaptation}
    method = experiment.method
    ranks.once(save_tensors, folder / LEARNED, method.state_dict(), facts)
    ranks.once(_draw_curves, progress, folder)
    if scored:
        rows = evaluate_rows(experiment, seconds, adaptation is not None, ranks)
        ranks.once(_write_outcome, experiment, folder, rows)


def test_run(folder: Path) -> tuple[Experiment, list[Evaluated]]:
    """Score a run that was trained without its test pictures, and leave the results in its folder.

    Raises:
        InputError: see :func:`lamp_fast.runs.experiment.load_run`.
    """
    experiment, facts = load_run(folder)
    rows = evaluate_rows(experiment, facts["seconds"], facts["adaptation"] is not None)
    _write_outcome(experiment, folder, rows)
    return experiment, rows


def _draw_curves(progress: Progress, folder: Path) -> None:
    if progress.history:
        figures.plot_curves(folder / "curves.png", progress.history)
        figures.plot_activations(folder / "activations.png", progress.history)


def _write_outcome(experiment: Experiment, folder: Path, rows: Sequence[Evaluated]) -> None:
    table = write_results(folder, experiment, rows)
    print("\n" + table)
    if experiment.clip.identity.random:
        print("\nThe CLIP's weights are random: these accuracies mean nothing.")


def training_settings(given: Mapping[str, Any]) -> TrainConfig:
    """Settings of keywords: presets, saved configs and runs to go on with set the defaults, as on
    the command line.

    Args:
        given: values by the flags' names with underscores; layers as "3..12" or as numbers.

    Raises:
        InputError: an unknown name, or a value of another kind.
    """
    values = to_saved(resumed_defaults(given))
    holders = {name: values for name, each in values.items() if not isinstance(each, dict)}
    for group in values.values():
        holders |= dict.fromkeys(group, group) if isinstance(group, dict) else {}
    for name, value in given.items():
        if name not in holders:
            raise InputError(f"{name}: not a setting of training --method {values['method']}")
        holders[name][name] = _as_json(value, holders[name][name])
    return from_saved(values, "train")


def _as_json(value: Any, before: Any) -> Any:
    """A keyword's value as ``config.json`` would hold it, where ``before`` stands."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping) and isinstance(before, str):
        return json.dumps(dict(value), default=str)
    if isinstance(before, list) and isinstance(value, str):
        try:
            return list(parse_layers(value))
        except ValueError as error:
            raise InputError(str(error)) from None
    return list(value) if isinstance(before, list) and isinstance(value, Iterable) else value
