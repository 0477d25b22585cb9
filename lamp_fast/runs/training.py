"""A run from its settings to its folder: train, adapt to new classes, score, draw."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lamp_fast import cli
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.clip.usage import completed_record
from lamp_fast.data.loading import report_dead_workers
from lamp_fast.data.settings import DESCRIBING, PLACES
from lamp_fast.errors import InputError
from lamp_fast.fields import flag_of, parse_layers
from lamp_fast.files import write_json
from lamp_fast.runs import figures
from lamp_fast.runs.config import TrainConfig, from_saved, to_saved
from lamp_fast.runs.experiment import Experiment, assemble, check_data, load_run
from lamp_fast.runs.fitted import Fitted, fit, write_fitted
from lamp_fast.runs.folder import (
    ANSWERS,
    CHECKPOINT,
    CONFIG,
    HOLDOUT,
    LEARNED,
    METRICS,
    VALIDATION,
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
from lamp_fast.runs.record import Record, read_history, read_record
from lamp_fast.runs.scoring import Evaluated, evaluate_rows, write_results
from lamp_fast.runs.selection import selected_epoch, summary
from lamp_fast.runs.tensorboard import need_tensorboard
from lamp_fast.runs.trainer import NonFiniteLossError, Trainer, adapt_to_new_classes
from lamp_fast.runs.validation import validation_logits
from lamp_fast.tensors import save_tensors

# What of a run's record says where files lie; a resumed run compares their content by hash.
_PLACES = {
    "data": (*PLACES, *DESCRIBING, "unreadable"),
    "clip": ("pretrained", "weights", "weights_of"),
}


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
        free = group in ("out", "config", "machine", "tensorboard", "union")
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


def _run(
    config: TrainConfig,
    folder: Path,
    ranks: Ranks,
    clip: FrozenClip | None = None,
    *,
    scored: bool = True,
) -> int:
    """One run; ``clip`` is of the settings where it is built, and without ``scored`` its test
    pictures are not looked at."""
    ranks.together(_refuse_split_batches, config, ranks)
    # A large data set is read by one process, not by all at the same time.
    checked = None if ranks.size == 1 else ranks.once(check_data, config)
    placed = place(replace(config, out=folder), ranks)
    begun = ranks.once(read_record, folder / CONFIG) if config.resume else None
    experiment = ranks.together(assemble, placed, checked, begun, None, clip)
    cli.say(*experiment.describe())
    if begun is not None:
        ranks.once(_refuse_other_settings, experiment, begun, folder)
    trainer = Trainer(experiment, folder, ranks)
    if experiment.device.type == "cuda" and trainer.parameters:
        reason = trainer.not_captured
        print("step    one CUDA graph" if reason is None else f"step    not captured: {reason}")
    if trainer.parameters and (config.machine.ahead is not None or trainer.ahead.why_not is None):
        print(f"ahead   {trainer.ahead.describe()}")
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
            compared = trainer.progress.history
            if experiment.config.selection.retrain:
                compared = _search_epoch(experiment, folder / HOLDOUT, ranks)
                trainer.last_epoch = selected_epoch(compared)
            if trainer.parameters:
                trainer.run()
            cli.say(*_about_choice(trainer))
            experiment.method.settle(trainer.training)
            finish(experiment, trainer, folder, ranks, compared, scored=scored)
        except _DivergedError as error:
            return error.code
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped after epoch {trainer.progress.epoch}; {how_to_go_on(folder)} goes on"
            ) from None
        except NonFiniteLossError as error:
            cli.say(f"error: {error}", stream=sys.stderr)
            return 1
    return 0


class _DivergedError(Exception):
    """The run that would have chosen an epoch diverged, and has said so."""

    def __init__(self, code: int) -> None:
        self.code = code


def _search_epoch(experiment: Experiment, folder: Path, ranks: Ranks) -> list[dict[str, Any]]:
    """The log of the run that leaves classes out, in a folder of its own, where it goes on if it
    was begun. It has the settings of ``experiment``, and looks at no test picture."""
    settings = experiment.config
    config = replace(
        settings,
        out=folder,
        resume=ranks.once((folder / CONFIG).is_file),
        overwrite=False,
        selection=replace(settings.selection, retrain=False),
    )
    if not ranks.once((folder / LEARNED).is_file):
        # What training on all classes draws does not depend on what was drawn here.
        with torch.random.fork_rng():
            code = _run(config, folder, ranks, experiment.clip, scored=False)
        if code:
            raise _DivergedError(code)
    return ranks.once(read_history, folder / METRICS)


def _about_choice(trainer: Trainer) -> list[str]:
    """Which epoch is kept, and why, in a line; none where it is the last as a matter of course."""
    experiment, history = trainer.experiment, trainer.progress.history
    selection = experiment.config.selection
    if selection.select != "best":
        return []
    if not trainer.parameters:
        return [f"select  {experiment.method.entry.title} has no epochs to choose between"]
    if selection.retrain:
        count = len(experiment.benchmark.base_names)
        return [f"select  trained again on all {count} base classes, to epoch {trainer.last_epoch}"]
    epoch = selected_epoch(history)
    line = history[epoch - 1]
    figures = f"macro-F1 {100 * line['val_macro_f1']:.2f}%"
    if "val_macro_f1_held_out" in line:
        figures = (
            f"harmonic mean {100 * line['val_score']:.2f}% of {figures} on the trained classes and"
            f" {100 * line['val_macro_f1_held_out']:.2f}% on those held out"
        )
    looked = sum(each.get("val_seconds", 0.0) for each in history)
    share = looked / (looked + sum(each["seconds"] for each in history))
    stopped = ""
    if len(history) < trainer.optim.epochs:
        stopped = f" ({trainer.optim.epochs} planned, --patience {selection.patience})"
    return [
        f"select  epoch {epoch} of {len(history)}{stopped}, {figures},"
        f" {len(trainer.validation):,} validation pictures; scoring them took {share:.0%} of the"
        " time"
    ]


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
    compared: Sequence[Mapping[str, Any]] = (),
    *,
    scored: bool = True,
) -> None:
    """Adapt, save what was learned and the scores of validation pictures, score the test pictures
    and draw the figures.

    The seconds of a run are those of its epochs, of choosing one, and of the run that chose it; of
    a method that has none, those that it took to read the training set, where features that were
    not kept are computed.

    Args:
        experiment, trainer, folder, ranks: of the run.
        compared: the log of the epochs that one was chosen of: the run's own, or another's.
        scored: whether the test pictures are looked at.
    """
    progress = trainer.progress
    adaptation = adapt_to_new_classes(experiment, ranks)
    if progress.epoch:
        ranks.once(require_checkpoint, folder)
    retrained = experiment.config.selection.retrain
    logs = [progress.history, compared] if retrained else [progress.history]
    lines = itertools.chain(*logs)
    seconds = sum(line["seconds"] + line.get("val_seconds", 0.0) for line in lines)
    if not trainer.parameters:
        seconds = trainer.reading_seconds
    facts = {
        "seconds": seconds,
        "epochs": progress.epoch,
        "selected": selected_epoch(compared),
        "adaptation": adaptation,
    }
    state = experiment.method.state_dict()
    fitted = _fit_answers(experiment, state, folder, ranks)
    ranks.once(save_tensors, folder / LEARNED, state, facts)
    ranks.once(_draw_curves, folder, progress.history, compared)
    if scored:
        experiment = replace(experiment, fitted=fitted)
        rows = _test(experiment, facts, compared, ranks)
        ranks.once(_write_outcome, experiment, folder, rows)


def test_run(folder: Path) -> tuple[Experiment, list[Evaluated]]:
    """Score a run that was trained without its test pictures, and leave the results in its folder.

    Raises:
        InputError: see :func:`lamp_fast.runs.experiment.load_run`.
    """
    experiment, facts = load_run(folder)
    retrained = experiment.config.selection.retrain
    compared = read_history((folder / HOLDOUT if retrained else folder) / METRICS)
    rows = _test(experiment, facts, compared, ALONE)
    _write_outcome(experiment, folder, rows)
    return experiment, rows


def _test(
    experiment: Experiment,
    facts: Mapping[str, Any],
    compared: Sequence[Mapping[str, Any]],
    ranks: Ranks,
) -> list[Evaluated]:
    """Score the test pictures; the method's row says which epoch was chosen."""
    rows = evaluate_rows(experiment, facts["seconds"], facts["adaptation"] is not None, ranks)
    if (choice := summary(compared)) is not None:
        rows[1] = replace(rows[1], selection=choice)
    return rows


