"""What a run keeps of its validation pictures so that answers can be calibrated and refused.

``answers.json`` holds a temperature and a few numbers a picture, never a picture: enough for
thresholds and sets of any level. It belongs to the learned tensors beside it, by their sha256.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamp_fast.answers.asked import SCORES
from lamp_fast.answers.calibration import CannotFit, fit_temperature, probabilities
from lamp_fast.answers.conformal import nonconformity
from lamp_fast.answers.rejection import answer_scores
from lamp_fast.errors import InputError
from lamp_fast.files import read_json, write_json
from lamp_fast.runs.record import read_as
from lamp_fast.tensors import digest_tensors


@dataclass(frozen=True)
class Fitted:
    """What was fitted on n validation pictures of the C trained classes, over these classes alone.

    Attributes:
        weights: sha256 of the learned tensors that scored them.
        seed: of the run.
        selected: whether the pictures have chosen an epoch or settings before, which makes what is
            fitted on them a little optimistic.
        tte: whether five views answered together.
        temperature: what logits are divided by; None where they are left as they are.
        temperature_error: its standard error.
        why_uncalibrated: why there is no temperature; None where there is one.
        classes: C.
        tail: the classes that are not of the head; none where all are equally large.
        labels: [n].
        probability, cosine, energy: [n], how sure each answer was, see
            :func:`lamp_fast.answers.rejection.answer_scores`.
        nonconformity: [n], see :func:`lamp_fast.answers.conformal.nonconformity`.
    """

    weights: str
    seed: int
    selected: bool
    tte: bool
    temperature: float | None
    temperature_error: float | None
    why_uncalibrated: str | None
    classes: int
    tail: tuple[int, ...]
    labels: tuple[int, ...]
    probability: tuple[float, ...]
    cosine: tuple[float, ...]
    energy: tuple[float, ...]
    nonconformity: tuple[float, ...]

    @property
    def scale(self) -> float | None:
        """What multiplies the logits: 1 / T."""
        return None if self.temperature is None else 1 / self.temperature

    def why_other(self, tte: bool, *, prior: bool) -> str | None:
        """Why it does not hold for scores that are made in another way; None where it does.

        Args:
            tte: whether five views answer together.
            prior: whether scores are corrected to other shares of classes.
        """
        if prior:
            return "fitted without a prior"
        if tte != self.tte:
            return f"fitted with {'five views' if self.tte else 'one view'} of each picture"
        return None

    def scores(self, by: str) -> Tensor:
        """How sure each answer was, float64 [n]."""
        return torch.tensor(getattr(self, by), dtype=torch.float64)

    def groups(self, labels: Tensor) -> dict[str, Tensor]:
        """Which pictures, bool [N], are of each group of classes: all, and head and tail if any.

        Args:
            labels: int64 [N].
        """
        groups = {"all": torch.ones(len(labels), dtype=torch.bool)}
        if self.tail:
            tail = torch.isin(labels, torch.tensor(self.tail))
            groups |= {"head": ~tail, "tail": tail}
        return groups

    def describe(self) -> str:
        """What a reader of an answer must know, in a line."""
        if self.temperature is None:
            return f"not calibrated: {self.why_uncalibrated}"
        told = f"temperature {self.temperature:.3f} +- {self.temperature_error:.3f}"
        return f"{told}, fitted on {self.pictures}"

    @property
    def pictures(self) -> str:
        """The validation pictures in words."""
        chosen = ", which the run has chosen on before: a little optimistic"
        return f"{len(self.labels):,} validation pictures{chosen if self.selected else ''}"


def fit(
    logits: Tensor,
    labels: Tensor,
    *,
    cosine_scale: float,
    head: np.ndarray | None,
    state: Mapping[str, Tensor],
    seed: int,
    selected: bool,
    tte: bool,
) -> Fitted:
    """Fit all that there is to fit.

    Args:
        logits: [n, C] of validation pictures over the trained classes, as they are predicted.
        labels: int64 [n], n at least 1.
        cosine_scale: of the method.
        head: bool [C], the classes of the head; None where all are equally large.
        state: what was learned, by name.
        seed, selected, tte: see :class:`Fitted`.
    """
    temperature = why = None
    try:
        temperature = fit_temperature(logits, labels)
    except CannotFit as error:
        why = str(error)
    likely = probabilities(logits, 1.0 if temperature is None else 1 / temperature.value)
    scores = {
        by: tuple(answer_scores(by, logits, likely.amax(1), cosine_scale).tolist()) for by in SCORES
    }
    return Fitted(
        weights=digest_tensors(state),
        seed=seed,
        selected=selected,
        tte=tte,
        temperature=None if temperature is None else temperature.value,
        temperature_error=None if temperature is None else temperature.error,
        why_uncalibrated=why,
        classes=logits.shape[1],
        tail=() if head is None else tuple(np.flatnonzero(~head).tolist()),
        labels=tuple(labels.tolist()),
        nonconformity=tuple(nonconformity(likely, labels).tolist()),
        **scores,
    )


def write_fitted(file: Path, fitted: Fitted, state: Mapping[str, Tensor]) -> None:
    """Write it for the same weights, which may be kept in another precision here."""
    write_json(file, asdict(replace(fitted, weights=digest_tensors(state))))


def read_fitted(file: Path, state: Mapping[str, Tensor], classes: int) -> Fitted:
    """Read what :func:`write_fitted` wrote.

    Args:
        file: of a run or of a saved classifier.
        state: the learned tensors beside it.
        classes: how many were trained.

    Raises:
        InputError: missing, damaged, or of other weights.
    """
    fitted = read_as(Fitted, read_json(file), str(file))
    if reason := _objection(fitted, classes):
        raise InputError(f"{file}: damaged ({reason})")
    if fitted.weights != digest_tensors(state):
        raise InputError(f"{file}: was fitted for other weights than those beside it")
    return fitted


def _objection(fitted: Fitted, classes: int) -> str | None:
    count, temperature = len(fitted.labels), fitted.temperature
    parts: dict[str, Any] = {name: getattr(fitted, name) for name in (*SCORES, "nonconformity")}
    if fitted.classes != classes:
        return f"classes {fitted.classes}, the run has {classes}"
    if not count or any(len(each) != count for each in parts.values()):
        return "expected as many scores as labels"
    if not all(0 <= each < classes for each in (*fitted.labels, *fitted.tail)):
        return f"a class that is not in 0..{classes - 1}"
    if not all(0 <= each <= 1 for name in ("probability", "nonconformity") for each in parts[name]):
        return "a probability that is not in 0..1"
    if temperature is None:
        return None if fitted.why_uncalibrated else "neither a temperature nor why there is none"
    return None if temperature > 0 else f"temperature {temperature}"
