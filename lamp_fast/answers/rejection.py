"""When to answer "none of these": scores of a whole answer, thresholds, and what refusing buys.

No score needs training: the maximal softmax probability (Hendrycks and Gimpel, ICLR 2017), the
maximal cosine, and the energy (Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS
2020), here with its sign turned, so that of each the larger is the surer.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from lamp_fast.answers.asked import Score
from lamp_fast.answers.calibration import CannotFit


def answer_scores(by: Score, logits: Tensor, confidence: Tensor, cosine_scale: float) -> Tensor:
    """How sure the answer to each picture is; the larger, the surer.

    Args:
        by: "probability" is ``confidence``; "cosine" max_c z_c / s, which is a cosine where the
            method's logits are cosines; "energy" log sum_c exp z_c.
        logits: z [n, C], without a prior.
        confidence: float64 [n], the largest probability of each picture, as it is shown.
        cosine_scale: s, what the method multiplies its cosines by.

    Returns:
        float64 [n].
    """
    if by == "probability":
        return confidence
    scores = logits.double()
    return scores.amax(1) / cosine_scale if by == "cosine" else scores.logsumexp(1)


def threshold(scores: Tensor, rate: float) -> float:
    """The score below which at most a share of pictures like these is refused.

    It is the floor(rate (n + 1))-th smallest: of n + 1 exchangeable pictures each is as likely the
    one that is asked about, so that lies below with probability floor(rate (n + 1)) / (n + 1) at
    most.

    Args:
        scores: float64 [n] of pictures that have an answer.
        rate: more than 0, less than 1; taken as the decimal number that it is written as.

    Raises:
        CannotFit: fewer than 1 / rate - 1 pictures, so that not even the least score will do.
    """
    rank = math.floor(Fraction(str(rate)) * (len(scores) + 1))
    if rank < 1:
        least = math.ceil(1 / Fraction(str(rate)) - 1)
        raise CannotFit(f"takes at least {least} validation pictures, there are {len(scores)}")
    return float(scores.sort().values[rank - 1])


def risk_coverage(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The share of wrong answers among those given, the surest first, one more at a time.

    Pictures of one score come in no order: each stands for the mean of them.

    Args:
        scores: float64 [n], n at least 1.
        right: bool [n].

    Returns:
        Coverage, 1/n .. 1, and risk, both float64 [n].
    """
    _, group, sizes = torch.unique(-scores.double(), return_inverse=True, return_counts=True)
    wrong = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, group, (~right).double())
    given = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    risk = (wrong / sizes).repeat_interleave(sizes).cumsum(0) / given
    return given / len(scores), risk


def area_under(risk: Tensor) -> float:
    """AURC: the mean of the risks over every coverage (Geifman and El-Yaniv, 2017; Geifman et al.,
    ICLR 2019); the smaller, the better the score ranks answers."""
    return float(risk.mean())
