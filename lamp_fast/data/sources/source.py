"""A source of pictures on a command line: what its pictures are, and what tells it apart."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lamp_fast.errors import InputError


@dataclass(frozen=True)
class Given:
    """A picture and what to call it.

    Attributes:
        name: its file; of a picture within a file that file and its place in it.
        picture: a file, the bytes of one, or why there is none.
    """

    name: Path
    picture: Path | bytes | InputError


@dataclass(frozen=True)
class Source:
    """What one argument of a command line means.

    Attributes:
        read: an iterator over its pictures, from the first one.
        files: what is read to list them.
        identity: what tells its pictures from others; None where their names do.
        count: how many there are; None where only reading all of them tells.
    """

    read: Callable[[], Iterator[Given]]
    files: tuple[Path, ...]
    identity: tuple[Any, ...] | None = None
    count: int | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """Labelled pictures of one part that are no files of their own.

    Attributes:
        names: of each, relative to what all parts start from.
        labels: a class name, or an integer as text.
        places: int64 [N, P], where each lies in a :class:`lamp_fast.data.pictures.Store`.
    """

    names: Sequence[str]
    labels: Sequence[str]
    places: np.ndarray
