"""``python -m lamp_fast.evaluate RUN``: the closing table of a run, from its saved files alone.

With ``--data NAME --root DIR``: what the run learned, tested on another data set (cross-dataset
evaluation, domain generalisation). Those scores are kept in a folder of their own.
"""

import contextlib
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from lamp_fast import checkpoint, cli, distributed, report
from lamp_fast.config import DataConfig, TrainConfig, load_config
from lamp_fast.data import Pictures, evaluation_batches
from lamp_fast.distributed import ALONE, Ranks
from lamp_fast.errors import InputError
from lamp_fast.experiment import Checked, Experiment, assemble, check_target
from lamp_fast.methods import Method, ZeroShot
from lamp_fast.metrics import Scores, group_accuracy, harmonic_mean, scores

# Says what a folder of scores on another data set was scored on.
TARGET = "target.json"


@dataclass(frozen=True)
class Evaluated:
    """One row of the closing table with what it was computed from."""

    name: str
    base: Scores
    new: Scores | None
    parameters: int
    seconds: float

    def row(self, head: np.ndarray | None) -> dict[str, Any]:
        """The row as JSON values in 0..1; None where there is nothing to report."""
        base, new = self.base, self.new
        return {
            "name": self.name,
            "acc_base": base.accuracy,
            "acc_new": None if new is None else new.accuracy,
            "hm_a": None if new is None else harmonic_mean(base.accuracy, new.accuracy),
            "f1_base": base.macro_f1,
            "f1_new": None if new is None else new.macro_f1,
            "hm_m": None if new is None else harmonic_mean(base.macro_f1, new.macro_f1),
            "head": None if head is None else group_accuracy(base.confusion, head),
            "tail": None if head is None else group_accuracy(base.confusion, ~head),
            "parameters": self.parameters,
            "seconds": self.seconds,
        }


def evaluate_rows(
    experiment: Experiment, seconds: float, adapted: bool, ranks: Ranks = ALONE
) -> list[Evaluated]:
    """Score zero-shot CLIP and the trained method on the test pictures of both halves.

    Args:
        experiment: with the trained method.
        seconds: training time, for its column.
        adapted: the method carries a bias adapted to the new classes: one more, marked row.
        ranks: the processes that share the pictures; every one gets all rows.
    """
    method = experiment.method
    zeroshot = ZeroShot(experiment.clip)
    rows = [score_method(experiment, zeroshot, zeroshot.title, 0.0, ranks)]
    if isinstance(method, ZeroShot):
        return rows
    rows.append(score_method(experiment, method, method.title, seconds, ranks))
    if adapted:
        method.use_adapted = True
        new = _score_half(experiment, method, ranks, new=True)
        method.use_adapted = False
        rows.append(replace(rows[-1], name=f"{method.title}, b_new on new (transductive)", new=new))
    return rows


def write_results(folder: Path, experiment: Experiment, rows: Sequence[Evaluated]) -> str:
    """Write table, per-class CSV, confusion matrices and the class-size plot; return the table.

    No plot where nothing was trained on the data.
    """
    benchmark = experiment.benchmark
    table_rows = [each.row(benchmark.head) for each in rows]
    table = report.results_table(table_rows)
    checkpoint.write_json(folder / checkpoint.RESULT, table_rows)
    checkpoint.write_bytes(folder / "table.md", (table + "\n").encode())
    _write_per_class(folder / "per_class.csv", experiment, rows)
    for half, names in (("base", benchmark.base_names), ("new", benchmark.new_names)):
        last = getattr(rows[min(1, len(rows) - 1)], half)
        if last is not None:
            checkpoint.write_csv(
                folder / f"confusion_{half}.csv",
                ["true \\ predicted", *names],
                ([name, *line] for name, line in zip(names, last.confusion.tolist(), strict=True)),
            )
    if benchmark.trained:
        report.plot_per_class(
            folder / "per_class.png",
            benchmark.counts,
            {each.name: each.base.per_class for each in rows[:2]},
        )
    return table


