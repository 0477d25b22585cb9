"""Levels above classes: which genus a species is of, which family a genus."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lamp_fast.data.words import plain_name
from lamp_fast.errors import InputError

# The level of answers that are class names.
CLASS = "class"


@dataclass(frozen=True)
class Level:
    """Some classes, put together by their parents at one level.

    Attributes:
        title: of the level.
        names: of the K parents, in the order of their first class.
        parent: int64 [C], where each class's parent stands in ``names``.
    """

    title: str
    names: tuple[str, ...]
    parent: np.ndarray


@dataclass(frozen=True)
class Hierarchy:
    """What classes are kinds of.

    Attributes:
        levels: titles of the levels above the classes, the nearest first.
        parents: a name at each level, by class name as :func:`lamp_fast.data.words.plain_name`
            writes it.
    """

    levels: tuple[str, ...]
    parents: Mapping[str, tuple[str, ...]]

    def check(self, names: Sequence[str], where: str) -> None:
        """Refuse classes that have no parents.

        Raises:
            InputError: beginning with ``where``, naming the first.
        """
        without = [name for name in names if plain_name(name) not in self.parents]
        if without:
            more = f" and {len(without) - 1} more" if len(without) > 1 else ""
            raise InputError(
                f"{where}: class {without[0]!r}{more} is not in the hierarchy, expected a row for"
                f" each of {len(names)}"
            )

    def level(self, title: str, names: Sequence[str]) -> Level:
        """Some classes at a level.

        Raises:
            InputError: another level, or a class without parents.
        """
        if title not in self.levels:
            raise InputError(f"--level {title}: expected one of {', '.join(self.levels)}")
        self.check(names, f"--level {title}")
        place = self.levels.index(title)
        above = [self.parents[plain_name(name)][place] for name in names]
        parents = tuple(dict.fromkeys(above))
        where = {name: index for index, name in enumerate(parents)}
        return Level(title, parents, np.array([where[name] for name in above], dtype=np.int64))

    def every_level(self, names: Sequence[str]) -> Iterator[Level]:
        """The same at each level, the nearest first."""
        return (self.level(title, names) for title in self.levels)


def saved_hierarchy(values: Any, where: str) -> Hierarchy | None:
    """A hierarchy as a run's record holds it: :class:`Hierarchy` as JSON, or None.

    Raises:
        InputError: anything else.
    """
    if values is None:
        return None
    try:
        levels = tuple(values["levels"])
        parents = {name: tuple(above) for name, above in dict(values["parents"]).items()}
        every = [*levels, *(name for above in parents.values() for name in above)]
        whole = all(isinstance(name, str) and name.strip() for name in every)
        whole = whole and levels and all(len(above) == len(levels) for above in parents.values())
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InputError(f"{where}: expected levels, and a name at each by class")
    return Hierarchy(levels, parents)
