"""What a method may know, when it is built, of the run around it."""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lamp_fast.clip.settings import Trimming
from lamp_fast.errors import InputError


@dataclass(frozen=True)
class RunClasses:
    """The class names of a run, which some methods hold parameters for.

    Attributes:
        base: the trained ones, in label order.
        new: those that are tested without being trained on; often none.
        counts: training pictures of each of the trained ones; empty where nothing asks for them.
    """

    base: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()

    def columns(self, names: Sequence[str]) -> list[int | None]:
        """Where each name stands among the trained ones, None where it does not.

        Classes may share a name (ImageNet has two "missile"): each name asked for is another one.
        The new ones as a whole are none of the trained ones, whatever they are called.
        """
        if tuple(names) == self.new:
            return [None] * len(names)
        free: dict[str, deque[int]] = defaultdict(deque)
        for column, name in enumerate(self.base):
            free[name].append(column)
        return [free[name].popleft() if free[name] else None for name in names]

    def placed(self, names: Sequence[str]) -> tuple[list[int], list[int]]:
        """Of the trained ones among some names, where they stand in ``names``, and where among the
        trained ones."""
        both = [each for each in enumerate(self.columns(names)) if each[1] is not None]
        return [asked for asked, _ in both], [column for _, column in both]

    def trained_columns(self, names: Sequence[str], reason: str) -> list[int]:
        """The same of names that must all be trained ones.

        Args:
            names: asked for.
            reason: why others have no score.

        Raises:
            InputError: a name that was not trained.
        """
        columns = self.columns(names)
        for name, column in zip(names, columns, strict=True):
            if column is None:
                raise InputError(f"classes: {name!r} was not trained: {reason}")
        return columns


@dataclass(frozen=True)
class Surroundings:
    """What a method may know, when it is built, of the run beside its own settings.

    Attributes:
        classes: of the run.
        trimming: what is left out of the text side.
        path: "literal" asks for the equations as they are written, where there is such a path.
        epochs: how many the run trains; None where only its data would tell.
        tau: of the logit adjustment.
    """

    classes: RunClasses = field(default_factory=RunClasses)
    trimming: Trimming = field(default_factory=Trimming)
    path: Literal["exact", "literal"] = "exact"
    epochs: int | None = 50
    tau: float = 1.0
