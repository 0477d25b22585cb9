"""Scores, intervals, paired tests and the choice of a comparison, as JSON values.

The choice is made by macro-F1 on the validation pictures alone: no figure of the test pictures can
change it. Intervals and tests say how sure the table is, and decide nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from lamp_fast.compare.candidates import describe_changes
from lamp_fast.compare.settings import format_duration
from lamp_fast.compare.work import TESTED, Entry
from lamp_fast.data.benchmark import Benchmark
from lamp_fast.runs.metrics import scores
from lamp_fast.runs.stats import LEVEL, RESAMPLES, Bootstrap, Interval, holm, interval, mcnemar
from lamp_fast.tensors import load_tensors

STATISTICS = (
    f"Intervals: {LEVEL:.0%}, percentiles of {RESAMPLES:,} bootstrap resamples of the pictures,"
    " drawn within each class and the same for every method. Difference: macro-F1 of the chosen"
    " method less the other's on the test pictures, with the interval of the paired resamples. p:"
    " McNemar's exact test on the same pictures, which is about accuracy; corrected by Holm over"
    " all methods that the chosen one is compared with."
)


@dataclass(frozen=True)
class Answers:
    """Of one method on some pictures: true and predicted classes, integers [N]."""

    labels: np.ndarray
    predicted: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """bool [N]."""
        return self.labels == self.predicted


def choose(validation: Mapping[str, float]) -> str:
    """The method of highest macro-F1 on the validation pictures; of equal ones the first, which is
    the simplest."""
    return max(validation, key=lambda method: validation[method])


def figures_of(answers: Mapping[str, Answers], classes: int) -> dict[str, dict[str, Any]]:
    """Accuracy and macro-F1 of methods on the same pictures, each with its interval.

    Args:
        answers: by method.
        classes: how many there are.
    """
    resampled = _resample(answers, classes)
    found = {}
    for method, each in answers.items():
        whole = scores(each.labels, each.predicted, classes)
        found[method] = {
            metric: {"value": getattr(whole, metric), "interval": interval(values)}
            for metric, values in resampled[method].items()
        }
    return found


def compare_with(
    chosen: str, answers: Mapping[str, Answers], classes: int
) -> dict[str, dict[str, Any]]:
    """Each other method against the chosen one, on the same pictures.

    Args:
        chosen: one of the methods.
        answers: by method.
        classes: how many there are.

    Returns:
        By method ``difference`` (macro-F1, chosen less other), its ``interval``, McNemar's ``p``
        and ``p_holm``.
    """
    others = [method for method in answers if method != chosen]
    resampled = _resample(answers, classes)
    f1 = {
        method: scores(each.labels, each.predicted, classes).macro_f1
        for method, each in answers.items()
    }
    p_values = [mcnemar(answers[chosen].right, answers[method].right) for method in others]
    return {
        method: {
            "difference": f1[chosen] - f1[method],
            "interval": interval(resampled[chosen]["macro_f1"] - resampled[method]["macro_f1"]),
            "p": p,
            "p_holm": corrected,
        }
        for method, p, corrected in zip(others, p_values, holm(p_values), strict=True)
    }


def _resample(answers: Mapping[str, Answers], classes: int) -> dict[str, dict[str, np.ndarray]]:
    labels = next(iter(answers.values())).labels
    predictions = {method: each.predicted for method, each in answers.items()}
    return Bootstrap(labels, classes).scores(predictions)


def build_record(
    entries: Sequence[Entry], benchmark: Benchmark, folder: Path, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the table and the page say, as JSON values.

    Args:
        entries: what became of each method.
        benchmark: whose pictures they were.
        folder: of the comparison.
        facts: what else a reader must know: CLIP, settings, notes.
    """
    names = benchmark.base_names
    tested = [entry for entry in entries if entry.state == TESTED]
    validation = {
        entry.candidate.method: Answers(entry.settled.labels, entry.settled.predicted)
        for entry in tested
    }
    test = {entry.candidate.method: _read_answers(folder, entry) for entry in tested}
    chosen, against, unsure = None, {}, []
    val_figures, test_figures = {}, {}
    if tested:
        val_figures = figures_of(validation, len(names))
        test_figures = figures_of(test, len(names))
        chosen = choose({method: each["macro_f1"]["value"] for method, each in val_figures.items()})
        against = compare_with(chosen, test, len(names))
        on_validation = compare_with(chosen, validation, len(names))
        titles = {entry.candidate.method: entry.candidate.title for entry in tested}
        unsure = [
            titles[method]
            for method, each in on_validation.items()
            if Interval(*each["interval"]).holds_zero
        ]
    rows = []
    for entry in entries:
        method = entry.candidate.method
        row = describe_entry(entry)
        if entry in tested:
            row |= {
                "validation": val_figures[method],
                "test": test_figures[method],
                "against_chosen": against.get(method),
            }
        rows.append(row)
    return {
        "chosen": chosen,
        "chosen_title": next(
            (entry.candidate.title for entry in tested if entry.candidate.method == chosen), None
        ),
        "not_told_apart": unsure,
        "classes": [
            {"name": name, "train": train, "val": val, "test": held}
            for name, train, val, held in zip(
                names,
                benchmark.counts.tolist(),
                np.bincount(benchmark.val.labels, minlength=len(names)).tolist(),
                np.bincount(benchmark.test_base.labels, minlength=len(names)).tolist(),
                strict=True,
            )
        ],
        "statistics": STATISTICS,
        **facts,
        "rows": rows,
    }