def read_learned(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The learned tensors of a finished run, and the facts stored with them.

    Raises:
        InputError: training has not finished, or the file is missing or damaged.
    """
    return checkpoint.load_tensors(_finished(folder, checkpoint.LEARNED))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The rows of the closing table of a finished run.

    Raises:
        InputError: as :func:`read_learned`.
    """
    return checkpoint.read_json(_finished(folder, checkpoint.RESULT))


def _finished(folder: Path, name: str) -> Path:
    """A file that a run writes when its training has ended."""
    file = folder / name
    if not file.is_file() and (folder / checkpoint.CHECKPOINT).is_file():
        raise InputError(
            f"{folder}: training has not finished;"
            f" python -m lamp_fast.train --out {folder} --resume goes on"
        )
    return file


def load_run(
    folder: Path, ranks: Ranks = ALONE, *, root: Path | None = None, table: Path | None = None
) -> tuple[Experiment, dict[str, Any]]:
    """Rebuild a finished run from its folder, on this rank's device.

    Args:
        folder: of the run.
        ranks: the processes that will share the pictures.
        root, table: where its pictures lie now, if not where the run found them.

    Returns:
        The experiment with its learned state, and the facts stored with that state.

    Raises:
        InputError: files missing or damaged, or data or CLIP that are no longer the run's.
    """
    config = load_config(folder / checkpoint.CONFIG)
    data = replace(config.data, root=root or config.data.root, table=table or config.data.table)
    experiment, facts = _load_run(folder, replace(config, data=data), ranks)
    then = checkpoint.read_json(folder / checkpoint.CONFIG)["data"]["sha256"]
    _refuse_another("data", folder, experiment.data_hash, then)
    return experiment, facts


def load_run_on(
    folder: Path, target: DataConfig, ranks: Ranks = ALONE
) -> tuple[Experiment, dict[str, Any]]:
    """Rebuild a finished run to test it on another data set; its own pictures are not needed.

    The target's names and template take the place of the run's classes, and the load-balancing bias
    is b_base. :func:`transfer_rows` scores the result.

    Args:
        folder: of the run.
        target: the data set to test on; how it would be drawn from for training does not matter.
        ranks: the processes that will share the pictures.

    Raises:
        InputError: as :func:`load_run`, or a target that is missing, incomplete or malformed.
    """
    ranks.together(read_learned, folder)  # refused before a large data set is read
    checked = ranks.once(check_target, target)
    config = load_config(folder / checkpoint.CONFIG)
    experiment, facts = ranks.together(_load_run, folder, config, ranks, checked)
    benchmark, unreadable, _ = checked
    return replace(experiment, benchmark=benchmark, unreadable=unreadable), facts


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
    filled = checkpoint.is_filled(folder)
    benchmark, program = experiment.benchmark, experiment.record()
    identity = {
        "data": benchmark.name,
        "template": benchmark.template,
        "sha256": experiment.data_hash,
    }
    if filled:
        file = folder / TARGET
        held = checkpoint.read_json(file) if file.is_file() else None
        if not isinstance(held, dict) or {name: held.get(name) for name in identity} != identity:
            raise InputError(
                f"--out {folder}: holds something else than scores on these pictures with this"
                " template, expected a new folder"
            )
    stack.enter_context(checkpoint.hold_folder(folder))
    record = {
        **identity,
        "root": None if target.root is None else str(target.root.expanduser().absolute()),
        "table": None if target.table is None else str(target.table.expanduser().absolute()),
        "unreadable": list(experiment.unreadable),
        **{name: program[name] for name in ("version", "commit", "torch")},
    }
    checkpoint.write_json(folder / TARGET, record)


def _load_run(
    folder: Path, config: TrainConfig, ranks: Ranks, target: Checked | None = None
) -> tuple[Experiment, dict[str, Any]]:
    """A run with its learned state; with a target, over that one's pictures instead of its own."""
    record = checkpoint.read_json(folder / checkpoint.CONFIG)
    tensors, facts = read_learned(folder)
    if target is not None:
        # A method may hold state by class: it is built for the classes that the run knew.
        own = ("base_names", "new_names")
        named = replace(target[0], **{each: tuple(record["data"][each]) for each in own})
        target = (named, *target[1:])
    experiment = assemble(distributed.place(config, ranks), target)
    clip = experiment.clip.identity.fingerprint
    _refuse_another("CLIP weights", folder, clip, record["clip"]["fingerprint"])
    checkpoint.load_into(experiment.method, tensors, folder / checkpoint.LEARNED)
    return experiment, facts


def _refuse_another(what: str, folder: Path, now: str, then: str) -> None:
    if now != then:
        raise InputError(
            f"{folder}: the {what} are not those of the run (sha256 {now[:12]}, then {then[:12]})"
        )


def score_method(
    experiment: Experiment, method: Method, name: str, seconds: float, ranks: Ranks = ALONE
) -> Evaluated:
    """Score one method on the test pictures, as a row of that name and training time."""
    new = len(experiment.benchmark.new_names) > 0
    return Evaluated(
        name=name,
        base=_score_half(experiment, method, ranks, new=False),
        new=_score_half(experiment, method, ranks, new=True) if new else None,
        parameters=method.trainable_parameters(),
        seconds=seconds,
    )


def _score_half(experiment: Experiment, method: Method, ranks: Ranks, *, new: bool) -> Scores:
    benchmark = experiment.benchmark
    names = benchmark.new_names if new else benchmark.base_names
    pictures = benchmark.test_new if new else benchmark.test_base
    predicted = _predict(experiment, method, names, pictures, ranks)
    return scores(pictures.labels, predicted, len(names))


def _predict(
    experiment: Experiment,
    method: Method,
    names: Sequence[str],
    pictures: Pictures,
    ranks: Ranks,
) -> np.ndarray:
    """The predicted class of every picture, int64 [N].

    Ranks share whole batches, so that each is computed as one process alone would.
    """
    machine = experiment.config.machine
    count = len(pictures)
    mine = ranks.rows(len(distributed.batch_sizes(count, machine.test_batch)))
    first, end = (min(edge * machine.test_batch, count) for edge in (mine.start, mine.stop))
    pictures = pictures.select(range(first, end))
    classes = method.prepare(names, experiment.benchmark.template)
    batches = evaluation_batches(
        pictures, experiment.test_transform, machine.test_batch, workers=machine.workers
    )
    predicted = [torch.empty(0, dtype=torch.int64)]
    quiet = None if ranks.first else True
    bar = tqdm(batches, desc="evaluating", leave=False, disable=quiet)
    for images, _, _ in experiment.on_device(bar):
        predicted.append(method.logits(images, classes).argmax(1).cpu())
    return np.concatenate(ranks.gather(torch.cat(predicted).numpy()))


def _write_per_class(file: Path, experiment: Experiment, rows: Sequence[Evaluated]) -> None:
    benchmark = experiment.benchmark
    header = ["half", "class", "training_pictures", "test_pictures", "group"]
    header += [f"accuracy: {each.name}" for each in rows]
    lines = []
    for half, names in (("base", benchmark.base_names), ("new", benchmark.new_names)):
        for index, name in enumerate(names):
            test = getattr(rows[0], half).confusion[index].sum()
            if half == "new":
                count, group = 0, "new"
            else:
                count = int(benchmark.counts[index])
                head = benchmark.head
                group = "n/a" if head is None else "head" if head[index] else "tail"
            accuracies = (f"{getattr(each, half).per_class[index]:.6f}" for each in rows)
            shown = half if benchmark.new_names else "all"
            lines.append([shown, name, count, int(test), group, *accuracies])
    checkpoint.write_csv(file, header, lines)


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
    file, target = config.run / checkpoint.CONFIG, config.target
    checkpoint.read_json(file)
    with distributed.join(load_config(file).machine.device) as ranks:
        if target is None:
            load = functools.partial(load_run, root=config.root, table=config.table)
            experiment, facts = ranks.together(load, config.run, ranks)
        else:
            experiment, facts = load_run_on(config.run, target, ranks)
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
    print("\n" + report.results_table([each.row(experiment.benchmark.head) for each in rows]))


if __name__ == "__main__":
    cli.run(
        EvaluateConfig,
        main,
        sys.argv[1:],
        prog="python -m lamp_fast.evaluate",
        description=__doc__,
    )
