"""Scores against loops over their definitions."""

import math

import numpy as np
import pytest

from lamp_fast.runs.metrics import group_accuracy, harmonic_mean, scores


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


def test_harmonic_mean():
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert harmonic_mean(0.3, 0.3) == pytest.approx(0.3)
    assert harmonic_mean(0.0, 0.8) == 0.0
    assert harmonic_mean(0.0, 0.0) == 0.0
