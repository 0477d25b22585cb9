"""Pictures that a user wants left out, by a file that names them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from lamp_fast.data.entries import SPLIT_PARTS
from lamp_fast.data.sources import DataSource
from lamp_fast.data.sources.files import read_lines
from lamp_fast.data.sources.words import read_rows
from lamp_fast.errors import InputError
from lamp_fast.files import path_text

# The columns of a file that names pictures; the second need not be there.
PATH, PART = "path", "part"


def without_excluded(source: DataSource, file: Path) -> DataSource:
    """A data set without the pictures that a file names; the parts of the others stay theirs.

    Args:
        source: the data set.
        file: a ``.csv`` with the column path, and perhaps part (train, val or test), or a ``.txt``
            with a path a line. Paths are the names of :class:`Pictures`, and mean every part that
            has them where no part is said.

    Raises:
        InputError: a file that cannot be read, a path that no picture has, or a class without a
            training picture then.
    """
    names = {part: _names(source, part) for part in SPLIT_PARTS}
    found: dict[str, set[str]] = {part: set() for part in SPLIT_PARTS}
    for where, path, part in _read(file):
        if part and part not in SPLIT_PARTS:
            raise InputError(f"{where}: part {part!r}: expected one of {', '.join(SPLIT_PARTS)}")
        having = [each for each in ([part] if part else SPLIT_PARTS) if path in names[each]]
        if not having:
            among = f"the {part} pictures" if part else "the pictures"
            example = next(iter(names["train"] or names["test"]))
            raise InputError(
                f"{where}: {path!r} is none of {among}, expected a path as {example!r}"
            )
        for each in having:
            found[each].add(path)
    left = leave_out(source, {part: sorted(each) for part, each in found.items() if each})
    counts = np.bincount(left.train.labels, minlength=len(left.classnames))
    before = np.bincount(source.train.labels, minlength=len(left.classnames))
    emptied = np.flatnonzero((counts == 0) & (before > 0))
    if len(emptied):
        more = f" and {len(emptied) - 1} more" if len(emptied) > 1 else ""
        raise InputError(
            f"--exclude {file}: leaves class {left.classnames[emptied[0]]!r}{more} without a"
            " training picture, expected at least one"
        )
    if len(source.test) and not len(left.test):
        raise InputError(f"--exclude {file}: leaves no test picture, expected at least one")
    return left


def leave_out(source: DataSource, excluded: Mapping[str, Iterable[str]]) -> DataSource:
    """A data set without some of its pictures, and a note that says how many these were.

    Args:
        source: the data set.
        excluded: names in each part. Those that are not there are not missed, because a run's own
            pictures may have been taken away since.
    """
    parts, counts = {}, []
    for part, names in excluded.items():
        gone, pictures = set(names), getattr(source, part)
        kept = [row for row, name in enumerate(pictures.names) if path_text(name) not in gone]
        parts[part] = pictures.select(kept)
        counts.append(f"{len(pictures) - len(kept):,} {part}")
    if not parts:
        return source
    note = f"excluded pictures: {', '.join(counts)}"
    if "test" in parts:
        note += "; results on the test part are not comparable with those on all of it"
    held = {part: tuple(names) for part, names in excluded.items()}
    return replace(source, **parts, excluded=held, notes=(*source.notes, note))


def _names(source: DataSource, part: str) -> dict[str, None]:
    return dict.fromkeys(map(path_text, getattr(source, part).names))


def _read(file: Path) -> list[tuple[str, str, str]]:
    """Where it says so, the path, and the part or nothing, of each picture."""
    flag = f"--exclude {file}"
    if file.suffix.lower() == ".csv":
        rows = read_rows("--exclude", file, (PATH,))
        return [(f"{flag}: row {number}", row[PATH], row.get(PART, "")) for number, row in rows]
    if file.suffix.lower() != ".txt":
        raise InputError(f"{flag}: expected a .csv with the column {PATH}, or a .txt of paths")
    return [(f"{flag}: line {number}", line.strip(), "") for number, line in read_lines(file)]
