"""Mean and spread over seeds, intervals over pictures, and whether two methods differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse, stats

# Sign flips are enumerated up to this many, and drawn beyond it.
MAX_FLIPS = 100_000
MIN_DATA_SETS = 6

RESAMPLES, LEVEL = 2000, 0.95
# Numbers of a block of resamples that are held at once.
_BLOCK = 1 << 24


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


class Interval(NamedTuple):
    """Where a figure lies, by the resamples: between ``low`` and ``high``."""

    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Of a difference: whether it may as well be none."""
        return self.low <= 0 <= self.high


class Bootstrap:
    """Scores over resampled pictures, of as many methods as one likes over the same resamples.

    The bootstrap is stratified by class (Davison and Hinkley 1997, section 3.2): from the pictures
    of each class as many are drawn with replacement as there are, so that every class keeps its
    size and macro-F1 its classes. A class of a single picture is therefore the same in every
    resample: its own uncertainty is in no interval.

    Args:
        labels: true classes, integers [N] in 0..classes-1.
        classes: C, also counting classes that do not occur.
        resamples: how many, R.
        seed: of the draws.
    """

    def __init__(
        self, labels: np.ndarray, classes: int, resamples: int = RESAMPLES, seed: int = 0
    ) -> None:
        self.labels, self.classes, self.resamples, self.seed = labels, classes, resamples, seed

    def scores(self, predictions: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
        """Accuracy and macro-F1, as :func:`lamp_fast.runs.metrics.scores` defines them.

        Args:
            predictions: by method, predicted classes, integers [N].

        Returns:
            By method, float64 [R] each of ``accuracy`` and ``macro_f1``, resample by resample.
        """
        shown = np.bincount(self.labels, minlength=self.classes)  # [C], in every resample
        answers = {}
        for name, predicted in predictions.items():
            right = predicted == self.labels
            hits = self._by_class(np.flatnonzero(right), self.labels[right])
            answers[name] = hits, self._by_class(np.arange(len(predicted)), predicted)
        found: dict[str, dict[str, list]] = {
            name: {"accuracy": [], "macro_f1": []} for name in predictions
        }
        for weights in self._weights():
            for name, (hits, given) in answers.items():
                right = weights @ hits  # [r, C], true positives
                answered = weights @ given  # [r, C], how often each class was the answer
                parts = shown + answered
                f1 = np.divide(2 * right, parts, out=np.zeros(parts.shape), where=parts > 0)
                found[name]["accuracy"].append(right.sum(axis=1) / len(self.labels))
                found[name]["macro_f1"].append(f1.mean(axis=1))
        return {
            name: {metric: np.concatenate(blocks) for metric, blocks in each.items()}
            for name, each in found.items()
        }

    def _by_class(self, rows: np.ndarray, classes: np.ndarray) -> sparse.csr_array:
        """[N, C], 1 where a picture of ``rows`` is of its class."""
        shape = len(self.labels), self.classes
        return sparse.csr_array((np.ones(len(rows)), (rows, classes)), shape=shape)

    def _weights(self) -> Iterator[np.ndarray]:
        """How often each picture is in each resample, float64 [r, N], block by block."""
        generator = np.random.default_rng(self.seed)
        members = [np.flatnonzero(self.labels == each) for each in range(self.classes)]
        block = max(1, _BLOCK // max(1, len(self.labels)))
        for first in range(0, self.resamples, block):
            weights = np.zeros((min(block, self.resamples - first), len(self.labels)))
            for rows in members:
                if count := len(rows):
                    drawn = generator.multinomial(count, np.full(count, 1 / count), len(weights))
                    weights[:, rows] = drawn
            yield weights


def interval(values: np.ndarray, level: float = LEVEL) -> Interval:
    """The percentile interval of resampled values: ``level`` of them lie within."""
    edge = 50 * (1 - level)
    low, high = np.percentile(values, [edge, 100 - edge])
    return Interval(float(low), float(high))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p of McNemar's exact test: of the pictures that only one of two methods has right,
    half would be either's if they were equally accurate.

    Args:
        first, second: bool [N], whether each has each picture right.

    Returns:
        The p of the binomial test; 1 where they are right on the same pictures.
    """
    only_first, only_second = (first & ~second).sum(), (second & ~first).sum()
    differ = int(only_first + only_second)
    if not differ:
        return 1.0
    return float(stats.binomtest(int(only_first), differ).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) of several tests: the chance of even one false rejection
    among them stays below the level that these are compared with."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(order), 0.0
    for rank, place in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
