"""``python -m lamp_fast.evaluate RUN``: the closing table of a run, from its saved files alone.

With ``--data NAME --root DIR``: what the run learned, tested on another data set (cross-dataset
evaluation, domain generalisation). Those scores are kept in a folder of their own. ``--prior``
corrects the scores of either to other shares of classes than training had.
"""

import contextlib
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lamp_fast import cli
from lamp_fast.answers.asked import COVERAGE
from lamp_fast.data.settings import PLACES, TTE, DataConfig, Tte
from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds, TextOrNone, validate
from lamp_fast.runs.folder import refuse_nested

if TYPE_CHECKING:
    from lamp_fast.runs.experiment import Experiment
    from lamp_fast.runs.prior import Prior
    from lamp_fast.runs.scoring import Evaluated

_COLUMNS = ("path_column", "label_column")


@dataclass(frozen=True)
class EvaluateConfig:
    """Reproduce the closing table of a run from its saved files, or test it on other data."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    data: str | None = None
    """Test on all classes of this data set instead; a name that training takes, or one of
    imagenetv2, imagenet_sketch, imagenet_a and imagenet_r. Of folder and table the test part is
    scored, of pictures without parts every one; list needs --test alone."""
    root: Path | None = None
    """As in training, for --data; without it, where the run's own pictures lie now."""
    table: Path | None = None
    """As in training, for --data table; without --data, where the run's own table lies now."""
    train: Path | None = None
    """As --table, for --data list."""
    val: Path | None = None
    """As --table, for --data list."""
    test: Path | None = None
    """As --table, for --data list."""
    names: Path | None = None
    """As --table, for --data list, webdataset and hf."""
    path_column: str = DataConfig.path_column
    """As in training, for --data."""
    label_column: str = DataConfig.label_column
    """As in training, for --data."""
    level: str | None = None
    """As in training, for --data inaturalist2018."""
    template: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """As in training, for --data."""
    descriptions: Path | None = None
    """As in training, for --data."""
    hierarchy: Path | None = None
    """As in training: scores are also given at each level above the classes, in result.json; of the
    run's own pictures they are printed."""
    levels: tuple[str, ...] = ()
    """As in training, of --hierarchy or, for --data table, of its table."""
    skip_unreadable: bool = False
    """Count unreadable pictures of --data and go on without them."""
    tte: Tte = "as-trained"
    """on: the mean of the logits of five crops is scored; off: one view's; by default as the run
    tested."""
    union: bool = False
    """Also show how base and new names do when all are asked for at once."""
    out: Path | None = None
    """For --data: the folder for result.json, table.md, per_class.csv and the confusion matrix; by
    default on_NAME in the run folder, with --prior on_NAME_prior_WORD."""
    prior: TextOrNone = None
    """Correct the scores to these shares of classes among the test pictures, whatever training's
    were: uniform, every class alike; train, those of the training pictures; or a JSON file
    {"cat": 0.9, "dog": 0.1} of every class. none leaves scores as they are."""
    coverage: Annotated[float, Bounds(above=0, below=1)] = COVERAGE
    """Of a run with validation pictures: how often the sets of names that are judged shall hold the
    right one."""

    @property
    def places(self) -> dict[str, Path | None]:
        """Where files lie, of the run's own pictures or of those of --data."""
        return {name: getattr(self, name) for name in PLACES}

    @property
    def target(self) -> DataConfig | None:
        """The data set to test on; None for the run's own.

        Raises:
            InputError: a flag of --data without it.
        """
        if self.data is None:
            if self.levels and self.hierarchy is None:
                raise InputError(
                    f"--levels {' '.join(self.levels)}: expected --hierarchy with them"
                )
            named = ("template", "descriptions", "level", "skip_unreadable", "out", *_COLUMNS)
            for name in named:
                value = getattr(self, name)
                if value != getattr(EvaluateConfig, name):
                    flag = name.replace("_", "-")
                    shown = value[0] if isinstance(value, tuple) else value
                    raise InputError(
                        f"--{flag} {shown}: expected --data with it, the data set to test on"
                    )
            return None
        return DataConfig(
            data=self.data,
            **self.places,
            path_column=self.path_column,
            label_column=self.label_column,
            level=self.level,
            template=self.template,
            descriptions=self.descriptions,
            hierarchy=self.hierarchy,
            levels=self.levels,
            skip_unreadable=self.skip_unreadable,
        )


