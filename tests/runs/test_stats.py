"""Intervals over pictures and paired tests of methods, against loops over pictures and by hand."""

from itertools import product

import numpy as np
import pytest

from lamp_fast.runs import stats
from lamp_fast.runs.metrics import scores
from lamp_fast.runs.stats import Bootstrap, Interval, holm, interval, mcnemar

CLASSES = 4  # the last of which has no picture


def answers(labels, seed):
    """Right two times of three, else anything, also the class without a picture."""
    generator = np.random.default_rng(seed)
    wrong = generator.integers(0, CLASSES, len(labels))
    return np.where(generator.random(len(labels)) < 2 / 3, labels, wrong)


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(3).permutation(np.repeat([0, 1, 2], [20, 6, 1]))


@pytest.mark.parametrize("block", [1 << 24, 60])
def test_resampled_scores_are_those_of_the_drawn_pictures(labels, block, monkeypatch):
    """Each resample's pictures, repeated as often as drawn, through the scores of every run."""
    monkeypatch.setattr(stats, "_BLOCK", block)
    bootstrap = Bootstrap(labels, CLASSES, resamples=7, seed=5)
    predictions = {"one": answers(labels, 0), "other": answers(labels, 1)}
    found = bootstrap.scores(predictions)
    weights = np.concatenate(list(bootstrap._weights()))
    assert weights.shape == (7, len(labels))
    for (name, predicted), (row, drawn) in product(predictions.items(), enumerate(weights)):
        rows = np.repeat(np.arange(len(labels)), drawn.astype(int))
        # Stratified: each class keeps its size.
        assert (np.bincount(labels[rows], minlength=CLASSES) == [20, 6, 1, 0]).all()
        expected = scores(labels[rows], predicted[rows], CLASSES)
        # Sums of at most 27 ones, then a few roundings of float64.
        assert found[name]["accuracy"][row] == pytest.approx(expected.accuracy, abs=1e-14)
        assert found[name]["macro_f1"][row] == pytest.approx(expected.macro_f1, abs=1e-14)
    assert len({tuple(each) for each in weights.tolist()}) == 7


def test_resampled_accuracy_spreads_as_the_binomial_does(labels):
    """Hits within a class are binomial: variance sum_c n_c p_c (1 - p_c) / N^2."""
    predicted = answers(labels, 0)
    right = predicted == labels
    variance = sum(
        (labels == each).sum() * right[labels == each].mean() * (1 - right[labels == each].mean())
        for each in range(3)
    )
    drawn = Bootstrap(labels, CLASSES, resamples=20_000).scores({"one": predicted})["one"]
    accuracy = drawn["accuracy"]
    error = np.sqrt(variance) / len(labels)
    # Of 20,000 draws: the mean within 5 of its standard errors, the deviation within 5 of its own.
    assert accuracy.mean() == pytest.approx(right.mean(), abs=5 * error / np.sqrt(20_000))
    assert accuracy.std() == pytest.approx(error, rel=5 / np.sqrt(2 * 20_000))


def test_an_interval_leaves_out_as_much_on_either_side():
    # 1 - 0.95 is rounded: off by less than 1e-16, of 1000.
    assert interval(np.arange(1001.0)) == pytest.approx((25, 975), abs=1e-12)
    assert interval(np.arange(1001.0), level=0.5) == pytest.approx((250, 750), abs=1e-12)
    assert Interval(-0.1, 0.2).holds_zero
    assert not Interval(0.1, 0.2).holds_zero


def test_mcnemar_by_hand():
    """4 pictures only the first has right, 1 only the second: 2 (1 + 5) / 2^5."""
    first = np.array([1, 1, 1, 1, 0, 1, 0], dtype=bool)
    second = np.array([0, 0, 0, 0, 1, 1, 0], dtype=bool)
    assert mcnemar(first, second) == pytest.approx(12 / 32)
    assert mcnemar(second, first) == pytest.approx(12 / 32)
    assert mcnemar(first, first) == 1


def test_holm_by_hand():
    """Ascending p times 3, 2, 1, never falling, at most 1."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
