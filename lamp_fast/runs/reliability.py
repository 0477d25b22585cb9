"""How far answers can be trusted: on test pictures, with what was fitted on validation pictures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from lamp_fast.answers.asked import SCORES
from lamp_fast.answers.calibration import CannotFit, bin_confidences, probabilities
from lamp_fast.answers.conformal import class_gap, prediction_sets, quantile
from lamp_fast.answers.rejection import answer_scores, area_under, risk_coverage
from lamp_fast.errors import InputError
from lamp_fast.files import read_json, write_json
from lamp_fast.methods.base import Method
from lamp_fast.runs.experiment import Experiment
from lamp_fast.runs.fitted import Fitted
from lamp_fast.runs.record import read_as

# Points that are kept of a curve, however many pictures it has.
MAX_POINTS = 200


@dataclass(frozen=True)
class Group:
    """The pictures of a group of classes; figures in 0..1 but for the size of sets.

    Attributes:
        name: all, head or tail.
        pictures: how many.
        accuracy: of them.
        ece, ece_calibrated: expected calibration error as the scores are and with the temperature;
            the second is None without one.
        covered: the share of them whose set holds the right name; None without sets, as below.
        set_size: names in a set, on average.
        empty_sets: the share of sets without a name.
    """

    name: str
    pictures: int
    accuracy: float
    ece: float
    ece_calibrated: float | None
    covered: float | None
    set_size: float | None
    empty_sets: float | None


@dataclass(frozen=True)
class Diagram:
    """A reliability diagram over all pictures: of each bin how many, how sure, and how often right.

    Attributes:
        calibrated: whether with the temperature.
        counts, confidence, accuracy: see :class:`lamp_fast.answers.calibration.Bins`.
    """

    calibrated: bool
    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """Risk by coverage, where answers of low score are not given.

    Attributes:
        by: the score.
        aurc: the mean risk over every coverage.
        coverage, risk: some points of the curve, coverage ascending to 1.
    """

    by: str
    aurc: float
    coverage: tuple[float, ...]
    risk: tuple[float, ...]


@dataclass(frozen=True)
class Reliability:
    """What test pictures say of the answers of a run.

    Attributes:
        about: what was fitted, for people.
        coverage: that the sets were asked for.
        why_no_sets: why there are none; None where there are.
        class_gap: mean over classes of |covered - coverage|; None without sets.
        groups: all pictures, and those of the head and the tail, if any.
        diagrams: as the scores are, and calibrated, if they are.
        curves: one a score.
    """

    about: str
    coverage: float
    why_no_sets: str | None
    class_gap: float | None
    groups: tuple[Group, ...]
    diagrams: tuple[Diagram, ...]
    curves: tuple[Curve, ...]

    def lines(self) -> list[str]:
        """For people, a table with what was fitted above and the curves' areas below it."""
        sets = self.class_gap is not None
        header = ["answers", "pictures", "accuracy", "ECE", "calibrated"]
        header += [f"in sets of {100 * self.coverage:g}%", "names a set", "empty"] if sets else []
        body = []
        for each in self.groups:
            shares = [each.accuracy, each.ece, each.ece_calibrated]
            row = [each.name, f"{each.pictures:,}", *map(percent, shares)]
            if sets:
                row += [percent(each.covered), f"{each.set_size:.2f}", percent(each.empty_sets)]
            body.append(row)
        align = ["left"] + ["right"] * (len(header) - 1)
        table = tabulate(
            body, header, tablefmt="github", colalign=align, disable_numparse=True
        ).splitlines()
        areas = ", ".join(f"{each.by} {percent(each.aurc)}" for each in self.curves)
        after = [f"mean risk where the least sure are not answered (AURC): {areas}"]
        if sets:
            after.append(f"mean gap of a class's coverage: {percent(self.class_gap)}")
        else:
            after.append(f"no sets of {100 * self.coverage:g}%: {self.why_no_sets}")
        return [f"answers {self.about}", "", *table, "", *after]


def percent(value: float | None) -> str:
    """A share as tables show it."""
    return "n/a" if value is None else f"{100 * value:.2f}"


