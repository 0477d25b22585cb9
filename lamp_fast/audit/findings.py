"""What looks wrong in features and labels: mathematics over arrays, no picture is read.

Labels by confident learning (Northcutt, Jiang and Chuang 2021), copies by cosine, outliers by the
distance to the k-th neighbour.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

# Of the probe: 1 / C is the weight of |W|^2 / 2, over features of unit variance on average. The
# one is taken whose probabilities for the first fold have the least log loss.
STRENGTHS = (0.001, 0.01, 0.1, 1.0)
MAX_ITERATIONS = 1000
# Cosines that are in memory at once: 256 MiB in float32.
BLOCK = 2**26
# Makes the median absolute deviation the standard deviation of a normal distribution.
ROBUST = 1.4826


@dataclass(frozen=True, eq=False)
class Probed:
    """How probable a probe that never saw a picture finds each class of it.

    Attributes:
        own: float64 [N, C], of the pictures that it learns from, fold by fold.
        others: float64 [M, C], of pictures that it does not learn from at all.
        strength: the C that was used.
    """

    own: NDArray
    others: NDArray
    strength: float


def probe(features: NDArray, labels: NDArray, others: NDArray, folds: int, seed: int) -> Probed:
    """Logistic regression, out of sample, over features centred and scaled to unit variance.

    Classes are not weighed: what the tail's probabilities lack is in its thresholds, and a weight
    of n_max / n_c would let a single wrong label there outweigh many right ones (docs/audit.md).

    Args:
        features: [N, D].
        labels: int64 [N] of 0..C-1, C >= 2; each class has at least ``folds`` pictures.
        others: [M, D].
        folds: stratified parts of N; each part's probabilities are by a fit to the other parts.
        seed: of the parts.
    """
    # A second, which most commands do not need.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold

    features, others = (np.asarray(each, dtype=np.float64) for each in (features, others))
    centre = features.mean(0)
    features, others = features - centre, others - centre
    scale = np.sqrt(np.square(features).mean()) or 1.0
    features, others = features / scale, others / scale
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(features, labels))
    classes = np.arange(labels.max() + 1)
    bar = tqdm(desc="fitting probes", total=len(STRENGTHS) + folds, leave=False, disable=None)

    def probabilities(strength: float, rows: NDArray, shown: NDArray) -> NDArray:
        model = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS)
        model.fit(features[rows], labels[rows])
        bar.update()
        return model.predict_proba(shown)

    with warnings.catch_warnings(), threadpool_limits(torch.get_num_threads(), "blas"):
        # One that has not converged is a probe, too, and as much out of sample.
        warnings.simplefilter("ignore", ConvergenceWarning)
        learned, held = splits[0]
        first = {each: probabilities(each, learned, features[held]) for each in STRENGTHS}
        strength = min(first, key=lambda each: log_loss(labels[held], first[each], labels=classes))
        own = np.empty((len(features), len(classes)))
        own[held] = first[strength]
        for learned, held in splits[1:]:
            own[held] = probabilities(strength, learned, features[held])
        theirs = np.empty((0, len(classes)))
        if len(others):
            theirs = probabilities(strength, np.arange(len(features)), others)
    bar.close()
    return Probed(own, theirs, strength)


def class_thresholds(probabilities: NDArray, labels: NDArray) -> NDArray:
    """t_c, the mean probability of class c over the pictures labelled c: [C].

    Args:
        probabilities: out of sample, [N, C].
        labels: int64 [N], every class at least once.
    """
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    return np.bincount(labels, own, minlength=len(counts)) / counts


@dataclass(frozen=True, eq=False)
class Suspects:
    """Pictures whose labels another class is more likely than, most suspect first.

    Attributes:
        rows: int64 [S].
        suggested: int64 [S], the other class.
        margins: float64 [S], its probability less that of the label, above 0.
    """

    rows: NDArray
    suggested: NDArray
    margins: NDArray


def suspected_labels(probabilities: NDArray, labels: NDArray, thresholds: NDArray) -> Suspects:
    """Confident learning's off-diagonal counts, as far as the probe itself prefers the other class.

    Of the classes c with p_c >= t_c the most probable one, j, is what the picture counts as. It is
    suspect where j is not its label i and p_j > p_i. Margins p_j - p_i rank, as in pruning by
    noise rate.

    Args:
        probabilities: out of sample, [N, C].
        labels: int64 [N].
        thresholds: see :func:`class_thresholds`, [C].
    """
    reached = np.where(probabilities >= thresholds, probabilities, -1.0)
    rows = np.arange(len(labels))
    best = reached.argmax(1)
    margins = reached[rows, best] - probabilities[rows, labels]
    found = np.flatnonzero((best != labels) & (margins > 0))
    found = found[np.argsort(-margins[found], kind="stable")]
    return Suspects(found, best[found], margins[found])


def nearest_twins(
    rows: Tensor,
    columns: Tensor,
    threshold: float,
    labels: tuple[Tensor, Tensor] | None = None,
    block: int = BLOCK,
) -> tuple[NDArray, NDArray]:
    """Of each row the column of the largest cosine, where that reaches a threshold.

    Args:
        rows: [N, D] of length 1.
        columns: [M, D] of length 1.
        threshold: the least cosine of a twin.
        labels: of both, int64 [N] and [M]; a twin then has another one.
        block: cosines in memory at once.

    Returns:
        The twins, int64 [N], -1 where there is none, and their cosines, float32 [N].
    """
    twins, cosines = np.full(len(rows), -1), np.zeros(len(rows), np.float32)
    if not len(columns):
        return twins, cosines
    for places in _blocks(len(rows), len(columns), block, "comparing pictures"):
        similar = rows[places] @ columns.T
        if labels is not None:
            similar.masked_fill_(labels[0][places, None] == labels[1][None], -2.0)
        best, at = (each.cpu().numpy() for each in similar.max(1))
        close = best >= threshold
        twins[places] = np.where(close, at, -1)
        cosines[places] = np.where(close, best, 0)
    return twins, cosines


def neighbour_distances(
    rows: Tensor, columns: Tensor, ranks: Tensor, *, same: bool, block: int = BLOCK
) -> NDArray:
    """1 - cosine to the k-th nearest column, float32 [N].

    Args:
        rows: [N, D] of length 1.
        columns: [M, D] of length 1.
        ranks: k of each row, int64 [N], from 1; where there are fewer columns, the last one.
        same: columns are the rows, and no row is its own neighbour.
        block: cosines in memory at once.
    """
    distances = np.empty(len(rows), np.float32)
    ranks = ranks.clamp(max=len(columns) - same)
    for places in _blocks(len(rows), len(columns), block, "finding neighbours"):
        similar = rows[places] @ columns.T
        if same:
            here = torch.arange(places.start, places.stop, device=rows.device)
            similar[here - places.start, here] = -2.0
        k = ranks[places]
        nearest = similar.topk(int(k.max()), dim=1).values.gather(1, k[:, None] - 1)
        distances[places] = 1 - nearest[:, 0].cpu().numpy()
    return distances


def neighbour_ranks(labels: NDArray, counts: NDArray, most: int) -> NDArray:
    """Which neighbour tells how far a picture is from all others: int64 [N].

    The ``most``-th, but in a class with fewer others the last of these, so that a small class is
    not far from everything by its size alone; at least the first.

    Args:
        labels: int64 [N].
        counts: pictures that neighbours are looked for among, of each class.
        most: at least 1.
    """
    return np.clip(counts[labels] - 1, 1, most)


def robust_scores(distances: NDArray, reference: NDArray) -> NDArray:
    """(d - median) / (1.4826 MAD), median and MAD of the reference; 0 where that has no spread."""
    median = np.median(reference)
    spread = ROBUST * np.median(np.abs(reference - median))
    if spread == 0:
        return np.zeros(len(distances))
    return (distances - median) / spread


def _blocks(rows: int, columns: int, block: int, title: str) -> "list[slice] | tqdm":
    size = max(1, block // columns)
    places = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return tqdm(places, desc=title, leave=False, disable=None)