def describe_entry(entry: Entry) -> dict[str, Any]:
    """What is known of a method whether or not it was tested."""
    candidate, cost, tested = entry.candidate, entry.cost, entry.tested
    row = {
        "method": candidate.method,
        "title": candidate.title,
        "group": candidate.group,
        "state": entry.state,
        "why": entry.why,
        "predicted_seconds": None if cost is None else cost.whole,
        "took_seconds": None,
        "search_seconds": sum(trial.seconds for trial in entry.trials[1:]),
        "tried": len(entry.trials),
        "settings": "",
        "validation": None,
        "test": None,
        "against_chosen": None,
        "per_class": None,
    }
    if tested is not None:
        published = entry.trials[0].settings
        row |= {
            "took_seconds": entry.trials[0].seconds + tested["seconds"],
            "settings": describe_changes(entry.settled.settings, published),
            "per_class": tested["per_class"],
            "balanced": tested["row"]["balanced_base"],
            "worst": tested["row"]["worst_base"],
            "worst_class": tested["row"]["worst_class_base"],
            "parameters": tested["row"]["parameters"],
        }
    return row


def _read_answers(folder: Path, entry: Entry) -> Answers:
    tensors, _ = load_tensors(folder / "jobs" / entry.tested["answers"])
    return Answers(tensors["labels"].numpy(), tensors["predicted"].numpy())


def warnings_of(record: Mapping[str, Any]) -> list[str]:
    """What a reader of the choice must know, a line each."""
    lines = []
    classes = record["classes"]
    count = sum(each["val"] for each in classes)
    for part, words in (("val", "validation"), ("test", "test")):
        without = [each["name"] for each in classes if not each[part]]
        if without:
            lines.append(
                f"no {words} picture of {_some(without)}: too few pictures of these, which count 0"
                " in every method's macro-F1"
            )
    few = [each["name"] for each in classes if 0 < each["test"] < 5]
    if few:
        lines.append(
            f"fewer than 5 test pictures of {_some(few)}: intervals do not show how little is known"
            " of these classes"
        )
    if record["not_told_apart"]:
        lines.append(
            f"the choice is partly noise: by {count} validation pictures {record['chosen_title']}"
            f" cannot be told from {_some(record['not_told_apart'])} (the {LEVEL:.0%} intervals of"
            " the differences hold 0)"
        )
    return lines


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def percent(figure: Mapping[str, Any] | None) -> str:
    """A figure with its interval: ``81.2 [74.0, 87.5]``."""
    if figure is None:
        return ""
    low, high = figure["interval"]
    return f"{100 * figure['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def seconds(value: float | None) -> str:
    """A time, or nothing."""
    return "" if value is None else format_duration(value)


def p_value(value: float) -> str:
    """A p, as it is printed."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def text_table(record: Mapping[str, Any]) -> str:
    """The table for a terminal: what was tested, the chosen one marked."""
    body = []
    for row in record["rows"]:
        if row["test"] is None:
            continue
        against = row["against_chosen"]
        body.append(
            [
                ("* " if row["method"] == record["chosen"] else "  ") + row["title"],
                percent(row["validation"]["macro_f1"]),
                percent(row["test"]["macro_f1"]),
                percent(row["test"]["accuracy"]),
                "" if against is None else p_value(against["p_holm"]),
                seconds(row["predicted_seconds"]),
                seconds(row["took_seconds"]),
            ]
        )
    header = ["", "val macro-F1", "test macro-F1", "test accuracy", "p", "predicted", "took"]
    alignment = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(body, header, tablefmt="github", colalign=alignment, disable_numparse=True)


def flat(record: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Header and lines of the CSV file: a line a method, figures in 0..1."""
    header = ["method", "title", "state", "why", "chosen", "tried", "settings"]
    header += ["predicted_seconds", "took_seconds", "search_seconds"]
    figures = [("validation", "macro_f1"), ("test", "macro_f1"), ("test", "accuracy")]
    for part, metric in figures:
        name = f"{part}_{metric}"
        header += [name, f"{name}_low", f"{name}_high"]
    header += ["difference", "difference_low", "difference_high", "p", "p_holm"]
    lines = []
    for row in record["rows"]:
        line = [row["method"], row["title"], row["state"], row["why"]]
        line += [row["method"] == record["chosen"], row["tried"], row["settings"]]
        line += [row["predicted_seconds"], row["took_seconds"], row["search_seconds"]]
        for part, metric in figures:
            figure = row[part][metric] if row[part] else None
            line += [None] * 3 if figure is None else [figure["value"], *figure["interval"]]
        against = row["against_chosen"]
        line += (
            [None] * 5
            if against is None
            else [against["difference"], *against["interval"], against["p"], against["p_holm"]]
        )
        lines.append(["" if value is None else value for value in line])
    return header, lines
