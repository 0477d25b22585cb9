"""Class names as archives of data sets ship them, with what numbers the classes still in front."""

import re
from collections.abc import Sequence

# "001.Black footed Albatross", "007_crow", "n02085620-Chihuahua", "n02085620". Not "2007 BMW X5",
# whose number is part of the name.
_NUMBERED = re.compile(r"(\d+ ?[.)-]|0\d*[ _]|n\d{8}[ _.-]?)[ _]*(?=\D|$)(?P<name>.*)", re.ASCII)
_OF_ALL = 0.5


def shipped_names(names: Sequence[str]) -> dict[str, str]:
    """Names with a number in front, and what is behind it ("" where that is nothing).

    Empty where only few of the classes have one: a class may well be called "4-wheel drive".

    Args:
        names: class names.
    """
    matches = {name: _NUMBERED.fullmatch(name) for name in names}
    found = {name: match["name"].strip() for name, match in matches.items() if match}
    return found if len(found) > _OF_ALL * len(names) else {}


def shipped_note(names: Sequence[str]) -> tuple[str, ...]:
    """One line on :func:`shipped_names`, or none."""
    found = shipped_names(names)
    if not found:
        return ()
    first, name = next(iter(found.items()))
    better = f", as {name!r} for {first!r}" if name else f", as for {first!r}"
    return (
        f"{len(found)} class names begin with a number that CLIP will read; classes.json can give"
        f" others{better}",
    )
