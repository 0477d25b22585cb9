"""Sets of names that hold the right one as often as is asked: split conformal prediction.

The score is LAC's, 1 - p_y (Sadinle et al., "Least Ambiguous Set-Valued Classifiers with Bounded
Error Levels", JASA 2019); the quantile is that of Vovk et al. ("Algorithmic Learning in a Random
World", 2005). Over pictures like those of validation the promise holds for all of them together,
not for each class.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from lamp_fast.answers.calibration import CannotFit


def nonconformity(probabilities: Tensor, labels: Tensor) -> Tensor:
    """1 - p_y, float64 [n].

    Args:
        probabilities: float64 [n, C].
        labels: int64 [n].
    """
    return 1 - probabilities.gather(1, labels[:, None]).squeeze(1)


def least_pictures(coverage: float) -> int:
    """How many validation pictures a coverage takes: ceil(1 / alpha) - 1, alpha = 1 - coverage.

    With fewer, ceil((n + 1)(1 - alpha)) exceeds n, and only the set of all names would do.
    """
    return math.ceil(1 / (1 - Fraction(str(coverage)))) - 1


def quantile(scores: Tensor, coverage: float) -> float:
    """The ceil((n + 1) coverage)-th smallest score, which a new picture's exceeds with probability
    1 - coverage at most.

    Args:
        scores: float64 [n], of :func:`nonconformity`.
        coverage: more than 0, less than 1; taken as the decimal number that it is written as.

    Raises:
        CannotFit: fewer pictures than :func:`least_pictures`.
    """
    count = len(scores)
    if count < (least := least_pictures(coverage)):
        raise CannotFit(f"takes at least {least} validation pictures, there are {count}")
    rank = math.ceil((count + 1) * Fraction(str(coverage)))
    return float(scores.sort().values[rank - 1])


def prediction_sets(probabilities: Tensor, limit: float) -> Tensor:
    """The classes that are not too unlikely: 1 - p_c <= limit; a set may be empty.

    Args:
        probabilities: float64 [n, C].
        limit: of :func:`quantile`.

    Returns:
        bool [n, C].
    """
    return 1 - probabilities <= limit


def class_gap(held: Tensor, labels: Tensor, coverage: float) -> float:
    """Mean over classes of |share of their pictures whose set holds them - coverage|.

    Args:
        held: bool [n], whether each picture's set holds its class; n at least 1.
        labels: int64 [n]; classes without a picture do not count.
        coverage: as asked.
    """
    counts = torch.bincount(labels)
    shown = counts > 0
    kept = torch.bincount(labels, weights=held.double())
    return float((kept[shown] / counts[shown] - coverage).abs().mean())
