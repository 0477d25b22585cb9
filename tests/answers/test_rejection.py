"""Scores, thresholds and risk by coverage, against definitions that are written out."""

import itertools
import math

import pytest
import torch

from lamp_fast.answers.calibration import CannotFit
from lamp_fast.answers.rejection import area_under, risk_coverage, threshold
from lamp_fast.answers.rules import Rules

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.25]])


def test_three_scores():
    rows = LOGITS.double().tolist()
    sums = [sum(math.exp(value) for value in row) for row in rows]
    expected = {
        "probability": [math.exp(max(row)) / total for row, total in zip(rows, sums, strict=True)],
        "cosine": [max(row) / 4 for row in rows],
        "energy": [math.log(total) for total in sums],
    }
    for by, values in expected.items():
        rules = Rules(by=by, cosine_scale=4.0, threshold=(values[0] + values[1]) / 2)
        answered = rules.answer(LOGITS)
        assert answered.score.tolist() == pytest.approx(values, rel=1e-14)
        assert answered.refused.tolist() == [False, True]


def test_a_prior_moves_probabilities_alone():
    shift = torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64)
    for by in ("cosine", "energy"):
        plain, moved = (Rules(by=by, shift=each).answer(LOGITS) for each in (None, shift))
        assert torch.equal(plain.score, moved.score)
        assert moved.order[:, 0].tolist() == [1, 1]
    moved = Rules(shift=shift).answer(LOGITS)
    assert torch.equal(moved.score, (LOGITS.double() + shift).softmax(1).amax(1))


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (99, 0.07), (29, 0.5), (9, 0.1)])
def test_a_threshold_refuses_its_share_of_exchangeable_pictures(count, rate):
    """Each of n + 1 distinct scores in turn is the new one: exactly floor(rate (n + 1)) of them
    lie below the threshold of the others."""
    every = torch.randperm(count + 1, generator=torch.Generator().manual_seed(0)).double()
    refused = sum(
        float(every[one]) < threshold(torch.cat([every[:one], every[one + 1 :]]), rate)
        for one in range(count + 1)
    )
    assert refused == round(rate * (count + 1))


def test_too_few_pictures_for_a_rate():
    scores = torch.arange(18).double()
    with pytest.raises(CannotFit, match="at least 19 validation pictures, there are 18"):
        threshold(scores, 0.05)
    assert threshold(torch.arange(19).double(), 0.05) == 0


def test_risk_by_coverage_is_the_mean_over_orders_of_ties():
    scores = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1], dtype=torch.float64)
    right = torch.tensor([True, False, True, False, True])
    risks = []
    for order in itertools.permutations(range(5)):
        if [float(scores[each]) for each in order] != sorted(scores.tolist(), reverse=True):
            continue
        wrong = [not right[each] for each in order]
        risks.append([sum(wrong[:given]) / given for given in range(1, 6)])
    coverage, risk = risk_coverage(scores, right)
    assert len(risks) == 6
    assert coverage.tolist() == [0.2, 0.4, 0.6, 0.8, 1.0]
    expected = torch.tensor(risks, dtype=torch.float64).mean(0)
    assert risk.tolist() == pytest.approx(expected.tolist(), rel=1e-14)
    assert area_under(risk) == pytest.approx(float(expected.mean()), rel=1e-14)


def test_a_score_that_knows_what_is_wrong_has_the_least_area():
    right = torch.tensor([True] * 6 + [False] * 2)
    areas = [
        area_under(risk_coverage(torch.tensor(each).double(), right)[1])
        for each in (right.tolist(), [1] * 8, (~right).tolist())
    ]
    assert areas == sorted(areas)
    # Right six times, then wrong twice.
    assert areas[0] == pytest.approx((1 / 7 + 2 / 8) / 8, rel=1e-14)
