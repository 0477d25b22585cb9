"""Features and labels of a data set's parts become findings, most suspect first in each kind."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lamp_fast.audit.findings import (
    class_thresholds,
    nearest_twins,
    neighbour_distances,
    neighbour_ranks,
    probe,
    robust_scores,
    suspected_labels,
)
from lamp_fast.audit.settings import AuditConfig
from lamp_fast.data.entries import SPLIT_PARTS

# Kinds of findings, in the order of the page and the table.
LABEL, LEAK, CONFLICT, OUTLIER = "label", "leak", "conflict", "outlier"
KINDS = (LABEL, LEAK, CONFLICT, OUTLIER)
# What pictures are judged by. Test pictures are judged and judge nothing, so that what is left of
# training does not depend on them, but for those that are in both.
LEARNING = ("train", "val")


@dataclass(frozen=True)
class Place:
    """A picture by its part and its row there."""

    part: str
    row: int


@dataclass(frozen=True)
class Finding:
    """What looks wrong with a picture.

    Attributes:
        kind: label; leak, a copy in a part that is tested on; conflict, a copy of another class
            among what is learned from; or outlier.
        place: of the picture; of a leak the one to leave out.
        score: the larger, the surer: a difference of probabilities, a cosine, or robust standard
            deviations.
        suggested: a class's number, for a label.
        twin: the other picture, for a leak or a conflict.
    """

    kind: str
    place: Place
    score: float
    suggested: int | None = None
    twin: Place | None = None


@dataclass(frozen=True, eq=False)
class Judged:
    """What an audit has found.

    Attributes:
        findings: by kind, then by falling score.
        unjudged: numbers of the classes whose labels were not judged, too small for the folds.
        strength: C of the probe; None where no label was judged.
    """

    findings: tuple[Finding, ...]
    unjudged: tuple[int, ...]
    strength: float | None


@dataclass(frozen=True, eq=False)
class _Side:
    """Pictures of some parts, one after the other: features [N, D] of length 1, int64 [N]."""

    features: Tensor
    labels: NDArray
    places: list[Place]


def judge(
    features: Mapping[str, Tensor],
    labels: Mapping[str, NDArray],
    classes: int,
    settings: AuditConfig,
    seed: int,
) -> Judged:
    """Judge every picture of a data set.

    Args:
        features: of each part, [N, D].
        labels: of each part, int64 [N].
        classes: how many there are.
        settings: what to look for.
        seed: of the folds.
    """
    sides = {part: _side(features, labels, (part,)) for part in SPLIT_PARTS}
    learning, test = _side(features, labels, LEARNING), sides["test"]
    counts = np.bincount(learning.labels, minlength=classes)
    found, strength = _labels(learning, test, counts, settings.folds, seed)
    found += _leaks(sides, settings.twin_cosine)
    found += _conflicts(learning, settings.twin_cosine)
    found += _outliers(learning, test, counts, settings)
    found.sort(key=lambda each: (KINDS.index(each.kind), -each.score))
    unjudged = tuple(np.flatnonzero(counts < settings.folds).tolist())
    if strength is None:
        unjudged = tuple(range(classes))
    return Judged(tuple(found), unjudged, strength)


def _side(
    features: Mapping[str, Tensor], labels: Mapping[str, NDArray], parts: tuple[str, ...]
) -> _Side:
    return _Side(
        F.normalize(torch.cat([features[part] for part in parts]), dim=1),
        np.concatenate([labels[part] for part in parts]),
        [Place(part, row) for part in parts for row in range(len(labels[part]))],
    )


def _labels(
    learning: _Side, test: _Side, counts: NDArray, folds: int, seed: int
) -> tuple[list[Finding], float | None]:
    classes = np.flatnonzero(counts >= folds)
    if len(classes) < 2:
        return [], None
    number = np.full(len(counts), -1)
    number[classes] = np.arange(len(classes))
    rows = [np.flatnonzero(number[side.labels] >= 0) for side in (learning, test)]
    shown = [
        side.features[torch.from_numpy(some).to(side.features.device)].cpu().numpy()
        for side, some in zip((learning, test), rows, strict=True)
    ]
    own, theirs = (
        number[side.labels[some]] for side, some in zip((learning, test), rows, strict=True)
    )
    probed = probe(shown[0], own, shown[1], folds, seed)
    thresholds = class_thresholds(probed.own, own)
    found = []
    for side, some, given, probabilities in (
        (learning, rows[0], own, probed.own),
        (test, rows[1], theirs, probed.others),
    ):
        suspects = suspected_labels(probabilities, given, thresholds)
        for row, label, margin in zip(
            suspects.rows, suspects.suggested, suspects.margins, strict=True
        ):
            place = side.places[some[row]]
            found.append(Finding(LABEL, place, float(margin), suggested=int(classes[label])))
    return found, probed.strength


def _leaks(sides: Mapping[str, _Side], threshold: float) -> list[Finding]:
    """Of the pictures of each part that have a twin in a later one."""
    found = []
    for at, part in enumerate(SPLIT_PARTS[:-1]):
        later = SPLIT_PARTS[at + 1 :]
        columns = torch.cat([sides[each].features for each in later])
        places = [place for each in later for place in sides[each].places]
        found += _twins(LEAK, sides[part], columns, places, threshold)
    return found


def _conflicts(learning: _Side, threshold: float) -> list[Finding]:
    labels = torch.from_numpy(learning.labels).to(learning.features.device)
    both = (labels, labels)
    return list(_twins(CONFLICT, learning, learning.features, learning.places, threshold, both))


def _twins(
    kind: str,
    side: _Side,
    columns: Tensor,
    places: list[Place],
    threshold: float,
    labels: tuple[Tensor, Tensor] | None = None,
) -> Iterator[Finding]:
    twins, cosines = nearest_twins(side.features, columns, threshold, labels)
    for row in np.flatnonzero(twins >= 0):
        yield Finding(kind, side.places[row], float(cosines[row]), twin=places[twins[row]])


def _outliers(
    learning: _Side, test: _Side, counts: NDArray, settings: AuditConfig
) -> list[Finding]:
    if len(learning.labels) < 2:
        return []
    distances = []
    for side in (learning, test):
        ranks = torch.from_numpy(neighbour_ranks(side.labels, counts, settings.neighbours))
        ranks = ranks.to(side.features.device)
        same = side is learning
        distances.append(neighbour_distances(side.features, learning.features, ranks, same=same))
    found = []
    for side, far in zip((learning, test), distances, strict=True):
        scores = robust_scores(far, distances[0])
        for row in np.flatnonzero(scores >= settings.outlier_score):
            found.append(Finding(OUTLIER, side.places[row], float(scores[row])))
    return found
