"""Which classes are base and new, and which training pictures each class keeps.

Pure functions on labels and counts; nothing is read. Every draw is a function of the run's seed and
the class's own label, so pictures added to one class change the draw of no other class; but for
:func:`label_order_tail`, which is somebody else's.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lamp_fast.errors import InputError

# Few-shot, long tail and split draw from one class in turn: each has a random stream of its own.
# The last draws classes.
_FEW_SHOT, _LONG_TAIL, _SPLIT, _HOLD_OUT = range(4)
SIZE_GROUPS = ("many", "medium", "few")
MANY_ABOVE, FEW_BELOW = 100, 20
SIZE_GROUP_TITLES = {
    "many": f"many (> {MANY_ABOVE})",
    "medium": f"medium ({FEW_BELOW}..{MANY_ABOVE})",
    "few": f"few (< {FEW_BELOW})",
}


def base_new(labels: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Halve the classes as CoCoOp does: of the sorted labels the first ceil(C / 2) are base.

    Args:
        labels: integers [N], a label per picture, in any order and as often as they occur.

    Returns:
        Base labels int64 [ceil(C / 2)] and new labels int64 [C // 2], both ascending.
    """
    classes = np.unique(np.asarray(labels, dtype=np.int64))
    middle = (len(classes) + 1) // 2
    return classes[:middle], classes[middle:]


