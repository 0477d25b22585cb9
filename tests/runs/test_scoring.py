"""Rows and tables of a run, against answers that are written out by hand."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lamp_fast.data.benchmark import Benchmark
from lamp_fast.data.pictures import Pictures
from lamp_fast.errors import InputError
from lamp_fast.runs.metrics import scores
from lamp_fast.runs.record import check_rows
from lamp_fast.runs.scoring import Evaluated, results_table, write_results

BEFORE = Path(__file__).parents[1] / "before"
ADDED = {
    *("many", "medium", "few", "balanced_base", "balanced_new", "worst_base", "worst_new"),
    *("worst_class_base", "worst_class_new", "geometric_mean_base", "harmonic_mean_base"),
}
NAMES = ("ant", "bee", "cat", "dog", "eel")
TRAINING = (150, 101, 100, 20, 3)


def pictures(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    names = [str(index) for index in range(len(labels))]
    return Pictures(names, labels, arrays=np.zeros((len(labels), 1, 1, 3), np.uint8))


def benchmark(training, new=()):
    names = NAMES[: len(training)]
    nothing = pictures([])
    return Benchmark(
        name="animals", base_names=names, new_names=new, template="{}", train=pictures(training),
        adapt=nothing, test_base=nothing, test_new=nothing, imb=1.0, cap=None, shots=None,
        augment=True,
    )  # fmt: skip


def half(shown, right):
    """Of each class so many pictures and right answers; the wrong ones are the next class."""
    labels = np.repeat(np.arange(len(shown)), shown)
    answers = [
        label if index < right[label] else (label + 1) % len(shown)
        for label in range(len(shown))
        for index in range(shown[label])
    ]
    return scores(labels, np.array(answers), len(shown))


def evaluated(base, new=None, name="LAMP"):
    return Evaluated(name=name, base=base, new=new, parameters=7, seconds=1.5)


def test_a_row_of_every_class_trained():
    # ant 0.9, bee 0.25 | cat 1, dog without a test picture | eel 0
    row = evaluated(half((10, 4, 5, 0, 2), (9, 1, 5, 0, 0))).row(benchmark(TRAINING))
    assert {name: row[name] for name in ("many", "medium", "few")} == {
        "many": pytest.approx((0.9 + 0.25) / 2),
        "medium": 1.0,
        "few": 0.0,
    }
    assert row["balanced_base"] == pytest.approx((0.9 + 0.25 + 1) / 4)
    assert (row["worst_base"], row["worst_class_base"]) == (0.0, "eel")
    assert row["geometric_mean_base"] == pytest.approx((0.9 * 0.25 * 1 * 1e-5) ** 0.25)
    assert row["harmonic_mean_base"] == pytest.approx(4 / (1 / 0.9 + 4 + 1 + 1e5))
    # Pooled: the head is ceil(5 / 5) = 1 class.
    assert (row["head"], row["tail"]) == (0.9, 6 / 11)
    assert row["balanced_new"] is row["worst_new"] is row["worst_class_new"] is None
    assert check_rows(json.loads(json.dumps([row])), "here") == [row]


def test_a_row_of_two_halves():
    new = half((4, 1), (2, 0))
    row = evaluated(half((2, 2), (1, 2)), new).row(benchmark((30, 5), new=("fox", "gnu")))
    assert (row["balanced_base"], row["worst_base"], row["worst_class_base"]) == (0.75, 0.5, "ant")
    assert (row["balanced_new"], row["worst_new"], row["worst_class_new"]) == (0.25, 0.0, "gnu")
    assert (row["many"], row["medium"], row["few"]) == (None, 0.5, 1.0)
    # The table of this protocol has the columns that its peers print.
    header = results_table([row]).split("\n", maxsplit=1)[0]
    assert [each.strip() for each in header.split("|")[2:-1]] == [
        *("acc base", "acc new", "HM-A", "F1 base", "F1 new", "HM-M", "head acc", "tail acc"),
        *("parameters", "seconds"),
    ]
    assert len(results_table([row]).splitlines()) == 3


def test_groups_without_classes_or_test_pictures():
    scored = evaluated(half((2, 0), (1, 0)))
    of = {
        training: [scored.row(benchmark(training))[each] for each in ("many", "medium", "few")]
        for training in ((500, 101), (40, 50), (40, 2), (2, 40), (6, 6))
    }
    assert of == {
        (500, 101): [0.5, None, None],
        (40, 50): [None, 0.5, None],
        (40, 2): [None, 0.5, None],
        (2, 40): [None, None, 0.5],
        (6, 6): [None, None, None],
    }
    equal = scored.row(benchmark((6, 6)))
    assert equal["head"] is equal["tail"] is None
    assert (equal["balanced_base"], equal["worst_class_base"]) == (0.5, "ant")


def test_a_benchmark_may_group_by_other_counts():
    """CIFAR-100-LT's groups are those of its ratio 100, whatever ratio was drawn."""
    given = replace(benchmark((500, 400, 300)), benchmark_counts=(500, 50, 5))
    row = evaluated(half((10, 10, 10), (9, 5, 1))).row(given)
    assert (row["many"], row["medium"], row["few"]) == (0.9, 0.5, 0.1)


