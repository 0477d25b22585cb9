"""The mathematics of an audit, against loops and full matrices."""

import numpy as np
import pytest
import torch

from lamp_fast.audit import findings
from lamp_fast.audit.judging import judge
from lamp_fast.audit.settings import AuditConfig


def unit_rows(count, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def test_suspects_are_those_of_the_rule_read_literally():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([0.4] * 5, size=200)
    labels = rng.integers(0, 5, 200)
    thresholds = findings.class_thresholds(probabilities, labels)
    expected = {}
    for c in range(5):
        own = [probabilities[i, c] for i in range(200) if labels[i] == c]
        # A mean of some 40 numbers below 1, added in another order.
        assert thresholds[c] == pytest.approx(sum(own) / len(own), abs=40 * 2**-52)
    for i in range(200):
        reached = [c for c in range(5) if probabilities[i, c] >= thresholds[c]]
        if not reached:
            continue
        best = max(reached, key=lambda c: probabilities[i, c])
        margin = probabilities[i, best] - probabilities[i, labels[i]]
        if best != labels[i] and margin > 0:
            expected[i] = (best, margin)
    found = findings.suspected_labels(probabilities, labels, thresholds)
    assert 10 < len(expected) < 200
    rows = zip(found.rows.tolist(), found.suggested.tolist(), found.margins, strict=True)
    assert {row: (best, margin) for row, best, margin in rows} == expected
    assert (np.diff(found.margins) <= 0).all()


@pytest.mark.parametrize("block", [1, 50, 10_000])
def test_twins_are_those_of_the_full_matrix(block):
    rows, columns = unit_rows(30), unit_rows(20, seed=1)
    labels = torch.arange(30) % 3, torch.arange(20) % 3
    for apart in (None, labels):
        similar = (rows @ columns.T).numpy()
        if apart is not None:
            similar[apart[0][:, None] == apart[1][None]] = -2
        twins, cosines = findings.nearest_twins(rows, columns, 0.7, apart, block)
        close = similar.max(1) >= 0.7
        assert 0 < close.sum() < 30
        assert twins.tolist() == np.where(close, similar.argmax(1), -1).tolist()
        # One float64 product of 6 terms in another order, then one rounding to float32.
        assert np.allclose(cosines, np.where(close, similar.max(1), 0), rtol=2**-24, atol=1e-14)
    assert findings.nearest_twins(rows, columns[:0], 0.7)[0].tolist() == [-1] * 30


@pytest.mark.parametrize("block", [1, 70, 10_000])
def test_distances_are_those_of_the_sorted_matrix(block):
    rows, columns, ranks = unit_rows(12), unit_rows(9, seed=1), torch.arange(12) % 4 + 1
    far = np.sort(1 - (rows @ columns.T).numpy(), axis=1)[np.arange(12), ranks - 1]
    got = findings.neighbour_distances(rows, columns, ranks, same=False, block=block)
    assert np.allclose(got, far, rtol=2**-23, atol=1e-7)  # float32, of differences from 1
    own = 1 - (rows @ rows.T).numpy()
    far = [np.sort(np.delete(own[i], i))[min(int(ranks[i]), 11) - 1] for i in range(12)]
    got = findings.neighbour_distances(rows, rows, ranks, same=True, block=block)
    assert np.allclose(got, far, rtol=2**-23, atol=1e-7)


def test_a_small_class_is_not_asked_for_more_neighbours_than_it_has():
    counts = np.array([1, 2, 4, 100])
    assert findings.neighbour_ranks(np.arange(4), counts, 5).tolist() == [1, 1, 3, 5]


def test_robust_scores_are_those_of_the_definition():
    reference = np.array([1.0, 2, 3, 4, 100])  # median 3, deviations 2 1 0 1 97
    assert findings.robust_scores(np.array([3.0, 10]), reference).tolist() == [0, 7 / 1.4826]
    assert findings.robust_scores(np.array([5.0]), np.ones(3)).tolist() == [0]


def test_no_probability_comes_from_a_fit_that_saw_the_picture():
    """A fit that had seen the odd label among equal pictures would not be as sure."""
    features = np.concatenate([np.eye(8)[:4].repeat(6, 0), np.eye(8)[:4].repeat(6, 0)])
    labels = np.tile(np.repeat([0, 1], 12), 2)
    odd = 3
    labels[odd] = 1 - labels[odd]
    probed = findings.probe(features, labels, features[:1], 4, 0)
    assert probed.own[odd].argmax() == 1 - labels[odd]
    assert probed.others.shape == (1, 2)
    assert np.allclose(probed.own.sum(1), 1)


def test_planted_errors_are_found_and_the_test_part_changes_nothing_in_training():
    """Six classes far apart, so that what is planted is all that is wrong."""
    rng = np.random.default_rng(0)
    centres = 4 * np.eye(8)[:6]

    def part(counts):
        labels = np.repeat(np.arange(6), counts)
        return centres[labels] + 0.3 * rng.standard_normal((len(labels), 8)), labels

    train, labels = part([30, 30, 20, 10, 6, 2])
    test, true = part([5] * 6)
    labels[3] = 2  # of class 0
    train[40] = test[7]  # across parts
    train[65], other = train[0], 65  # of class 2, a copy of class 0
    train[10] = -10 * np.ones(8)  # far from all
    features = {"train": train, "val": train[:0], "test": test}
    given = {"train": labels, "val": labels[:0], "test": true}
    settings = AuditConfig(twin_cosine=0.999_999)

    def found(features, given):
        tensors = {name: torch.from_numpy(each) for name, each in features.items()}
        judged = judge(tensors, given, 6, settings, seed=1)
        assert judged.unjudged == (5,)  # two pictures for five folds
        return judged.findings

    first = found(features, given)
    kinds = {
        kind: {each.place.row for each in first if (each.kind, each.place.part) == (kind, "train")}
        for kind in ("label", "leak", "conflict", "outlier")
    }
    assert 3 in kinds["label"]
    suggested = {each.place.row: each.suggested for each in first if each.kind == "label"}
    assert suggested[3] == 0
    assert kinds["leak"] == {40}
    assert kinds["conflict"] == {0, other}
    assert 10 in kinds["outlier"]
    poisoned = found({**features, "test": test[:2]}, {**given, "test": 5 - true[:2]})
    for kind in ("label", "conflict", "outlier"):
        rows = {
            (each.place.row, each.score)
            for each in first
            if (each.kind, each.place.part) == (kind, "train")
        }
        assert rows == {
            (each.place.row, each.score)
            for each in poisoned
            if (each.kind, each.place.part) == (kind, "train")
        }