def _fit_answers(
    experiment: Experiment, state: Mapping[str, Any], folder: Path, ranks: Ranks
) -> Fitted | None:
    """Keep the scores of validation pictures, and what is fitted on them; None where there are
    none."""
    if not len(experiment.benchmark.val):
        return None
    config, method = experiment.config, experiment.method
    logits, labels = validation_logits(experiment, method, ranks)
    ranks.once(save_tensors, folder / VALIDATION, {"logits": logits, "labels": labels}, {})
    fitted = fit(
        logits,
        labels,
        cosine_scale=method.cosine_scale,
        head=experiment.benchmark.head,
        state=state,
        seed=config.seed,
        selected=config.selection.select == "best" or config.own.uses_validation,
        tte=config.views.tte,
    )
    ranks.once(write_fitted, folder / ANSWERS, fitted, state)
    return fitted


def _draw_curves(
    folder: Path, history: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]]
) -> None:
    figures.plot_validation(folder / "validation.png", compared)
    if history:
        figures.plot_curves(folder / "curves.png", history)
        figures.plot_activations(folder / "activations.png", history)


def _write_outcome(experiment: Experiment, folder: Path, rows: Sequence[Evaluated]) -> None:
    table = write_results(folder, experiment, rows)
    print("\n" + table)
    if (found := rows[-1].reliability) is not None:
        cli.say("", *found.lines())


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
        if not before or isinstance(before[0], str):
            return [value]
        try:
            return list(parse_layers(value))
        except ValueError as error:
            raise InputError(str(error)) from None
    return list(value) if isinstance(before, list) and isinstance(value, Iterable) else value
