"""Files that say what classes are kinds of."""

from collections.abc import Sequence
from pathlib import Path

from lamp_fast.data.hierarchy import Hierarchy
from lamp_fast.data.sources.table import PictureTable
from lamp_fast.data.sources.words import CLASS, read_rows
from lamp_fast.data.words import plain_name
from lamp_fast.errors import InputError


def read_levels(
    file: Path | None, levels: Sequence[str], table: PictureTable | None, classnames: Sequence[str]
) -> Hierarchy | None:
    """What the classes of a data set are kinds of, by a file or its own table; None without either.

    Args:
        file: see :func:`read_hierarchy`.
        levels: which columns; of the table none are taken unasked.
        table: that lists the pictures, if one does.
        classnames: all of which must be there.

    Raises:
        InputError: see :func:`read_hierarchy`, or a class that is not there.
    """
    if file is not None:
        found, where = read_hierarchy(file, levels), f"--hierarchy {file}"
    elif levels and table is not None:
        if table.file.suffix.lower() != ".csv":
            raise InputError(
                f"--levels {' '.join(levels)}: expected a .csv --table, or --hierarchy, for"
                f" {table.file}"
            )
        where = f"--table {table.file}"
        found = read_hierarchy(table.file, levels, flag="--table", names=table.label_column)
    else:
        return None
    found.check(classnames, where)
    return found


def read_hierarchy(
    file: Path, levels: Sequence[str] = (), *, flag: str = "--hierarchy", names: str = CLASS
) -> Hierarchy:
    """The levels above classes, from a CSV file with a row a class or a row a picture.

    Args:
        file: UTF-8, comma, a header.
        levels: the columns that are levels, the nearest to the classes first; by default all but
            that of the names, in their order.
        flag: that named the file.
        names: the column of class names.

    Raises:
        InputError: a file that is missing or malformed, an empty cell, a class with two parents, or
            a parent that itself has two.
    """
    rows = read_rows(flag, file, (names, *levels))
    titles = tuple(levels) or tuple(column for column in rows[0][1] if column != names)
    if not titles or names in titles or len(set(titles)) < len(titles):
        raise InputError(f"{flag} {file}: expected columns of levels beside {names!r}")
    above: dict[tuple[str, str], str] = {}
    parents: dict[str, tuple[str, ...]] = {}
    for number, row in rows:
        chain = [plain_name(row[names]), *(row.get(title, "") for title in titles)]
        for column, cell in zip((names, *titles), chain, strict=True):
            if not cell:
                raise InputError(f"{flag} {file}: row {number}: {column} is empty")
        for column, child, title, parent in zip(
            (names, *titles), chain, titles, chain[1:], strict=False
        ):
            before = above.setdefault((column, child), parent)
            if before != parent:
                raise InputError(
                    f"{flag} {file}: row {number}: {column} {child!r} is of {title} {parent!r}, but"
                    f" of {before!r} before, expected one"
                )
        parents[chain[0]] = tuple(chain[1:])
    return Hierarchy(titles, parents)
