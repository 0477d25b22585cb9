"""Scores of a run on test pictures, of its own data or another set, and the tables of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from lamp_fast.data.benchmark import Benchmark
from lamp_fast.data.hierarchy import Level
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.protocol import SIZE_GROUP_TITLES, SIZE_GROUPS
from lamp_fast.files import write_bytes, write_csv, write_json
from lamp_fast.methods.base import Method
from lamp_fast.methods.zeroshot import ZeroShot
from lamp_fast.runs import figures
from lamp_fast.runs.experiment import Experiment
from lamp_fast.runs.folder import RELIABILITY, RESULT
from lamp_fast.runs.levels import level_accuracies, predict_levels
from lamp_fast.runs.metrics import (
    Scores,
    UnionAnswers,
    UnionScores,
    balanced_accuracy,
    class_harmonic_mean,
    geometric_mean,
    group_accuracy,
    harmonic_mean,
    scores,
    union_scores,
    worst_class,
)
from lamp_fast.runs.ranks import ALONE, Ranks
from lamp_fast.runs.reliability import Judge, Reliability, judge_of, percent, write_reliability
from lamp_fast.runs.scorer import Scorer, own_pictures

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
UNION_COLUMNS = (
    ("union", "union"),
    ("union_base", "union base"),
    ("union_new", "union new"),
    ("union_hm", "union HM"),
    ("openworld_auc", "OpenworldAUC"),
)
UNDIVIDED_COLUMNS = (
    ("acc_base", "accuracy"),
    ("f1_base", "macro-F1"),
    ("balanced_base", "balanced"),
    ("worst_base", "worst class"),
    *SIZE_GROUP_TITLES.items(),
    ("head", "head acc"),
    ("tail", "tail acc"),
)
# Not in tables of runs that lack them: those of 0.2.0, and groups where classes are equally large.
_SHOWN_WHERE_THERE = {"balanced_base", "worst_base", *SIZE_GROUPS}


@dataclass(frozen=True)
class Evaluated:
    """One row of the closing table with what it was computed from.

    ``selection`` says how its epoch was chosen, see :func:`lamp_fast.runs.selection.summary`;
    ``union`` is None where base and new names were not asked for at once.
    """

    name: str
    base: Scores
    new: Scores | None
    parameters: int
    seconds: float
    selection: Mapping[str, Any] | None = None
    union: UnionScores | None = None
    reliability: Reliability | None = None

    def row(self, benchmark: Benchmark) -> dict[str, Any]:
        """The row as JSON values in 0..1; None where there is nothing to report.

        Args:
            benchmark: whose test pictures were scored; it names and groups the classes.
        """
        base, new = self.base, self.new
        head = benchmark.head
        return {
            "name": self.name,
            "acc_base": base.accuracy,
            "acc_new": None if new is None else new.accuracy,
            "hm_a": None if new is None else harmonic_mean(base.accuracy, new.accuracy),
            "f1_base": base.macro_f1,
            "f1_new": None if new is None else new.macro_f1,
            "hm_m": None if new is None else harmonic_mean(base.macro_f1, new.macro_f1),
            **_union_row(self.union),
            "head": None if head is None else group_accuracy(base.confusion, head),
            "tail": None if head is None else group_accuracy(base.confusion, ~head),
            **_by_size(base, benchmark.size_groups),
            **_by_class("base", base, benchmark.base_names),
            **_by_class("new", new, benchmark.new_names),
            **_by_level(base, new),
            "geometric_mean_base": geometric_mean(base.per_class),
            "harmonic_mean_base": class_harmonic_mean(base.per_class),
            "parameters": self.parameters,
            "seconds": self.seconds,
            **({} if self.selection is None else {"selection": self.selection}),
        }


def _union_row(union: UnionScores | None) -> dict[str, float | None]:
    if union is None:
        return dict.fromkeys(key for key, _ in UNION_COLUMNS)
    return {
        "union": union.accuracy,
        "union_base": union.base,
        "union_new": union.new,
        "union_hm": union.harmonic_mean,
        "openworld_auc": union.openworld_auc,
    }


def _by_size(base: Scores, groups: np.ndarray | None) -> dict[str, float | None]:
    """Of each size group the mean accuracy of its classes."""
    if groups is None:
        return dict.fromkeys(SIZE_GROUPS)
    return {group: balanced_accuracy(base.per_class, groups == group) for group in SIZE_GROUPS}


def _by_class(half: str, found: Scores | None, names: Sequence[str]) -> dict[str, Any]:
    """Of one half what gives each of its classes the same weight."""
    worst = None if found is None else worst_class(found.per_class)
    return {
        f"balanced_{half}": None if found is None else balanced_accuracy(found.per_class),
        f"worst_{half}": None if worst is None else float(found.per_class[worst]),
        f"worst_class_{half}": None if worst is None else names[worst],
    }


def _by_level(base: Scores, new: Scores | None) -> dict[str, Any]:
    """Accuracy at each level above the classes, where the run knows such levels."""
    if not base.levels:
        return {}
    above = {} if new is None else new.levels
    return {
        "levels": {
            level: {"acc_base": accuracy, "acc_new": above.get(level)}
            for level, accuracy in base.levels.items()
        }
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
    rows = [score_method(experiment, zeroshot, zeroshot.entry.title, 0.0, ranks)]
    if isinstance(method, ZeroShot):
        return rows
    rows.append(score_method(experiment, method, method.entry.title, seconds, ranks))
    if adapted:
        new = _score_half(experiment, method, ranks, new=True, adapted=True).scores
        name = f"{method.entry.title}, b_new on new (transductive)"
        # Which bias a picture is given would say of which half it is.
        rows.append(replace(rows[-1], name=name, new=new, union=None))
    return rows


def write_results(folder: Path, experiment: Experiment, rows: Sequence[Evaluated]) -> str:
    """Write table, per-class CSV, confusion matrices and the class-size plot; return the table.

    No plot where nothing was trained on the data.
    """
    benchmark = experiment.benchmark
    table_rows = [each.row(benchmark) for each in rows]
    table = results_table(table_rows, experiment.caution, union=experiment.config.union)
    if above := levels_table(table_rows):
        table = f"{table}\n\n{above}"
    write_json(folder / RESULT, table_rows)
    write_bytes(folder / "table.md", (table + "\n").encode())
    _write_per_class(folder / "per_class.csv", experiment, rows)
    write_reliability(folder / RELIABILITY, rows[-1].reliability)
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
            benchmark.size_groups,
        )
    return table


def score_method(
    experiment: Experiment, method: Method, name: str, seconds: float, ranks: Ranks = ALONE
) -> Evaluated:
    """Score one method on the test pictures, as a row of that name and training time."""
    base = _score_half(experiment, method, ranks, new=False)
    new = (
        _score_half(experiment, method, ranks, new=True)
        if _serves_new(experiment, method)
        else None
    )
    both = new is not None and base.answers is not None and new.answers is not None
    return Evaluated(
        name=name,
        base=base.scores,
        new=None if new is None else new.scores,
        parameters=method.trainable_parameters(),
        seconds=seconds,
        union=union_scores(base.answers, new.answers) if both else None,
        reliability=base.reliability,
    )


def _serves_new(experiment: Experiment, method: Method) -> bool:
    return len(experiment.benchmark.new_names) > 0 and method.entry.no_new_names is None


@dataclass(frozen=True)
class _Half:
    """What is found of one half: the last two None where they cannot be said."""

    scores: Scores
    answers: UnionAnswers | None
    reliability: Reliability | None


def _score_half(
    experiment: Experiment, method: Method, ranks: Ranks, *, new: bool, adapted: bool = False
) -> _Half:
    """Score one half's pictures among its names, and among all names where that can be said: where
    there are two halves, and no prior, which says nothing of how often the names of one half are to
    be expected beside those of the other; and not ``adapted``."""
    benchmark = experiment.benchmark
    names = benchmark.new_names if new else benchmark.base_names
    pictures = benchmark.test_new if new else benchmark.test_base
    levels = () if benchmark.hierarchy is None else tuple(benchmark.hierarchy.every_level(names))
    batch, base = experiment.config.machine.test_batch, len(benchmark.base_names)
    judge = None if new or adapted else judge_of(experiment, method)
    among_all = _serves_new(experiment, method) and not adapted and experiment.prior is None
    if among_all:
        scored = _own_and_every(experiment, method, pictures, ranks, new)
    else:
        scorer = Scorer(experiment, method, names, pictures, ranks)
        scored = ((own, None) for own in scorer.logits(adapted))
    labels, done, columns = torch.tensor(own_pictures(pictures, batch, ranks).labels), 0, []
    for own, every in scored:
        column = [predict_levels(own, levels)]
        if every is not None:
            belief = every.double().log_softmax(1)[:, :base].amax(1)
            column += [every.argmax(1), belief]
        if judge is not None:
            column.append(judge.look(own, labels[done : done + len(own)]))
        columns.append(column)
        done += len(own)
    kinds = [(torch.int64, 1 + len(levels))]
    kinds += [(torch.int64, None), (torch.float64, None)] if among_all else []
    kinds += [] if judge is None else [(torch.float64, Judge.COLUMNS)]
    predicted, *others = _gathered(columns, ranks, kinds)
    labels, answers, reliability = pictures.labels, None, None
    right = predicted[:, 0] == labels
    if among_all:
        every, belief, *others = others
        answers = UnionAnswers(right, every == labels + (base if new else 0), belief)
    if judge is not None:
        reliability = judge.conclude(
            torch.from_numpy(others[0]), torch.from_numpy(right), torch.tensor(labels)
        )
    return _Half(_scores(labels, predicted, len(names), levels), answers, reliability)


def _scores(
    labels: np.ndarray, predicted: np.ndarray, classes: int, levels: Sequence[Level]
) -> Scores:
    """Of classes, the first column, and of their parents at each level."""
    found = scores(labels, predicted[:, 0], classes)
    return replace(found, levels=level_accuracies(levels, labels, predicted[:, 1:]))


def _own_and_every(
    experiment: Experiment, method: Method, pictures: Pictures, ranks: Ranks, new: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits over the names of the pictures' own half, and over those of both, base first."""
    benchmark = experiment.benchmark
    base, others = benchmark.base_names, benchmark.new_names
    every = Scorer(experiment, method, (*base, *others), pictures, ranks)
    if method.independent_names:
        own = slice(len(base), None) if new else slice(len(base))
        yield from ((logits[:, own], logits) for logits in every.logits())
        return
    half = Scorer(experiment, method, others if new else base, pictures, ranks)
    yield from zip(half.logits(), every.logits(), strict=True)