def test_the_table_of_every_class_trained():
    base = half((10, 4, 5, 0, 2), (9, 1, 5, 0, 0))
    table = results_table([evaluated(base).row(benchmark(TRAINING))])
    header, _, line, empty, note = table.splitlines()
    assert [each.strip() for each in header.split("|")[2:-1]] == [
        *("accuracy", "macro-F1", "balanced", "worst class"),
        *("many (> 100)", "medium (20..100)", "few (< 20)"),
        *("head acc", "tail acc", "parameters", "seconds"),
    ]
    shown = [each.strip() for each in line.split("|")[1:-1]]
    assert shown == [
        *("LAMP", "71.43", f"{100 * base.macro_f1:.2f}", "53.75", "0.00"),
        *("57.50", "100.00", "0.00", "90.00", "54.55", "7", "1.5"),
    ]
    assert not empty
    assert "mean of the classes' accuracies" in note
    equal = results_table([evaluated(half((2, 2), (1, 2))).row(benchmark((6, 6)))])
    assert "75.00" in equal
    assert "many" not in equal


@pytest.mark.parametrize("method", ["lamp", "zeroshot"])
def test_rows_of_earlier_versions_are_read_and_shown_as_they_were(method):
    rows = json.loads((BEFORE / method / "result.json").read_text())
    assert not any(ADDED & row.keys() for row in rows)
    assert check_rows(rows, "here") == rows
    undivided = [row | dict.fromkeys(("acc_new", "f1_new", "hm_a", "hm_m")) for row in rows]
    for shown, columns in ((rows, 8), (undivided, 4)):
        lines = results_table(shown).splitlines()
        assert len(lines) == 2 + len(rows)
        assert lines[0].count("|") == columns + 4  # and the name, parameters, seconds


def test_rows_of_two_versions_share_a_table():
    row = evaluated(half((2, 2), (1, 2))).row(benchmark((6, 60)))
    old = {key: value for key, value in row.items() if key not in ADDED} | {"name": "old"}
    line = results_table([row, old]).splitlines()[3]
    assert line.split("|")[4].strip() == "n/a"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("few", 1.5, r"row 1\.few 1\.5: expected 0\.\.1"),
        ("balanced_base", "good", r"balanced_base: 'good' is not"),
        ("worst_class_base", 3, r"worst_class_base: '3' is not"),
    ],
)
def test_a_figure_that_no_run_has_is_refused(key, value, message):
    row = evaluated(half((2, 2), (1, 2))).row(benchmark((6, 60)))
    with pytest.raises(InputError, match=message):
        check_rows([row | {key: value}], "here")


def test_the_files_of_a_run(tmp_path):
    base, plain = half((10, 4, 5, 0, 2), (9, 1, 5, 0, 0)), half((10, 4, 5, 0, 2), (0, 1, 2, 0, 1))
    rows = [evaluated(plain, name="CLIP"), evaluated(base)]
    shown = SimpleNamespace(union=False)
    experiment = SimpleNamespace(benchmark=benchmark(TRAINING), config=shown, caution=None)
    table = write_results(tmp_path, experiment, rows)
    assert (tmp_path / "table.md").read_text() == table + "\n"
    assert json.loads((tmp_path / "result.json").read_text())[1]["few"] == 0.0
    with open(tmp_path / "per_class.csv", newline="") as stream:
        header, *lines = csv.reader(stream)
    assert header[:6] == [
        *("half", "class", "training_pictures", "test_pictures", "group", "size_group"),
    ]
    assert [line[1:6] for line in lines] == [
        ["ant", "150", "10", "head", "many"],
        ["bee", "101", "4", "tail", "many"],
        ["cat", "100", "5", "tail", "medium"],
        ["dog", "20", "0", "tail", "medium"],
        ["eel", "3", "2", "tail", "few"],
    ]
