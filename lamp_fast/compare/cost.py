"""How long a method will take, from a few timed steps of it, and what fits into a time."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The share of a budget that timing may take; what was not timed by then is named and not tried.
PROBE_SHARE = 0.25


@dataclass(frozen=True)
class Sizes:
    """Pictures of each part."""

    train: int
    val: int
    test: int


@dataclass(frozen=True)
class Measured:
    """What was timed of a method, in seconds, and what was counted.

    Attributes:
        start: a process begins, and has every picture checked.
        build: CLIP and method are loaded.
        read_once: the method looks at the training set, of which all features are known.
        read_picture: what a training picture adds whose features are not.
        step: of the optimiser, its pictures loaded.
        steps: how many a run has.
        passes: how often a run scores the validation pictures.
        score_picture: scoring one.
    """

    start: float
    build: float
    read_once: float
    read_picture: float
    step: float
    steps: int
    passes: int
    score_picture: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Measured":
        """Of what :mod:`.probe` has written."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Cost:
    """Seconds that a method is predicted to take, each in a process of its own.

    Attributes:
        fit: training, and scoring the validation pictures.
        test: scoring the test pictures.
    """

    fit: float
    test: float

    @property
    def whole(self) -> float:
        """Both."""
        return self.fit + self.test


def predict_cost(measured: Measured, sizes: Sizes) -> Cost:
    """What a run will take: every part of it in proportion to what was timed."""
    begin = measured.start + measured.build
    reading = measured.read_once + measured.read_picture * sizes.train
    training = measured.step * measured.steps
    validating = measured.score_picture * sizes.val * measured.passes
    return Cost(
        fit=begin + reading + training + validating,
        test=begin + measured.score_picture * sizes.test,
    )


def in_order(groups: Mapping[str, int], costs: Mapping[str, Cost], by_cost: int) -> list[str]:
    """Methods in the order in which they are tried: group by group, of one of them the quicker ones
    first.

    Args:
        groups: by method the place of its group.
        costs: of all of them, in the order that methods of another group keep.
        by_cost: the place of the group whose quicker methods come first.
    """
    return sorted(
        costs,
        key=lambda method: (
            groups[method],
            costs[method].whole if groups[method] == by_cost else 0.0,
        ),
    )


class Budget:
    """Wall time that a call may take, and what of it is promised.

    Args:
        seconds: from now on.
        clock: seconds that never go back.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self.end = clock() + seconds
        self.owed = 0.0

    @property
    def left(self) -> float:
        """What is neither over nor owed to tests of what was fitted."""
        return self.end - self.clock() - self.owed

    def owe(self, cost: Cost) -> None:
        """Keep time for the test of a method that was fitted."""
        self.owed += cost.test

    def pay(self, cost: Cost) -> None:
        """That test was done."""
        self.owed = max(0.0, self.owed - cost.test)

    def fits(self, cost: Cost) -> bool:
        """Whether a method can be fitted and tested."""
        return cost.whole <= self.left

    def fits_again(self, cost: Cost) -> bool:
        """Whether a method that was fitted, whose test is owed, can be fitted with other
        settings."""
        return cost.fit <= self.left


def affordable(order: Sequence[str], costs: Mapping[str, Cost], seconds: float) -> list[str]:
    """The methods that fit one after the other, if each takes what was predicted; what does not fit
    is passed over."""
    kept: list[str] = []
    for method in order:
        if costs[method].whole <= seconds:
            kept.append(method)
            seconds -= costs[method].whole
    return kept