def _gathered(
    batches: Sequence[Sequence[torch.Tensor]],
    ranks: Ranks,
    kinds: Sequence[tuple[torch.dtype, int | None]],
) -> list[np.ndarray]:
    """Columns of all batches of all ranks, one behind the other; of each its type, and its width
    where a row has several numbers."""
    found = []
    for column, (kind, width) in enumerate(kinds):
        shape = (0,) if width is None else (0, width)
        own = [torch.empty(shape, dtype=kind), *(batch[column].cpu() for batch in batches)]
        found.append(np.concatenate(ranks.gather(torch.cat(own).numpy())))
    return found


def _write_per_class(file: Path, experiment: Experiment, rows: Sequence[Evaluated]) -> None:
    benchmark = experiment.benchmark
    counts, head, size_groups = benchmark.counts, benchmark.head, benchmark.size_groups
    header = ["half", "class", "training_pictures", "test_pictures", "group", "size_group"]
    header += [f"accuracy: {each.name}" for each in rows]
    lines = []
    for half, names in (("base", benchmark.base_names), ("new", benchmark.new_names)):
        for index, name in enumerate(names):
            test = getattr(rows[0], half).confusion[index].sum()
            if half == "new":
                count, group, size_group = 0, "new", "new"
            else:
                count = int(counts[index])
                group = "n/a" if head is None else "head" if head[index] else "tail"
                size_group = "n/a" if size_groups is None else size_groups[index]
            halves = [getattr(each, half) for each in rows]
            accuracies = (
                "nan" if each is None else f"{each.per_class[index]:.6f}" for each in halves
            )
            shown = half if benchmark.new_names else "all"
            lines.append([shown, name, count, int(test), group, size_group, *accuracies])
    write_csv(file, header, lines)


