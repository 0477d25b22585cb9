"""Conformal sets: the quantile by counting, and coverage on resamples within its own spread."""

import math

import pytest
import torch
from scipy.stats import betabinom

from lamp_fast.answers.calibration import CannotFit, probabilities
from lamp_fast.answers.conformal import (
    class_gap,
    least_pictures,
    nonconformity,
    prediction_sets,
    quantile,
)


@pytest.mark.parametrize(
    ("coverage", "least"), [(0.9, 9), (0.95, 19), (0.5, 1), (0.99, 99), (0.8, 4), (0.85, 6)]
)
def test_the_least_number_of_pictures(coverage, least):
    assert least_pictures(coverage) == least
    scores = torch.arange(least).double()
    # ceil((n + 1) coverage) is at most n.
    assert quantile(scores, coverage) <= least - 1
    with pytest.raises(CannotFit, match=f"at least {least} validation pictures, there are"):
        quantile(scores[1:], coverage)


@pytest.mark.parametrize(("count", "coverage"), [(9, 0.9), (19, 0.9), (99, 0.07), (99, 0.29)])
def test_each_of_exchangeable_pictures_in_turn(count, coverage):
    """Of n + 1 distinct scores exactly ceil((n + 1) coverage) are at most the quantile of the
    others, although binary fractions of 0.07 or 0.29 times 100 lie above the whole number."""
    every = torch.randperm(count + 1, generator=torch.Generator().manual_seed(0)).double()
    held = sum(
        float(every[one]) <= quantile(torch.cat([every[:one], every[one + 1 :]]), coverage)
        for one in range(count + 1)
    )
    assert held == round(coverage * (count + 1))


def test_sets_by_their_definition():
    likely = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.2, 0.3, 0.5]]).double()
    labels = torch.tensor([0, 1, 0])
    scores = nonconformity(likely, labels)
    assert scores.tolist() == pytest.approx([0.3, 0.65, 0.8])
    sets = prediction_sets(likely, float(scores[1]))
    assert sets.tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    # The right class is held exactly where the score is within the limit, to the bit.
    held = sets.gather(1, labels[:, None]).squeeze(1)
    assert torch.equal(held, scores <= scores[1])
    assert not prediction_sets(likely, 0.1).any()
    # Class 0: one of two, class 1: one of one.
    assert class_gap(held, labels, 0.9) == pytest.approx((0.4 + 0.1) / 2)


def test_coverage_holds_on_200_resamples():
    """The number of m new pictures that are held, of continuous scores, is beta-binomial: with
    k = ceil((n + 1) coverage), coverage given the validation pictures is Beta(k, n + 1 - k)
    distributed (the k-th of n uniform order statistics; Vovk, ACML 2012, Proposition 2a), and the
    count is binomial given that.

    So the mean over R independent resamples has that variance / R. And each count lies between the
    distribution's 0.1% quantiles but for 0.2% of them: of 200, more than 4 with probability 1e-4.
    """
    count, new, resamples, coverage = 60, 100, 200, 0.9
    generator = torch.Generator().manual_seed(0)
    rank = math.ceil((count + 1) * 0.9)
    expected = betabinom(new, rank, count + 1 - rank)
    held = []
    for _ in range(resamples):
        # More like each other, and wrong more often, than their temperature says.
        logits = torch.randn(count + new, 6, generator=generator, dtype=torch.float64)
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
        likely = probabilities(logits, 3.0)
        limit = quantile(nonconformity(likely[:count], labels[:count]), coverage)
        sets = prediction_sets(likely[count:], limit)
        held.append(int(sets.gather(1, labels[count:, None]).sum()))
    mean = sum(held) / resamples
    # Four standard deviations of the mean: once in 16,000 seeds.
    assert abs(mean - expected.mean()) < 4 * expected.std() / resamples**0.5
    low, high = expected.ppf([0.001, 0.999])
    assert sum(not low <= each <= high for each in held) <= 4
    # At least what was asked, on average: rank / (count + 1) >= coverage.
    assert expected.mean() / new >= coverage
