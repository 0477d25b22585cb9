"""Probabilities that mean what they say: a temperature, and how far confidences are off.

The temperature is Guo et al.'s ("On Calibration of Modern Neural Networks", ICML 2017); names that
were not trained have Wang et al.'s distance-aware calibration ("Open-Vocabulary Calibration for
Fine-tuned CLIP", ICML 2024). Both multiply all logits of a picture by one positive number, so the
order of its classes stays.
"""

from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from torch import Tensor

BINS = 15
# Distance-aware calibration's own numbers: neighbours, and the distance of one and the same class.
NEIGHBOURS = 5
SAME_CLASS = 0.05
# 1/T is told from 0, where every class is as likely, if it is at least two standard errors away.
MAX_RELATIVE_ERROR = 0.5

# Beyond this a slope of exactly 0 is only a matter of rounding.
_MAX_INVERSE = 2.0**40


class CannotFit(ValueError):
    """What the pictures at hand do not determine; the message says why."""


@dataclass(frozen=True)
class Temperature:
    """What logits are divided by.

    Attributes:
        value: above 0.
        error: its standard error, of the second derivative of the loss at its minimum.
    """

    value: float
    error: float


def cross_entropy(logits: Tensor, labels: Tensor, inverse: float = 1.0) -> float:
    """Mean of -log softmax(inverse * logits)_label.

    Args:
        logits: [n, C].
        labels: int64 [n].
        inverse: 1 / T.
    """
    scaled = inverse * logits.double()
    right = scaled.gather(1, labels[:, None]).squeeze(1)
    return float((scaled.logsumexp(1) - right).mean())


def fit_temperature(logits: Tensor, labels: Tensor) -> Temperature:
    """The temperature of least cross-entropy (:func:`cross_entropy`).

    In a = 1/T the loss is convex: each picture's is a log-sum-exp of linear functions minus a
    linear one. So its slope, mean of E_p[z] - z_y with p = softmax(a z), never falls, and its one
    root in a > 0 is bracketed and solved for.

    Args:
        logits: [n, C].
        labels: int64 [n], in 0..C-1.

    Raises:
        CannotFit: no picture; every one right, so that the smaller T the better; a slope of at
            least 0 already at a = 0, where T is infinite; or a root that so few pictures do not
            determine (:data:`MAX_RELATIVE_ERROR`).
    """
    count = len(labels)
    if not count:
        raise CannotFit("there is no validation picture")
    scores = logits.double()
    # Differences from the right class: the slope then is not lost in the size of the logits.
    scores = scores - scores.gather(1, labels[:, None])
    if float(scores.amax(1).max()) <= 0:
        raise CannotFit(f"all {count} validation pictures are right, which bounds no temperature")

    def slope(inverse: float) -> float:
        return float(((inverse * scores).softmax(1) * scores).sum(1).mean())

    if slope(0.0) >= 0:
        raise CannotFit(
            f"on {count} validation pictures the logits are no better than all classes alike"
        )
    high = 1.0
    while slope(high) < 0:
        high *= 2
        if high > _MAX_INVERSE:
            raise CannotFit("the validation logits differ too little for a temperature")
    inverse = float(brentq(slope, 0.0, high, xtol=1e-300, rtol=1e-15))
    weights = (inverse * scores).softmax(1)
    mean = (weights * scores).sum(1, keepdim=True)
    curvature = float((weights * (scores - mean).square()).sum(1).mean())
    # The information of n pictures is n times the curvature; errors of a and of T are alike,
    # relatively, to first order.
    relative = 1 / (inverse * (count * curvature) ** 0.5) if curvature > 0 else float("inf")
    if relative > MAX_RELATIVE_ERROR:
        raise CannotFit(
            f"{count} validation pictures do not determine a temperature (standard error"
            f" {100 * relative:.0f}% of it, expected at most {100 * MAX_RELATIVE_ERROR:.0f}%)"
        )
    return Temperature(1 / inverse, relative / inverse)


def probabilities(logits: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """softmax(scale * logits), float64 [n, C].

    Args:
        logits: [n, C].
        scale: 1 / T, of all or of each picture [n].
    """
    scale = torch.as_tensor(scale, dtype=torch.float64, device=logits.device)
    return (scale.reshape(-1, 1) * logits.double()).softmax(1)


@dataclass(frozen=True)
class Bins:
    """Pictures by how sure the answer was, in equal intervals of 0..1 with their upper ends.

    Attributes:
        counts: int64 [bins], pictures.
        confidence, accuracy: float64 [bins], means over them; 0 in an empty bin.
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error: sum of n_b / N |accuracy_b - confidence_b|."""
        gaps = (self.accuracy - self.confidence).abs()
        return float((self.counts * gaps).sum() / self.counts.sum())


def bin_confidences(confidence: Tensor, right: Tensor, bins: int = BINS) -> Bins:
    """Sort pictures into :class:`Bins`.

    Args:
        confidence: float64 [n], the largest probability of each picture; n at least 1.
        right: bool [n], whether that class was the right one.
        bins: how many.
    """
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    which = (torch.bucketize(confidence.double().contiguous(), edges) - 1).clamp(0, bins - 1)
    counts = torch.bincount(which, minlength=bins)
    sums = [
        torch.zeros(bins, dtype=torch.float64).index_add(0, which, each.double())
        for each in (confidence, right)
    ]
    return Bins(counts, *(each / counts.clamp(min=1) for each in sums))


def distance_aware_scale(
    tuned: Tensor, plain: Tensor, tuned_trained: Tensor, plain_trained: Tensor
) -> Tensor:
    """What multiplies the logits of a picture whose answer is a name, by how training moved names.

    With d_k the distance to the k-th nearest text feature of a trained class, a name's nearness is
    exp(-mean of d_1..d_K), K = :data:`NEIGHBOURS`; its scale is the nearness by the tuned features
    over that by CLIP's own. It is 1 where the tuned d_1 is below :data:`SAME_CLASS`.

    Args:
        tuned, plain: text features of the names, [C, D] and [C, E], of any length.
        tuned_trained, plain_trained: the same of the trained classes.

    Returns:
        float64 [C], above 0.
    """
    distances = [
        torch.cdist(_unit(names), _unit(trained), compute_mode="donot_use_mm_for_euclid_dist")
        for names, trained in ((tuned, tuned_trained), (plain, plain_trained))
    ]
    nearest = [
        each.topk(min(NEIGHBOURS, each.shape[1]), dim=1, largest=False).values for each in distances
    ]
    scale = (nearest[1].mean(1) - nearest[0].mean(1)).exp()
    return torch.where(nearest[0][:, 0] < SAME_CLASS, torch.ones_like(scale), scale)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.double(), dim=-1)