def hold_out(classes: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw classes that are not trained, so that they may stand in for new ones.

    Args:
        classes: how many there are.
        share: of them, in 0..1; rounded, and at least 2, for among one class every answer is right.
        seed: the run's seed.

    Returns:
        Kept and drawn classes, int64, ascending.

    Raises:
        InputError: fewer than 2 would be kept.
    """
    count = max(round(classes * share), 2)
    if classes - count < 2:
        raise InputError(
            f"--holdout-classes {share:g}: of {classes} base classes {count} would be held out,"
            " expected that at least 2 are kept"
        )
    order = _order(classes, seed, 0, _HOLD_OUT)
    return np.sort(order[count:]), np.sort(order[:count])


def bounded_shots(labels: Sequence[int] | np.ndarray, most: int, least: int) -> int | None:
    """How many pictures a class may have, so that all classes together have at most ``most``.

    Args:
        labels: integers [N] >= 0.
        most: of all classes together.
        least: of a class, also where that is more than ``most`` together.

    Returns:
        For :func:`few_shot`; None where all of them are few enough.
    """
    counts = np.array([len(indices) for _, indices in _by_class(labels)])
    if counts.sum() <= most or counts.max() <= least:
        return None
    shots = np.arange(least, counts.max() + 1)
    totals = np.minimum(counts, shots[:, None]).sum(axis=1)
    return int(shots[max(np.searchsorted(totals, most, side="right") - 1, 0)])


def long_tail_targets(
    counts: Sequence[int] | np.ndarray, imb: float, n_max: int | None = None
) -> np.ndarray:
    """How many pictures each class keeps under the imbalance ratio ``imb``.

    Classes are ranked by count, descending, ties in label order; rank k of C keeps
    min(available, int(max(n_max * (1 / imb)^(k / (C - 1)), 1))). A single class is kept whole.

    Args:
        counts: integers [C], pictures of each class.
        imb: imbalance ratio, at least 1: the first target over the last.
        n_max: the first target; by default the largest count.

    Returns:
        int64 [C], in the order of ``counts``.

    Raises:
        InputError: ``imb`` below 1 or not finite.
    """
    if not 1 <= imb < float("inf"):
        raise InputError(f"--imb {imb}: expected at least 1")
    counts = np.asarray(counts, dtype=np.int64)
    classes = len(counts)
    if classes < 2:
        return counts.copy()
    n_max = int(counts.max()) if n_max is None else n_max
    targets = np.empty_like(counts)
    for rank, index in enumerate(np.argsort(-counts, kind="stable")):
        targets[index] = int(max(n_max * (1 / imb) ** (rank / (classes - 1)), 1))
    return np.minimum(counts, targets)


def long_tail(
    labels: Sequence[int] | np.ndarray, imb: float, seed: int, n_max: int | None = None
) -> np.ndarray:
    """Draw a long-tailed training set, without replacement.

    Args:
        labels: integers [N] >= 0.
        imb, n_max: see :func:`long_tail_targets`.
        seed: the run's seed.

    Returns:
        Kept indices into ``labels``, int64, ascending.

    Raises:
        InputError: ``imb`` below 1 or not finite.
    """
    counts = [len(indices) for _, indices in _by_class(labels)]
    return _draw(labels, long_tail_targets(counts, imb, n_max), seed, _LONG_TAIL)


def label_order_tail(labels: Sequence[int] | np.ndarray, imb: float) -> np.ndarray:
    """Draw CIFAR-100-LT's training set as the long-tail field does (shijxcs/LIFT), in label order.

    Class k of C keeps max(int(N / C * (1 / imb)^(k / (C - 1))), 1) of its pictures, all where it
    has fewer: the first ones once NumPy's old generator, seeded with 0, has shuffled each class in
    turn. The draw is one for all seeds.

    Args:
        labels: integers [N] of C values; which pictures are drawn depends on their order.
        imb: imbalance ratio, at least 1; 1 keeps N / C pictures of every class.

    Returns:
        Kept indices into ``labels``, int64, ascending.

    Raises:
        InputError: ``imb`` below 1 or not finite.
    """
    if not 1 <= imb < float("inf"):
        raise InputError(f"--imb {imb}: expected at least 1")
    by_class = list(_by_class(labels))
    # NumPy has frozen this generator, shuffles included (NEP 19).
    generator = np.random.RandomState(0)
    kept = [np.empty(0, np.int64)]
    for rank, (_, indices) in enumerate(by_class):
        share = (1 / imb) ** (rank / max(len(by_class) - 1, 1))
        shuffled = indices.copy()
        generator.shuffle(shuffled)
        kept.append(shuffled[: max(int(len(labels) / len(by_class) * share), 1)])
    return np.sort(np.concatenate(kept))


def few_shot(labels: Sequence[int] | np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Draw ``shots`` pictures of every class without replacement, all of a smaller class.

    The draws of one seed are nested: 4 shots contain the 2 shots.

    Args:
        labels: integers [N] >= 0.
        shots: pictures a class, at least 1.
        seed: the run's seed.

    Returns:
        Kept indices into ``labels``, int64, ascending.

    Raises:
        InputError: ``shots`` below 1.
    """
    if shots < 1:
        raise InputError(f"--shots {shots}: expected at least 1")
    kept = [min(len(indices), shots) for _, indices in _by_class(labels)]
    return _draw(labels, kept, seed, _FEW_SHOT)


def stratified_split(
    labels: Sequence[int] | np.ndarray, shares: Sequence[float], seed: int
) -> list[np.ndarray]:
    """Split every class into a first part and further parts of the given shares.

    Args:
        labels: integers [N] >= 0.
        shares: of each part after the first, in 0..1 and rounded half to even, as the published
            splits were; the first part gets the rest.
        seed: the split's own seed.

    Returns:
        ``len(shares) + 1`` arrays of indices into ``labels``, int64, ascending, without overlap.
    """
    parts: list[list[np.ndarray]] = [[] for _ in range(len(shares) + 1)]
    for label, indices in _by_class(labels):
        sizes = [round(len(indices) * share) for share in shares]
        cuts = np.cumsum([len(indices) - sum(sizes), *sizes[:-1]])
        pieces = np.split(indices[_order(len(indices), seed, label, _SPLIT)], cuts)
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    return [np.sort(np.concatenate([np.empty(0, np.int64), *part])) for part in parts]


def head_classes(counts: Sequence[int] | np.ndarray) -> np.ndarray | None:
    """Mark the head: the ceil(0.2 C) classes of largest count, ties in label order.

    Args:
        counts: integers [C], kept training pictures of each class.

    Returns:
        bool [C], or None where all counts are equal and no class is head or tail.
    """
    counts = np.asarray(counts)
    if len(counts) == 0 or (counts == counts[0]).all():
        return None
    head = np.zeros(len(counts), dtype=bool)
    head[np.argsort(-counts, kind="stable")[: -(-len(counts) // 5)]] = True
    return head


def size_groups(counts: Sequence[int] | np.ndarray) -> np.ndarray | None:
    """Name the group of each class as long-tailed benchmarks do, by its training pictures.

    More than :data:`MANY_ABOVE` are many, fewer than :data:`FEW_BELOW` are few, the others medium.
    These edges are LIFT's and LPT's; OLTR has 100 with many and 20 with few.

    Args:
        counts: integers [C], training pictures of each class.

    Returns:
        str [C], each one of :data:`SIZE_GROUPS`, or None where all counts are equal.
    """
    counts = np.asarray(counts)
    if len(counts) == 0 or (counts == counts[0]).all():
        return None
    many, medium, few = SIZE_GROUPS
    return np.select([counts > MANY_ABOVE, counts < FEW_BELOW], [many, few], medium)


def realised_imbalance(counts: Sequence[int] | np.ndarray) -> float:
    """The largest class over the smallest, counts [C] >= 1; small classes can raise it over imb."""
    return float(np.max(counts) / np.min(counts))


def _by_class(labels: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each label with the indices that carry it, both ascending."""
    labels = np.asarray(labels, dtype=np.int64)
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    return zip(classes.tolist(), np.split(order, starts[1:]), strict=len(classes) > 0)


def _draw(
    labels: Sequence[int] | np.ndarray, kept: Sequence[int] | np.ndarray, seed: int, purpose: int
) -> np.ndarray:
    drawn = [
        indices[_order(len(indices), seed, label, purpose)[:number]]
        for (label, indices), number in zip(_by_class(labels), kept, strict=True)
    ]
    return np.sort(np.concatenate([np.empty(0, np.int64), *drawn]))


def _order(size: int, seed: int, label: int, purpose: int) -> np.ndarray:
    """A random order of 0..size-1.

    NumPy keeps the raw stream of a bit generator from version to version (NEP 19), which it does
    not promise for the shuffles of a Generator.
    """
    stream = np.random.PCG64(np.random.SeedSequence((seed, label, purpose)))
    return np.argsort(stream.random_raw(size), kind="stable")
