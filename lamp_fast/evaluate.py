"""``python -m lamp_fast.evaluate RUN``: the closing table of a run, from its saved files alone.

With ``--data NAME --root DIR``: what the run learned, tested on another data set (cross-dataset
evaluation, domain generalisation). Those scores are kept in a folder of their own.
"""

import contextlib
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lamp_fast import cli
from lamp_fast.data import DataConfig
from lamp_fast.data.loading import report_dead_workers
from lamp_fast.data.views import TTE, Tte
from lamp_fast.errors import InputError
from lamp_fast.runs.experiment import Experiment, load_run, load_run_on
from lamp_fast.runs.folder import refuse_nested
from lamp_fast.runs.ranks import join
from lamp_fast.runs.saved import load
from lamp_fast.runs.scoring import (
    Evaluated,
    evaluate_rows,
    hold_transfer,
    results_table,
    transfer_rows,
    write_results,
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Reproduce the closing table of a run from its saved files, or test it on other data."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    data: str | None = None
    """Test on all classes of this data set instead; a name that training takes, or one of
    imagenetv2, imagenet_sketch, imagenet_a and imagenet_r. Of folder and table the test part is
    scored, of pictures without parts every one."""
    root: Path | None = None
    """As in training, for --data; without it, where the run's own pictures lie now."""
    table: Path | None = None
    """As in training, for --data table; without --data, where the run's own table lies now."""
    template: str | None = None
    """Class prompt with {} for the name; by default the data set's own."""
    skip_unreadable: bool = False
    """Count unreadable pictures of --data and go on without them."""
    tte: Tte = "as-trained"
    """on: the mean of the logits of five crops is scored; off: one view's; by default as the run
    tested."""
    out: Path | None = None
    """For --data: the folder for result.json, table.md, per_class.csv and the confusion matrix; by
    default on_NAME in the run folder."""

    @property
    def target(self) -> DataConfig | None:
        """The data set to test on; None for the run's own.

        Raises:
            InputError: a flag of --data without it.
        """
        if self.data is None:
            for name in ("template", "skip_unreadable", "out"):
                if value := getattr(self, name):
                    flag = name.replace("_", "-")
                    raise InputError(
                        f"--{flag} {value}: expected --data with it, the data set to test on"
                    )
            return None
        return DataConfig(
            data=self.data,
            root=self.root,
            table=self.table,
            template=self.template,
            skip_unreadable=self.skip_unreadable,
        )


def main(config: EvaluateConfig) -> int:
    """Print the table; scores on another data set are written, too."""
    target, saved = config.target, load(config.run)
    if target is not None and config.out is not None:
        refuse_nested(config.out, target)
    with report_dead_workers(), join(saved.record.settings.machine.device) as ranks:
        if target is None:
            again = functools.partial(load_run, root=config.root, table=config.table)
            experiment, facts = ranks.together(again, config.run, ranks)
        else:
            experiment, facts = load_run_on(config.run, target, ranks)
        experiment = experiment.with_tte(TTE[config.tte])
        cli.say(*experiment.describe())
        seconds = facts["seconds"]
        if target is None:
            rows = evaluate_rows(experiment, seconds, facts["adaptation"] is not None, ranks)
            _print_table(experiment, rows)
            return 0
        out = config.out or config.run / f"on_{experiment.benchmark.name}"
        with contextlib.ExitStack() as stack:
            ranks.once(hold_transfer, stack, out, experiment, target)
            rows = transfer_rows(experiment, seconds, ranks)
            _print_table(experiment, rows)
            ranks.once(write_results, out, experiment, rows)
            cli.say("", f"wrote   {out}")
    return 0


def _print_table(experiment: Experiment, rows: Sequence[Evaluated]) -> None:
    print("\n" + results_table([each.row(experiment.benchmark.head) for each in rows]))


if __name__ == "__main__":
    cli.run(
        EvaluateConfig,
        main,
        sys.argv[1:],
        prog="python -m lamp_fast.evaluate",
        description=__doc__,
    )
