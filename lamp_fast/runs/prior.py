"""Post-hoc logit adjustment: scores for test classes of other shares than training's.

With p the shares that are wanted and q those that the logits imply, both over the names asked for,

    logits + log p - log q

are the logits of a classifier for p (Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR
2021; Hong et al., "Disentangling Label Distribution for Long-Tailed Visual Recognition", CVPR 2021,
with a p of one's own).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamp_fast.data.loading import class_shares
from lamp_fast.errors import InputError
from lamp_fast.methods.base import Method
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs.class_numbers import check_numbers, read_numbers
from lamp_fast.runs.optimisation import row_weights
from lamp_fast.runs.settings import OptimConfig

# "uniform", "train", or a share of each class that is asked for, in any unit.
Wanted = str | Mapping[str, float]

# What is left of equal shares after their logarithms are computed.
_EQUAL = 1e-9


def log_implied_prior(
    optim: OptimConfig, counts: Sequence[int], names: Sequence[str] = ()
) -> np.ndarray:
    """log q: the shares of classes that the logits of a trained criterion imply.

    A criterion's minimiser has softmax(z)_c proportional to q_c p(x | c) with

        q_c = a_c w_c / n_c^t

    a_c the share of class c among the pictures drawn (:func:`class_shares`), w_c the weight of its
    rows (:func:`row_weights`), t tau for "la", 1 for "balanced" and "lade", else 0: the loss has
    taken tau log n_c from what z must learn. "ldam" and "focal" count as "ce"; their minimisers
    are no posteriors, and what they imply is not known in closed form.

    Args:
        optim: of the run.
        counts: training pictures of each class, at least 1.
        names: of the classes; for weights that were given by name.

    Returns:
        float64 [C], the exponentials of which add up to 1.
    """
    sizes = np.asarray(counts, dtype=np.int64)
    taken = {"la": optim.tau, "balanced": 1.0, "lade": 1.0}.get(optim.criterion, 0.0)
    logs = np.log(class_shares(sizes, optim.sampler)) - taken * np.log(sizes)
    weights = row_weights(optim, counts, names)
    if weights is not None:
        logs = logs + weights.log().numpy()
    return _normalised(logs)


@dataclass(frozen=True)
class Prior:
    """What to assume of the shares of classes, and what a run says of its own.

    Attributes:
        wanted: "uniform", "train" or shares by name.
        optim: of the run.
        trained: its classes in label order.
        counts: training pictures of each.

    Raises:
        InputError: neither a word that is known nor shares, or a class without a training picture.
    """

    wanted: Wanted
    optim: OptimConfig
    trained: tuple[str, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.wanted, str) and self.wanted not in ("uniform", "train"):
            raise InputError(
                f"prior {self.wanted!r}: expected uniform, train or a share of each class"
            )
        if min(self.counts) < 1:
            name = self.trained[int(np.argmin(self.counts))]
            raise InputError(f"prior: the run has no training picture of {name!r}")

    @property
    def word(self) -> str:
        """What it is called in tables and folders."""
        return self.wanted if isinstance(self.wanted, str) else "given"

    def check(self, names: Sequence[str]) -> None:
        """Refuse, before any work, what could not be served for all the names of a question.

        Raises:
            InputError: "train" with a name that was not trained, or as :func:`check_numbers`.
        """
        if not isinstance(self.wanted, str):
            check_numbers("prior", self.wanted, names)
            return
        columns = self._columns(names)
        if self.wanted == "train" and None in columns:
            raise InputError(
                f"prior train: {_first_new(names, columns)!r} was not trained and has no count,"
                " expected uniform or a share of each class"
            )

    def shift(self, method: Method, names: Sequence[str]) -> Tensor:
        """log p - log q, float64 [C], to be added to the logits of some names.

        Args:
            method: that the logits are of.
            names: some of those that :meth:`check` has seen.

        Raises:
            InputError: trained and other names together where training made the trained ones'
                shares unequal, since it says nothing of the others'.
        """
        columns = self._columns(names)
        known = [column for column in columns if column is not None]
        implied = np.zeros(len(names))
        if known:
            of_trained = self._log_implied(method)
            if len(known) == len(names):
                implied = of_trained[known]
            elif np.ptp(of_trained) > _EQUAL:
                raise InputError(
                    f"prior {self.word}: {_first_new(names, columns)!r} was not trained, and"
                    " training made the shares of the other classes unequal; expected trained"
                    " classes alone, or none of them"
                )
        return torch.from_numpy(self._log_wanted(names, columns) - _normalised(implied))

    def _log_implied(self, method: Method) -> np.ndarray:
        """log q of all trained classes, float64."""
        own = method.implied_prior(np.array(self.counts, dtype=np.int64))
        if own is None:
            return log_implied_prior(self.optim, self.counts, self.trained)
        return _normalised(np.log(np.asarray(own, dtype=np.float64)))

    def _log_wanted(self, names: Sequence[str], columns: Sequence[int | None]) -> np.ndarray:
        if self.wanted == "uniform":
            return _normalised(np.zeros(len(names)))
        if self.wanted == "train":
            return _normalised(np.log([self.counts[column] for column in columns]))
        return _normalised(np.log([self.wanted[name] for name in names]))

    def _columns(self, names: Sequence[str]) -> list[int | None]:
        """Where each name stands among the trained ones."""
        return RunClasses(self.trained).columns(names)


def read_prior(given: str | None) -> Wanted | None:
    """What ``--prior`` means: a word, or the JSON file that it names; None for none.

    Raises:
        InputError: see :func:`read_numbers`.
    """
    if given is None or given in ("uniform", "train"):
        return given
    return read_numbers("--prior", given)


def _first_new(names: Sequence[str], columns: Sequence[Any]) -> str:
    return next(name for name, column in zip(names, columns, strict=True) if column is None)


def _normalised(logs: np.ndarray) -> np.ndarray:
    """Logarithms of shares that add up to 1."""
    return logs - np.logaddexp.reduce(logs)