def main(config: EvaluateConfig) -> int:
    """Print the table; scores on another data set are written, too."""
    validate(config)
    target, prior = config.target, None
    from lamp_fast.data.loading import report_dead_workers
    from lamp_fast.runs.experiment import load_run, load_run_on
    from lamp_fast.runs.prior import Prior, read_prior
    from lamp_fast.runs.ranks import join
    from lamp_fast.runs.saved import load
    from lamp_fast.runs.scoring import evaluate_rows, write_results
    from lamp_fast.runs.transfer import hold_transfer, transfer_rows

    saved = load(config.run)
    if (wanted := read_prior(config.prior)) is not None:
        data = saved.record.data
        prior = Prior(wanted, saved.record.settings.optim, data.base_names, data.counts)
        if target is None:
            prior.check([*data.base_names, *data.new_names])
    if target is not None and config.out is not None:
        refuse_nested(config.out, target)
    with report_dead_workers(), join(saved.record.settings.machine.device) as ranks:
        if target is None:
            again = functools.partial(load_run, **config.places)
            experiment, facts = ranks.together(again, config.run, ranks)
        else:
            experiment, facts = load_run_on(config.run, target, ranks)
        experiment = experiment.with_tte(TTE[config.tte])
        shown = replace(experiment.config, union=config.union)
        experiment = replace(experiment, config=shown, coverage=config.coverage)
        if target is None:
            experiment = _with_levels(experiment, config)
        cli.say(*experiment.describe())
        if prior is not None:
            experiment = _with_prior(experiment, prior)
            cli.say(f"prior   {_about_prior(config.prior)}")
        seconds = facts["seconds"]
        if target is None:
            rows = evaluate_rows(experiment, seconds, facts["adaptation"] is not None, ranks)
            rows = _name_prior(experiment, rows)
            _print_table(experiment, rows)
            return 0
        name = f"on_{experiment.benchmark.name}"
        if experiment.prior is not None:
            name += f"_prior_{experiment.prior.word}"
        out = config.out or config.run / name
        with contextlib.ExitStack() as stack:
            ranks.once(hold_transfer, stack, out, experiment, target)
            rows = _name_prior(experiment, transfer_rows(experiment, seconds, ranks))
            _print_table(experiment, rows)
            ranks.once(write_results, out, experiment, rows)
            cli.say("", f"wrote   {out}")
    return 0


def _with_levels(experiment: "Experiment", config: EvaluateConfig) -> "Experiment":
    """The same, also to be scored at the levels of a file."""
    from lamp_fast.data.sources.hierarchy import read_levels

    benchmark = experiment.benchmark
    names = (*benchmark.base_names, *benchmark.new_names)
    levels = read_levels(config.hierarchy, config.levels, None, names)
    if levels is None:
        return experiment
    return replace(experiment, benchmark=replace(benchmark, hierarchy=levels))


def _with_prior(experiment: "Experiment", prior: "Prior") -> "Experiment":
    """The same, to be scored for other shares of classes.

    Raises:
        InputError: what the names or a method cannot serve; nothing has been scored.
    """
    from lamp_fast.methods.zeroshot import ZeroShot

    halves = [experiment.benchmark.base_names, experiment.benchmark.new_names]
    prior.check([*halves[0], *halves[1]])
    for names in filter(None, halves):
        for method in (ZeroShot(experiment.clip), experiment.method):
            prior.shift(method, names)
    return replace(experiment, prior=prior)


def _about_prior(given: str | None) -> str:
    return {
        "uniform": "uniform: scores as if test classes were of one size",
        "train": "train: scores as if test classes had the shares of the training pictures",
    }.get(given, f"{given}: scores as if test classes had these shares")


def _name_prior(experiment: "Experiment", rows: "Sequence[Evaluated]") -> "list[Evaluated]":
    prior = experiment.prior
    if prior is None:
        return list(rows)
    return [replace(row, name=f"{row.name}, prior {prior.word}") for row in rows]


def _print_table(experiment: "Experiment", rows: "Sequence[Evaluated]") -> None:
    from lamp_fast.runs.reliability import why_not_judged
    from lamp_fast.runs.scoring import levels_table, results_table

    table_rows = [each.row(experiment.benchmark) for each in rows]
    union = experiment.config.union
    print("\n" + results_table(table_rows, experiment.caution, union=union))
    if told := levels_table(table_rows):
        print("\n" + told)
    if (found := rows[-1].reliability) is not None:
        cli.say("", *found.lines())
    if (why := why_not_judged(experiment)) is not None:
        cli.say("", f"answers not judged: {why}")


if __name__ == "__main__":
    cli.run(
        EvaluateConfig,
        main,
        sys.argv[1:],
        prog="python -m lamp_fast.evaluate",
        description=__doc__,
    )