def columns(rows: Sequence[Mapping[str, Any]], union: bool = False) -> tuple[tuple[str, str], ...]:
    """(key, title) of each figure of a table; none about halves where every class was trained.

    Args:
        rows: of the table.
        union: also show the figures of base and new names at once.
    """
    if any(row["acc_new"] is not None for row in rows):
        return COLUMNS + UNION_COLUMNS if union else COLUMNS
    return tuple(
        (key, title)
        for key, title in UNDIVIDED_COLUMNS
        if key not in _SHOWN_WHERE_THERE or any(row.get(key) is not None for row in rows)
    )


def results_table(
    rows: Sequence[Mapping[str, Any]], caution: str | None = None, *, union: bool = False
) -> str:
    """The closing table as Markdown: percentages, trainable parameters, training seconds.

    A line below it says which columns give each class the same weight, if any do.

    Args:
        rows: of the table.
        caution: why its figures mean nothing, the last line;
            see :func:`lamp_fast.clip.settings.caution`.
        union: as :func:`columns` takes it.
    """
    shown = columns(rows, union)
    body = [
        [
            row["name"],
            *(percent(row.get(key)) for key, _ in shown),
            f"{row['parameters']:,}",
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    header = ["", *(title for _, title in shown), "parameters", "seconds"]
    alignment = ["left"] + ["right"] * (len(header) - 1)
    table = tabulate(body, header, tablefmt="github", colalign=alignment, disable_numparse=True)
    note = columns_note(shown)
    return "\n\n".join(filter(None, [table, note, caution]))


def levels_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracies of the rows at each level above the classes, as Markdown; "" without levels."""
    shown = [row for row in rows if row.get("levels")]
    if not shown:
        return ""
    halves = [("acc_base", "accuracy")]
    if any(row["acc_new"] is not None for row in shown):
        halves = [("acc_base", "acc base"), ("acc_new", "acc new")]
    levels = list(shown[0]["levels"])
    header = ["", *(f"{title}, {level}" for level in levels for _, title in halves)]
    body = [
        [
            row["name"],
            *(percent(row["levels"][level][key]) for level in levels for key, _ in halves),
        ]
        for row in shown
    ]
    alignment = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(body, header, tablefmt="github", colalign=alignment, disable_numparse=True)


def columns_note(shown: Sequence[tuple[str, str]]) -> str:
    """What the reader of columns from :func:`columns` must know of means over classes, if any."""
    keys = {key for key, _ in shown}
    if keys.isdisjoint(_SHOWN_WHERE_THERE):
        return ""
    if keys.isdisjoint(SIZE_GROUPS):
        return "balanced: the mean of the classes' accuracies."
    return (
        "balanced: the mean of the classes' accuracies; many, medium, few: the same of classes with"
        " so many training pictures. head, tail: of all their pictures together."
    )
