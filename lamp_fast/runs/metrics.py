"""Accuracy, macro-F1 and what is derived from them; every figure is in 0..1."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

# The accuracy that a class has at least in the means below, LIFT's 0.001 %: otherwise one class
# without a hit would make them 0, and methods that differ could not be told apart.
LEAST_ACCURACY = 1e-5


@dataclass(frozen=True, eq=False)
class Scores:
    """How well the test pictures of one half of the classes were predicted.

    Attributes:
        accuracy: of all pictures.
        macro_f1: mean F1 over all classes of the half; 0 for a class that is neither shown nor
            predicted (zero_division=0).
        per_class: float64 [C], accuracy on the pictures of each class; NaN for one without any.
        confusion: int64 [C, C], pictures by true class (row) and predicted class (column).
        predicted: integers [N], the predicted class of each picture.
        levels: accuracy at each level above the classes, where there are some.
    """

    accuracy: float
    macro_f1: float
    per_class: np.ndarray
    confusion: np.ndarray
    predicted: np.ndarray
    levels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class UnionAnswers:
    """What became of the test pictures of one half when the names of both were asked for at once.

    Attributes:
        own: bool [N], right among the names of their own half.
        union: bool [N], right among all names.
        belief: float64 [N], how much they look like a picture of a base class: larger is more.
    """

    own: np.ndarray
    union: np.ndarray
    belief: np.ndarray


@dataclass(frozen=True)
class UnionScores:
    """Figures of base and new names at once.

    Attributes:
        accuracy: of all pictures, among all names.
        base, new: the same of the pictures of each half.
        harmonic_mean: of those two.
        openworld_auc: see :func:`openworld_auc`.
    """

    accuracy: float
    base: float
    new: float
    harmonic_mean: float
    openworld_auc: float


def union_scores(base: UnionAnswers, new: UnionAnswers) -> UnionScores:
    """The figures of pictures of both halves, at least one of each."""
    halves = float(base.union.mean()), float(new.union.mean())
    return UnionScores(
        float(np.concatenate([base.union, new.union]).mean()),
        *halves,
        harmonic_mean(*halves),
        openworld_auc(base, new),
    )


def openworld_auc(base: UnionAnswers, new: UnionAnswers) -> float:
    """OpenworldAUC (Hua et al., ICML 2025): the share of pairs of a base and a new picture that are
    both right among their own half's names, and of which the base one looks more like base; half a
    pair where both look alike.

    The area under the ROC curve of base against new in which a wrong base picture looks less like
    base than every new one, and a wrong new one more than every base one. How many pictures the
    halves have does not matter.
    """
    right, others = np.sort(base.belief[base.own]), np.sort(new.belief[new.own])
    below = np.searchsorted(others, right, side="left")
    alike = np.searchsorted(others, right, side="right") - below
    return float((below + alike / 2).sum() / (len(base.own) * len(new.own)))


def scores(labels: np.ndarray, predictions: np.ndarray, classes: int) -> Scores:
    """Compare predicted with true classes.

    Args:
        labels, predictions: integers [N] in 0..classes-1, N at least 1.
        classes: C, also counting classes that do not occur.
    """
    # Here, because it takes seconds, and most commands score nothing.
    from sklearn.metrics import f1_score

    every = np.arange(classes)
    confusion = confusion_matrix(labels, predictions, classes)
    shown = confusion.sum(axis=1)
    per_class = np.full(classes, np.nan)
    np.divide(confusion.diagonal(), shown, out=per_class, where=shown > 0)
    macro_f1 = f1_score(labels, predictions, labels=every, average="macro", zero_division=0)
    accuracy = float(confusion.trace() / len(labels))
    return Scores(accuracy, float(macro_f1), per_class, confusion, predictions)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Pictures by true class (row) and predicted class (column), int64 [C, C]; of what
    :func:`scores` takes."""
    cells = np.bincount(labels * classes + predictions, minlength=classes * classes)
    return cells.reshape(classes, classes)


def shown_macro_f1(confusion: np.ndarray) -> float:
    """Mean F1 of the classes that have a picture, at least one; see :class:`Scores`.

    A class without one could only have 0, which says nothing of the scores.

    Args:
        confusion: int64 [C, C], see :func:`confusion_matrix`.
    """
    truly, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    shown = truly > 0
    return float((2 * confusion.diagonal() / np.maximum(truly + predicted, 1))[shown].mean())


def group_accuracy(confusion: np.ndarray, group: np.ndarray) -> float | None:
    """Accuracy over all test pictures of a group of classes, such as the head or the tail.

    Every picture counts the same, whatever its class; predictions may be any class.

    Args:
        confusion: integers [C, C], see :class:`Scores`.
        group: bool [C], the classes of the group.

    Returns:
        The accuracy, or None where the group has no test picture.
    """
    shown = confusion[group].sum()
    return float(confusion.diagonal()[group].sum() / shown) if shown else None


def balanced_accuracy(per_class: np.ndarray, group: np.ndarray | None = None) -> float | None:
    """Mean of the accuracies of classes: every class counts the same, whatever its pictures.

    Args:
        per_class: float64 [C], see :class:`Scores`; classes without test pictures do not count.
        group: bool [C], the classes to take the mean of, such as those of few training pictures;
            by default every one.

    Returns:
        The mean, or None where no class has a test picture.
    """
    shown = _shown(per_class if group is None else per_class[group])
    return float(shown.mean()) if len(shown) else None


def geometric_mean(per_class: np.ndarray) -> float | None:
    """Geometric mean of the accuracies of classes, each at least :data:`LEAST_ACCURACY`.

    Args and return value are those of :func:`balanced_accuracy` over every class.
    """
    shown = _shown(per_class)
    return float(np.exp(np.log(shown.clip(LEAST_ACCURACY)).mean())) if len(shown) else None


def class_harmonic_mean(per_class: np.ndarray) -> float | None:
    """Harmonic mean of the accuracies of classes, each at least :data:`LEAST_ACCURACY`.

    Args and return value are those of :func:`balanced_accuracy` over every class.
    """
    shown = _shown(per_class)
    return float(1 / (1 / shown.clip(LEAST_ACCURACY)).mean()) if len(shown) else None


def worst_class(per_class: np.ndarray) -> int | None:
    """The class of lowest accuracy, the first of equal ones; None where none has a test picture."""
    return None if np.isnan(per_class).all() else int(np.nanargmin(per_class))


def _shown(per_class: np.ndarray) -> np.ndarray:
    return per_class[~np.isnan(per_class)]


def harmonic_mean(base: float, new: float) -> float:
    """2 base new / (base + new), 0 where both are 0: HM-A of accuracies, HM-M of macro-F1."""
    return 2 * base * new / (base + new) if base + new > 0 else 0.0
