"""What a run keeps of the pictures that it was told to leave out."""

from collections.abc import Mapping
from typing import Any

from lamp_fast.data.entries import SPLIT_PARTS
from lamp_fast.errors import InputError


def saved_excluded(values: Any, where: str) -> dict[str, tuple[str, ...]]:
    """Names of the pictures that a run left out of each part, of what it saved of them.

    Raises:
        InputError: anything else.
    """
    given = {} if values is None else values
    if not isinstance(given, Mapping) or not all(
        part in SPLIT_PARTS
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        for part, names in given.items()
    ):
        raise InputError(f"{where}: expected lists of names of {', '.join(SPLIT_PARTS)}")
    return {part: tuple(names) for part, names in given.items()}
