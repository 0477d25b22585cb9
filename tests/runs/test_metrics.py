"""Scores against loops over their definitions."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from lamp_fast.runs.metrics import (
    UnionAnswers,
    balanced_accuracy,
    class_harmonic_mean,
    confusion_matrix,
    geometric_mean,
    group_accuracy,
    harmonic_mean,
    scores,
    shown_macro_f1,
    union_scores,
    worst_class,
)


@pytest.fixture
def answers():
    """Labels and predictions over 6 classes; 4 is never shown, 5 neither shown nor predicted."""
    generator = np.random.default_rng(0)
    labels = generator.choice(4, 200, p=[0.6, 0.2, 0.15, 0.05])
    predictions = np.where(generator.random(200) < 0.6, labels, generator.integers(0, 5, 200))
    return labels, predictions


def test_scores(answers):
    labels, predictions = answers
    got = scores(labels, predictions, 6)
    pairs = list(zip(labels.tolist(), predictions.tolist(), strict=True))
    assert got.confusion.tolist() == [[pairs.count((t, p)) for p in range(6)] for t in range(6)]
    assert got.accuracy == sum(t == p for t, p in pairs) / len(pairs)
    f1, per_class = [], []
    for each in range(6):
        hits = pairs.count((each, each))
        shown = sum(t == each for t, _ in pairs)
        predicted = sum(p == each for _, p in pairs)
        f1.append(2 * hits / (shown + predicted) if shown + predicted else 0.0)
        per_class.append(hits / shown if shown else math.nan)
    assert got.macro_f1 == pytest.approx(sum(f1) / 6, abs=1e-12)
    assert got.per_class == pytest.approx(per_class, nan_ok=True)
    assert sum(f1[4:]) == 0
    assert np.isnan(got.per_class[4:]).all()


def test_perfect_predictions():
    got = scores(np.array([0, 1, 1]), np.array([0, 1, 1]), 2)
    assert (got.accuracy, got.macro_f1, got.per_class.tolist()) == (1.0, 1.0, [1.0, 1.0])


def test_group_accuracy_counts_pictures_not_classes(answers):
    labels, predictions = answers
    confusion = scores(labels, predictions, 6).confusion
    head = np.array([True, False, True, False, False, False])
    for group in (head, ~head):
        inside = group[labels]
        expected = (labels == predictions)[inside].mean()
        assert group_accuracy(confusion, group) == pytest.approx(expected)
    assert group_accuracy(confusion, np.arange(6) >= 4) is None


def test_means_over_classes(answers):
    """Against scikit-learn and SciPy, which leave classes without pictures out, too."""
    labels, predictions = answers
    got = scores(labels, predictions, 6).per_class
    shown = got[:4]
    assert (shown > 0).all()
    # Some ten roundings of doubles in 0..1.
    with pytest.warns(UserWarning, match="classes not in y_true"):
        expected = sklearn.metrics.balanced_accuracy_score(labels, predictions)
    assert balanced_accuracy(got) == pytest.approx(expected, abs=1e-14)
    assert geometric_mean(got) == pytest.approx(scipy.stats.gmean(shown), abs=1e-14)
    assert class_harmonic_mean(got) == pytest.approx(scipy.stats.hmean(shown), abs=1e-14)
    assert worst_class(got) == shown.tolist().index(min(shown))


def test_a_group_counts_its_classes_and_not_their_pictures():
    # 8 of 10, 1 of 2 and none of 1 right; class 3 has no picture.
    labels = np.array([0] * 10 + [1] * 2 + [2])
    predictions = np.array([0] * 8 + [1] * 2 + [1, 0] + [0])
    got = scores(labels, predictions, 4)
    assert got.per_class == pytest.approx([0.8, 0.5, 0.0, math.nan], nan_ok=True)
    group = np.array([True, True, False, False])
    assert balanced_accuracy(got.per_class, group) == pytest.approx(0.65)
    assert group_accuracy(got.confusion, group) == pytest.approx(9 / 12)
    for index, expected in enumerate([0.8, 0.5, 0.0, None]):
        assert balanced_accuracy(got.per_class, np.arange(4) == index) == expected
    assert balanced_accuracy(got.per_class, np.zeros(4, bool)) is None
    assert balanced_accuracy(got.per_class) == pytest.approx(1.3 / 3)
    assert worst_class(got.per_class) == 2
    # LIFT's floor: a class counts as 0.001 % right.
    assert geometric_mean(got.per_class) == pytest.approx((0.8 * 0.5 * 1e-5) ** (1 / 3))
    assert class_harmonic_mean(got.per_class) == pytest.approx(3 / (1 / 0.8 + 1 / 0.5 + 1e5))


def test_means_at_their_ends():
    one, zero = np.array([1.0, math.nan, 1.0]), np.zeros(3)
    for mean in (balanced_accuracy, geometric_mean, class_harmonic_mean):
        assert mean(one) == 1.0
        assert mean(np.full(2, math.nan)) is None
    assert balanced_accuracy(zero) == 0.0
    assert geometric_mean(zero) == pytest.approx(1e-5)
    assert class_harmonic_mean(zero) == pytest.approx(1e-5)
    assert worst_class(np.array([math.nan, 0.5, 0.5])) == 1
    assert worst_class(np.full(2, math.nan)) is None


def test_harmonic_mean():
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert harmonic_mean(0.3, 0.3) == pytest.approx(0.3)
    assert harmonic_mean(0.0, 0.8) == 0.0
    assert harmonic_mean(0.0, 0.0) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_the_macro_f1_of_the_classes_shown(answers, seed):
    labels, predictions = (each[seed::3] for each in answers)
    confusion = confusion_matrix(labels, predictions, 6)
    assert np.array_equal(confusion, scores(labels, predictions, 6).confusion)
    shown = np.unique(labels)
    expected = sklearn.metrics.f1_score(
        labels, predictions, labels=shown, average="macro", zero_division=0
    )
    # Means of at most 6 ratios of small integers: a few roundings.
    assert shown_macro_f1(confusion) == pytest.approx(expected, rel=1e-14)


def half(generator, count):
    """Some right, and beliefs of few values, so that many are alike."""
    belief = generator.integers(0, 6, count) / 8
    return UnionAnswers(generator.random(count) < 0.7, generator.random(count) < 0.5, belief)


@pytest.mark.parametrize("seed", range(5))
def test_openworld_auc(seed):
    """The definition's double loop, and the public code's corrected beliefs in an AUROC."""
    generator = np.random.default_rng(seed)
    base, new = half(generator, 23), half(generator, 31)
    total = 0.0
    for right, believed in zip(base.own, base.belief, strict=True):
        for other, alike in zip(new.own, new.belief, strict=True):
            total += right * other * ((believed > alike) + (believed == alike) / 2)
    got = union_scores(base, new)
    # Counts of halves below 2^53 over a count: one rounding each.
    assert got.openworld_auc == pytest.approx(total / (23 * 31), rel=1e-15)
    beliefs = np.concatenate(
        [
            np.where(base.own, base.belief, new.belief.min() - 1e-5),
            np.where(new.own, new.belief, base.belief.max() + 1e-5),
        ]
    )
    is_base = np.repeat([1, 0], [23, 31])
    # The trapezoids of 54 points add up in another order.
    expected = sklearn.metrics.roc_auc_score(is_base, beliefs)
    assert got.openworld_auc == pytest.approx(expected, rel=1e-12)
    assert got.accuracy == (base.union.sum() + new.union.sum()) / 54
    assert got.harmonic_mean == harmonic_mean(base.union.mean(), new.union.mean())


@pytest.mark.parametrize(("right", "expected"), [(False, 0.0), (True, 1.0)])
def test_openworld_auc_at_its_ends(right, expected):
    base = UnionAnswers(np.full(3, right), np.full(3, right), np.ones(3))
    new = UnionAnswers(np.ones(2, bool), np.ones(2, bool), np.zeros(2))
    assert union_scores(base, new).openworld_auc == expected