class Judge:
    """Looks at test logits a batch at a time and keeps a few numbers a picture.

    Args:
        fitted: on validation pictures, over the classes that are tested.
        cosine_scale: of the method.
        coverage: of the sets.
    """

    COLUMNS = 6

    def __init__(self, fitted: Fitted, cosine_scale: float, coverage: float) -> None:
        self.fitted, self.cosine_scale, self.coverage = fitted, cosine_scale, coverage
        self.limit = self.why_no_sets = None
        try:
            self.limit = quantile(fitted.scores("nonconformity"), coverage)
        except CannotFit as error:
            self.why_no_sets = str(error)

    def look(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of each picture the raw confidence, the scores of :data:`SCORES`, whether its set holds
        its class and the size of that, float64 [B, 6] on the CPU.

        Args:
            logits: [B, C].
            labels: int64 [B].
        """
        logits = logits.cpu()
        scale = self.fitted.scale
        likely = probabilities(logits, 1.0 if scale is None else scale)
        confidence = likely.amax(1)
        sets = prediction_sets(likely, -1.0 if self.limit is None else self.limit)
        columns = [
            probabilities(logits).amax(1),
            *(answer_scores(by, logits, confidence, self.cosine_scale) for by in SCORES),
            sets.gather(1, labels[:, None]).squeeze(1).double(),
            sets.sum(1).double(),
        ]
        return torch.stack(columns, dim=1)

    def conclude(self, looks: Tensor, right: Tensor, labels: Tensor) -> Reliability:
        """Put together what was seen of N pictures.

        Args:
            looks: [N, 6] of :meth:`look`.
            right: bool [N], whether the answer was the right class.
            labels: int64 [N].
        """
        raw, confidence, *others, held, size = looks.unbind(1)
        held, fitted, sets = held.bool(), self.fitted, self.limit is not None
        known = fitted.temperature is not None

        def error(sure: Tensor, some: Tensor) -> float:
            return bin_confidences(sure[some], right[some]).error

        groups = [
            Group(
                name=name,
                pictures=int(some.sum()),
                accuracy=float(right[some].double().mean()),
                ece=error(raw, some),
                ece_calibrated=error(confidence, some) if known else None,
                covered=float(held[some].double().mean()) if sets else None,
                set_size=float(size[some].mean()) if sets else None,
                empty_sets=float((size[some] == 0).double().mean()) if sets else None,
            )
            for name, some in fitted.groups(labels).items()
            if bool(some.any())
        ]
        return Reliability(
            about=fitted.describe(),
            coverage=self.coverage,
            why_no_sets=self.why_no_sets,
            class_gap=class_gap(held, labels, self.coverage) if sets else None,
            groups=tuple(groups),
            diagrams=tuple(
                _diagram(each, right, calibrated)
                for each, calibrated in ((raw, False), (confidence, True))[: 1 + known]
            ),
            curves=tuple(
                _curve(by, each, right)
                for by, each in zip(SCORES, (confidence, *others), strict=True)
            ),
        )


def judge_of(experiment: Experiment, method: Method) -> Judge | None:
    """Of how far the answers of the run's method can be trusted, where that can be said."""
    other = type(method) is not type(experiment.method)
    if other or experiment.fitted is None or why_not_judged(experiment) is not None:
        return None
    return Judge(experiment.fitted, method.cosine_scale, experiment.coverage)


def why_not_judged(experiment: Experiment) -> str | None:
    """Why what the run has fitted says nothing of these scores; None where it does, or there is
    nothing."""
    if experiment.fitted is None:
        return None
    prior = experiment.prior is not None
    return experiment.fitted.why_other(experiment.config.views.tte, prior=prior)


def _diagram(confidence: Tensor, right: Tensor, calibrated: bool) -> Diagram:
    bins = bin_confidences(confidence, right)
    parts = (bins.counts, bins.confidence, bins.accuracy)
    return Diagram(calibrated, *(tuple(each.tolist()) for each in parts))


def _curve(by: str, scores: Tensor, right: Tensor) -> Curve:
    coverage, risk = risk_coverage(scores, right)
    shown = torch.linspace(0, len(risk) - 1, min(len(risk), MAX_POINTS)).round().long()
    return Curve(by, area_under(risk), tuple(coverage[shown].tolist()), tuple(risk[shown].tolist()))


def write_reliability(file: Path, found: Reliability | None) -> None:
    """Write it, or remove what an earlier run has left where there is none."""
    if found is None:
        file.unlink(missing_ok=True)
    else:
        write_json(file, asdict(found))


def read_reliability(file: Path) -> Reliability:
    """Read what :func:`write_reliability` wrote.

    Raises:
        InputError: missing or damaged.
    """
    found = read_as(Reliability, read_json(file), str(file))
    if reason := _objection(found):
        raise InputError(f"{file}: damaged ({reason})")
    return found


def _objection(found: Reliability) -> str | None:
    lists: list[Sequence[Sequence[float]]] = [
        *((each.counts, each.confidence, each.accuracy) for each in found.diagrams),
        *((each.coverage, each.risk) for each in found.curves),
    ]
    if any(len({len(each) for each in some} - {0}) != 1 for some in lists):
        return "curves of unequal length"
    if not found.groups or not found.diagrams or min(each.pictures for each in found.groups) < 1:
        return "expected pictures"
    if any(count < 0 for each in found.diagrams for count in each.counts):
        return "a count below 0"
    shares = [
        *(value for some in lists for each in some for value in each if isinstance(value, float)),
        *(each.aurc for each in found.curves),
        *(
            getattr(each, name)
            for each in found.groups
            for name in ("accuracy", "ece", "ece_calibrated", "covered", "empty_sets")
        ),
        *(found.coverage, found.class_gap),
    ]
    if not all(value is None or 0 <= value <= 1 for value in shares):
        return "a figure that is not in 0..1"
    sizes = [each.set_size for each in found.groups if each.set_size is not None]
    if (found.class_gap is None) == bool(sizes) or any(size < 0 for size in sizes):
        return "sets of some groups alone"
    return None
