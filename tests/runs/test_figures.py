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
