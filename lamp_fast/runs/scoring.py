"""Scores of a run on test pictures, of its own data or another set, and the tables of them."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from lamp_fast.cli import expand_path
from lamp_fast.data import DataConfig, Pictures, evaluation_batches
from lamp_fast.errors import InputError
from lamp_fast.files import read_json, write_bytes, write_csv, write_json
from lamp_fast.methods import Method, ZeroShot
from lamp_fast.runs import figures
from lamp_fast.runs.experiment import Experiment
from lamp_fast.runs.folder import RESULT, TARGET, hold_folder, is_filled
from lamp_fast.runs.metrics import Scores, group_accuracy, harmonic_mean, scores
from lamp_fast.runs.ranks import ALONE, Ranks, batch_sizes

COLUMNS = (
    ("acc_base", "acc base"),
    ("acc_new", "acc new"),
    ("hm_a", "HM-A"),
    ("f1_base", "F1 base"),
    ("f1_new", "F1 new"),
    ("hm_m", "HM-M"),
    ("head", "head acc"),
    ("tail", "tail acc"),
)
UNDIVIDED_COLUMNS = (
    ("acc_base", "accuracy"),
    ("f1_base", "macro-F1"),
    ("head", "head acc"),
    ("tail", "tail acc"),
)


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
        new = _score_half(experiment, method, ranks, new=True, adapted=True)
        rows.append(replace(rows[-1], name=f"{method.title}, b_new on new (transductive)", new=new))
    return rows


def write_results(folder: Path, experiment: Experiment, rows: Sequence[Evaluated]) -> str:
    """Write table, per-class CSV, confusion matrices and the class-size plot; return the table.

    No plot where nothing was trained on the data.
    """
    benchmark = experiment.benchmark
    table_rows = [each.row(benchmark.head) for each in rows]
    table = results_table(table_rows)
    write_json(folder / RESULT, table_rows)
    write_bytes(folder / "table.md", (table + "\n").encode())
    _write_per_class(folder / "per_class.csv", experiment, rows)
    for half, names in (("base", benchmark.base_names), ("new", benchmark.new_names)):
        last = getattr(rows[min(1, len(rows) - 1)], half)
        if last is not None:
            write_csv(
                folder / f"confusion_{half}.csv",
                ["true \\ predicted", *names],
                ([name, *line] for name, line in zip(names, last.confusion.tolist(), strict=True)),
            )
    if benchmark.trained:
        figures.plot_per_class(
            folder / "per_class.png",
            benchmark.counts,
            {each.name: each.base.per_class for each in rows[:2]},
        )
    return table


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
    filled = is_filled(folder)
    benchmark, program = experiment.benchmark, experiment.record()
    identity = {
        "data": benchmark.name,
        "template": benchmark.template,
        "sha256": experiment.data_hash,
    }
    if filled:
        file = folder / TARGET
        held = read_json(file) if file.is_file() else None
        if not isinstance(held, dict) or {name: held.get(name) for name in identity} != identity:
            raise InputError(
                f"--out {folder}: holds something else than scores on these pictures with this"
                " template, expected a new folder"
            )
    stack.enter_context(hold_folder(folder))
    record = {
        **identity,
        "root": None if target.root is None else str(expand_path(target.root).absolute()),
        "table": None if target.table is None else str(expand_path(target.table).absolute()),
        "unreadable": list(experiment.unreadable),
        **{name: program[name] for name in ("version", "commit", "torch")},
    }
    write_json(folder / TARGET, record)


def score_method(
    experiment: Experiment, method: Method, name: str, seconds: float, ranks: Ranks = ALONE
) -> Evaluated:
    """Score one method on the test pictures, as a row of that name and training time."""
    new = len(experiment.benchmark.new_names) > 0 and method.no_new_names is None
    return Evaluated(
        name=name,
        base=_score_half(experiment, method, ranks, new=False),
        new=_score_half(experiment, method, ranks, new=True) if new else None,
        parameters=method.trainable_parameters(),
        seconds=seconds,
    )


def _score_half(
    experiment: Experiment, method: Method, ranks: Ranks, *, new: bool, adapted: bool = False
) -> Scores:
    benchmark = experiment.benchmark
    names = benchmark.new_names if new else benchmark.base_names
    pictures = benchmark.test_new if new else benchmark.test_base
    predicted = _predict(experiment, method, names, pictures, ranks, adapted)
    return scores(pictures.labels, predicted, len(names))


def _predict(
    experiment: Experiment,
    method: Method,
    names: Sequence[str],
    pictures: Pictures,
    ranks: Ranks,
    adapted: bool,
) -> np.ndarray:
    """The predicted class of every picture, int64 [N].

    Ranks share whole batches, so that each is computed as one process alone would.
    """
    machine = experiment.config.machine
    count = len(pictures)
    mine = ranks.rows(len(batch_sizes(count, machine.test_batch)))
    first, end = (min(edge * machine.test_batch, count) for edge in (mine.start, mine.stop))
    pictures = pictures.select(range(first, end))
    benchmark = experiment.benchmark
    classes = method.prepare(names, benchmark.template, benchmark.origin)
    predicted = [torch.empty(0, dtype=torch.int64)]
    for logits in _logits(experiment, method, classes, pictures, ranks, adapted):
        require_finite(logits)
        predicted.append(logits.argmax(1).cpu())
    return np.concatenate(ranks.gather(torch.cat(predicted).numpy()))


def _logits(
    experiment: Experiment,
    method: Method,
    classes: Any,
    pictures: Pictures,
    ranks: Ranks,
    adapted: bool,
) -> Iterator[torch.Tensor]:
    """Class scores of every picture, a batch at a time; from features where these suffice."""
    machine = experiment.config.machine
    if method.reads_features:
        if len(pictures):
            features = experiment.reader.read(pictures, experiment.test_crops)
            for some in features.split(machine.test_batch):
                yield method.feature_logits(some.to(experiment.device), classes, adapted)
        return
    batches = evaluation_batches(
        pictures, experiment.test_transform, machine.test_batch, workers=machine.workers
    )
    quiet = None if ranks.first else True
    bar = tqdm(batches, desc="evaluating", leave=False, disable=quiet)
    for images, _, _ in experiment.move_batches(bar):
        yield method.logits(images, classes, adapted)


def require_finite(logits: torch.Tensor) -> None:
    """Refuse class scores that say nothing, and would yet have a largest one.

    Raises:
        InputError: any is NaN or infinite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise InputError(
            "the method's class scores are not finite: its weights or settings are beyond what"
            " it can be computed with"
        )


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
            halves = (getattr(each, half) for each in rows)
            shares = (np.nan if each is None else each.per_class[index] for each in halves)
            shown = half if benchmark.new_names else "all"
            accuracies = (f"{share:.6f}" for share in shares)
            lines.append([shown, name, count, int(test), group, *accuracies])
    write_csv(file, header, lines)


def columns(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """(key, title) of each figure of a table; none about halves where every class was trained."""
    halves = any(row["acc_new"] is not None for row in rows)
    return COLUMNS if halves else UNDIVIDED_COLUMNS


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The closing table as Markdown: percentages, trainable parameters, training seconds."""
    shown = columns(rows)
    body = [
        [
            row["name"],
            *(_percent(row[key]) for key, _ in shown),
            f"{row['parameters']:,}",
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    header = ["", *(title for _, title in shown), "parameters", "seconds"]
    alignment = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(body, header, tablefmt="github", colalign=alignment, disable_numparse=True)


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f}"
