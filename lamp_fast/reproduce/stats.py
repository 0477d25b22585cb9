"""Mean and spread over seeds, and whether two methods differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

# Sign flips are enumerated up to this many, and drawn beyond it.
MAX_FLIPS = 100_000
MIN_DATA_SETS = 6


def mean(values: tuple[float, ...]) -> float | None:
    """Of at least one value, else None."""
    return float(np.mean(values)) if values else None


def spread(values: tuple[float, ...]) -> float | None:
    """Standard deviation with n - 1; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class PairedTest:
    """Two methods on the same data sets and seeds.

    Attributes:
        difference: mean over data sets of the mean over seeds of first - second.
        pairs: how many (data set, seed) both have.
        data_sets: how many data sets these come from.
        p_pairs: two-sided p of the sign-flip permutation test: under the null hypothesis the two
            methods are exchangeable in every pair. It speaks of these data sets. None where no
            pair differs, and for a single pair.
        p_data_sets: two-sided p of Wilcoxon's signed-rank test over the data sets' mean differences
            (Demsar 2006). It speaks of data sets like these. None below six of them, where it
            cannot reach 0.05.
    """

    difference: float
    pairs: int
    data_sets: int
    p_pairs: float | None
    p_data_sets: float | None


def paired_test(
    first: Mapping[tuple[str, Any], float], second: Mapping[tuple[str, Any], float]
) -> PairedTest | None:
    """Compare values by (data set, seed), or whatever else numbers the draws of a data set; None
    where the two have no such pair in common."""
    common = sorted(first.keys() & second.keys())
    if not common:
        return None
    differences = np.array([first[each] - second[each] for each in common])  # [N]
    names = sorted({name for name, _ in common})
    member = np.array([[name == each for each, _ in common] for name in names])  # [data sets, N]
    weights = (member / member.sum(axis=1, keepdims=True)).mean(axis=0)  # [N], of each pair
    by_data = (member @ differences) / member.sum(axis=1)
    p_pairs = p_data_sets = None
    if differences.any() and len(common) > 1:
        p_pairs = stats.permutation_test(
            (weights * differences,),
            lambda values, axis: values.sum(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=MAX_FLIPS,
            rng=np.random.default_rng(0),
        ).pvalue
    if by_data.any() and len(names) >= MIN_DATA_SETS:
        p_data_sets = stats.wilcoxon(by_data).pvalue
    return PairedTest(
        difference=float(weights @ differences),
        pairs=len(common),
        data_sets=len(names),
        p_pairs=None if p_pairs is None else float(p_pairs),
        p_data_sets=None if p_data_sets is None else float(p_data_sets),
    )
