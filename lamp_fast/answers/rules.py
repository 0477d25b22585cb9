"""What becomes of class scores: order, probabilities, whether there is an answer, and a set."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lamp_fast.answers.asked import Score
from lamp_fast.answers.calibration import probabilities
from lamp_fast.answers.conformal import prediction_sets
from lamp_fast.answers.rejection import answer_scores


@dataclass(frozen=True)
class Answered:
    """What is said of n pictures over C classes.

    Attributes:
        order: int64 [n, C], classes from the likeliest down; of equal scores the first comes first.
        raw: float64 [n, C], softmax of the scores as they are, in the order of the classes.
        probabilities: the same of calibrated scores; ``raw`` where they are not calibrated.
        calibrated: bool [n].
        score: float64 [n], how sure each answer is.
        refused: bool [n], whether that is too little to answer; None where nothing is refused.
        sets: bool [n, C], the classes that remain; None where no set is asked for.
    """

    order: Tensor
    raw: Tensor
    probabilities: Tensor
    calibrated: Tensor
    score: Tensor
    refused: Tensor | None
    sets: Tensor | None


@dataclass(frozen=True)
class Rules:
    """How the scores of one list of C classes become answers.

    Attributes:
        scale: float64 [C], 1 / T of a picture whose answer is that class; NaN where there is none.
            None calibrates nothing.
        shift: float64 [C], what a prior adds to the logits; None adds nothing.
        by: how sure an answer is, see :func:`answer_scores`.
        cosine_scale: of the method.
        threshold: a score below is no answer; None answers always.
        roll_up: makes probabilities [n, C] those of K parents [n, K], which are then the answers,
            in the order of uncalibrated sums; not with ``limit``. None answers with classes.
        limit: of :func:`lamp_fast.answers.conformal.quantile`; None makes no sets.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    by: Score = "probability"
    cosine_scale: float = 1.0
    threshold: float | None = None
    limit: float | None = None
    roll_up: Callable[[Tensor], Tensor] | None = None

    def answer(self, logits: Tensor) -> Answered:
        """Apply them to logits [n, C], on whatever device."""
        shifted = logits if self.shift is None else logits + self.shift.to(logits)
        # The order is that of the logits: no calibration can change it, not even by rounding.
        order = shifted.argsort(dim=1, descending=True, stable=True)
        raw = calibrated = probabilities(shifted)
        known = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        if self.scale is not None:
            scale = self.scale.to(logits.device)[order[:, 0]]
            known = ~scale.isnan()
            calibrated = probabilities(shifted, scale.nan_to_num(nan=1.0))
        if self.roll_up is not None:
            raw, calibrated = self.roll_up(raw), self.roll_up(calibrated)
            order = raw.argsort(dim=1, descending=True, stable=True)
        score = answer_scores(self.by, logits, calibrated.amax(1), self.cosine_scale)
        return Answered(
            order=order,
            raw=raw,
            probabilities=calibrated,
            calibrated=known,
            score=score,
            refused=None if self.threshold is None else score < self.threshold,
            sets=None if self.limit is None else prediction_sets(calibrated, self.limit),
        )
