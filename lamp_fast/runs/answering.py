"""From what is asked of answers, and what a run has fitted, to the rules that make them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamp_fast.answers.asked import Asked, Score
from lamp_fast.answers.calibration import CannotFit, distance_aware_scale
from lamp_fast.answers.conformal import quantile
from lamp_fast.answers.rejection import threshold
from lamp_fast.answers.rules import Rules
from lamp_fast.data.words import Words
from lamp_fast.errors import InputError
from lamp_fast.methods.base import Method
from lamp_fast.methods.text import zero_shot_texts
from lamp_fast.runs.fitted import Fitted


@dataclass(frozen=True)
class Situation:
    """What is classified, as far as fitted numbers depend on it.

    Attributes:
        trained: whether each of the names was trained, bool [C].
        trained_alone: whether they are the trained classes, all and no others, in any order.
        shift: what a prior adds to the logits, float64 [C]; None without one.
        tte: whether five views answer together.
        cosine_scale: of the method.
        roll_up: makes probabilities of classes those of a level above; None answers with classes.
        distance_scale: gives :func:`lamp_fast.answers.calibration.distance_aware_scale` of the
            names, or the reason why the method has none.
    """

    trained: Sequence[bool]
    trained_alone: bool
    shift: Tensor | None
    tte: bool
    cosine_scale: float
    roll_up: Callable[[Tensor], Tensor] | None
    distance_scale: Callable[[], Tensor | str]


@dataclass(frozen=True)
class Answering:
    """How answers are made, and what their reader must know of it.

    Attributes:
        rules: applied to logits.
        about: as JSON values: "calibration", and "reject" and "coverage" where they are asked for.
        lines: the same for people.
    """

    rules: Rules
    about: dict[str, Any]
    lines: tuple[str, ...]


def decide(asked: Asked, fitted: Fitted | None, situation: Situation) -> Answering:
    """The rules of one question.

    Args:
        asked: of answers.
        fitted: by the run; None where it had no validation pictures.
        situation: what is classified.

    Raises:
        InputError: a rate or a coverage without what the run has to have fitted for it, for other
            names, views or priors than it was fitted for, or with too few pictures.
    """
    scale, why = _scale(fitted, situation)
    calibration: dict[str, Any] = {}
    lines = []
    if scale is not None:
        calibration = {
            "temperature": fitted.temperature,
            "temperature_error": fitted.temperature_error,
            "validation_pictures": len(fitted.labels),
            "chosen_on": fitted.selected,
        }
        lines.append(f"answers {fitted.describe()}")
    if why is not None:
        calibration["not"] = why
        lines.append(f"answers not calibrated{'' if scale is None else ' all'}: {why}")
    about: dict[str, Any] = {"calibration": calibration or None}
    by, least, limit = asked.by or "probability", None, None
    if asked.reject is not None:
        least, told = _threshold(asked, by, fitted, situation)
        about["reject"] = {"by": by, "below": least, "asked": asked.reject}
        lines.append(f"reject  {by} below {least:.6g}{told}")
    if asked.coverage is not None:
        limit, held = _limit(asked.coverage, fitted, situation)
        about["coverage"] = {"asked": asked.coverage, "limit": limit, "validation": held}
        shown = ", ".join(f"{name} {100 * share:.1f}%" for name, share in held.items())
        lines.append(
            f"sets    {100 * asked.coverage:g}%: of {fitted.pictures}"
            f" they hold the right name of {shown}"
        )
    told = by, situation.cosine_scale, least, limit, situation.roll_up
    rules = Rules(scale, situation.shift, *told)
    return Answering(rules, about, tuple(lines))


def _scale(fitted: Fitted | None, situation: Situation) -> tuple[Tensor | None, str | None]:
    """1 / T by class, and why not where anything is not calibrated."""
    if fitted is None:
        return None, None
    if fitted.scale is None:
        return None, fitted.why_uncalibrated
    prior = situation.shift is not None
    if (other := fitted.why_other(situation.tte, prior=prior)) is not None:
        return None, other
    trained = torch.tensor(list(situation.trained))
    scale = torch.full((len(trained),), fitted.scale, dtype=torch.float64)
    if trained.all():
        return scale, None
    moved = situation.distance_scale()
    if isinstance(moved, str):
        why = f"pictures whose answer was not trained are left as they are ({moved})"
        return scale.masked_fill(~trained, math.nan), why
    return torch.where(trained, scale, scale * moved.cpu()), None


def _fits(what: str, fitted: Fitted | None, situation: Situation) -> Fitted:
    if fitted is None:
        raise InputError(
            f"{what}: the run has no validation pictures to fit it on; expected one that was"
            " trained with them"
        )
    other = fitted.why_other(situation.tte, prior=situation.shift is not None)
    if situation.roll_up is not None:
        other = "fitted for classes, not for a level above them"
    if other is None and not situation.trained_alone:
        other = "fitted over the trained classes, expected these and no others"
    if other is not None:
        raise InputError(f"{what}: {other}")
    return fitted


def _threshold(
    asked: Asked, by: Score, fitted: Fitted | None, situation: Situation
) -> tuple[float, str]:
    """Below what there is no answer, and where that comes from."""
    rate, score = asked.rejection()
    if rate is None:
        return score, ""
    what = f"reject {asked.reject}"
    fitted = _fits(f"{what}, not a score", fitted, situation)
    try:
        least = threshold(fitted.scores(by), rate)
    except CannotFit as error:
        raise InputError(f"{what}: {error}") from None
    return least, f", {asked.reject} of {fitted.pictures}"


def _limit(
    coverage: float, fitted: Fitted | None, situation: Situation
) -> tuple[float, dict[str, float]]:
    """The quantile, and of each group the share of validation pictures whose sets hold theirs."""
    fitted = _fits(f"coverage {coverage}", fitted, situation)
    scores = fitted.scores("nonconformity")
    try:
        limit = quantile(scores, coverage)
    except CannotFit as error:
        raise InputError(f"coverage {coverage}: {error}") from None
    groups = fitted.groups(torch.tensor(fitted.labels))
    held = {
        name: float((scores[some] <= limit).double().mean())
        for name, some in groups.items()
        if bool(some.any())
    }
    return limit, held


@torch.no_grad()
def moved_names(
    method: Method,
    prepare: Callable[[tuple[str, ...]], Any],
    trained: tuple[str, ...],
    template: str,
    words: Words | None,
    names: tuple[str, ...],
    adapted: bool,
) -> Tensor | str:
    """:func:`distance_aware_scale` of some names; or why the method has no features of them.

    Args:
        method: whose texts are compared with CLIP's own.
        prepare: makes its ``classes`` of names.
        trained: the trained classes.
        template, words: as of zero-shot CLIP on the run's data.
        names: of the question.
        adapted: as :meth:`Method.logits` takes it.
    """
    if method.no_class_matrix is not None:
        return method.no_class_matrix
    tuned = [
        method.fixed_sides(method.clip, prepare(some), which).classes
        for some, which in ((names, adapted), (trained, False))
    ]
    plain = [zero_shot_texts(method.clip, some, template, words) for some in (names, trained)]
    return distance_aware_scale(tuned[0], plain[0], tuned[1], plain[1])
