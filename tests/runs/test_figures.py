"""What the drawings of a run show."""

import math

import numpy as np
import pytest

from lamp_fast.runs import figures

COUNTS = [200, 120, 60, 10, 5]
ACCURACY = {"CLIP": [0.5, 0.7, 0.25, 0.0, math.nan], "LAMP": [1.0, 0.8, 0.5, math.nan, math.nan]}


def means(figure):
    """(first count, last count, mean in percent) of each line, in the order drawn."""
    (axes,) = figure.axes
    return [(*line.get_xdata(), line.get_ydata()[0]) for line in axes.get_lines()]


def test_lines_over_the_classes_of_a_size_group():
    groups = ["many", "many", "medium", "few", "few"]
    figure = figures.draw_per_class(COUNTS, ACCURACY, groups)
    found = means(figure)
    # LAMP has no line over the last group, which has no test picture there.
    assert [mean for *_, mean in found] == pytest.approx([60, 90, 25, 50, 0])
    for (first, last, _), sizes in zip(found, [(120, 200), (120, 200), (60, 60), (60, 60), (5, 10)],
                                       strict=True):  # fmt: skip
        assert first < sizes[0] <= sizes[1] < last
    (axes,) = figure.axes
    assert [each.get_text() for each in axes.texts] == ["many", "medium", "few"]
    assert axes.get_title() == "trained classes: accuracy against class size"


def test_a_group_of_one_size_has_a_line_and_no_group_has_none():
    [(first, last, mean)] = means(
        figures.draw_per_class([7, 7], {"CLIP": [0.5, 1.0]}, np.array(["few", "few"]))
    )
    assert first < 7 < last
    assert mean == pytest.approx(75)
    assert not means(figures.draw_per_class(COUNTS, ACCURACY))


@pytest.mark.parametrize("held_out", [False, True])
def test_the_validation_curve_marks_the_epoch_that_was_kept(held_out):
    """Epochs without a score, of an earlier stage, are no part of it."""
    history = [{"epoch": 1}]
    for epoch, score in enumerate((0.25, 0.5, 0.5), start=2):
        line = {"epoch": epoch, "val_macro_f1": 0.3, "val_accuracy": 0.4, "val_score": score}
        history.append({**line, "val_macro_f1_held_out": 0.2} if held_out else line)
    [axes] = figures.draw_validation(history).axes
    shown = {line.get_label(): line for line in axes.lines}
    score = "harmonic mean of the two" if held_out else "accuracy"
    expected = [25, 50, 50] if held_out else [40, 40, 40]
    assert shown[score].get_xydata().tolist() == [
        [epoch, value] for epoch, value in zip((2, 3, 4), expected, strict=True)
    ]
    assert list(shown["chosen: epoch 3"].get_xdata()) == [3, 3]
    assert figures.draw_validation(history[:1]) is None
