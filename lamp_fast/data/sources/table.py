"""Tables of pictures (.csv, .parquet): a row a picture, with its path, its class and its part."""

import csv
import json
import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lamp_fast.data.sources.files import check_regular
from lamp_fast.errors import InputError
from lamp_fast.extras import need

# What the column of parts is called, in any case. Of the second kind one that names no part at all
# is about something else.
SPLIT_COLUMN = "split"
SPLIT_COLUMNS = ("partition", "subset", "phase", "part", "set", "data_split", "dataset_split")
# What people call the parts, in columns of tables and as folders: see :func:`part_of`.
PART_OF = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# What tables hold in place of a label that is missing, as pandas and numpy write it.
MISSING = ("nan", "NaN", "None", "<NA>", "NaT")

_LIBRARY = ("pyarrow", "pyarrow.parquet")
_NUMBER = re.compile(r"[+-]?\d+(\.0*)?", re.ASCII)


def part_of(name: str) -> str | None:
    """The part that a word names, in any case, alone or as a set: "Train", "test_set"."""
    return PART_OF.get(re.sub(r"[ _-]*set$", "", name.strip().lower()))


def number_of(label: str) -> int | None:
    """The integer that a label reads as, however it is written: of "7", "7.0" and "07" it is 7."""
    return int(label.partition(".")[0]) if _NUMBER.fullmatch(label) and len(label) < 40 else None


@dataclass(frozen=True)
class PictureTable:
    """A file of pictures and what its columns are called.

    Attributes:
        file: .csv (UTF-8, comma, a header) or .parquet.
        path_column: a path per picture.
        label_column: a class name, or an integer, per picture.
        split_column: a word of :func:`part_of` per picture; None takes the column that is called
            "split" or as :data:`SPLIT_COLUMNS` says, where there is one.
    """

    file: Path
    path_column: str = "path"
    label_column: str = "label"
    split_column: str | None = None


@dataclass(frozen=True)
class Row:
    """One picture of a table; ``part`` is None where the table has no split column."""

    path: str
    label: str
    part: str | None


def read_table(table: PictureTable) -> tuple[list[Row], dict[str, str]]:
    """Read every row, in order.

    Returns:
        The rows; and the class names of labels that are numbers, where the file itself has them.

    Raises:
        InputError: a file that is missing, malformed or of another kind, a column that is not
            there, or a cell that is empty or makes no sense, by row (from 1, without the header).
    """
    file = table.file
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise InputError(f"--table {file}: expected a {' or '.join(readers)} file")
    try:
        check_regular(file)
        header, cells, names = reader(table)
    except OSError as error:
        raise InputError(f"--table {file}: cannot be read ({error.strerror or error})") from None
    if not cells:
        raise InputError(f"--table {file}: has no rows, expected a row a picture")
    guessed = len(header) > 2 and table.split_column is None and header[2].lower() != SPLIT_COLUMN
    # The name alone is no proof.
    if guessed and not any(isinstance(each[2], str) and part_of(each[2]) for each in cells):
        cells = [each[:2] for each in cells]
    rows = [_row(each, f"{file}: row {number}") for number, each in enumerate(cells, start=1)]
    check_spelling((f"{file}: row {number}", row.label) for number, row in enumerate(rows, 1))
    if names:
        for number, row in enumerate(rows, start=1):
            if row.label not in names:
                raise InputError(
                    f"{file}: row {number}: label {row.label!r}, expected one of the file's own"
                    f" {len(names)} classes, from 0"
                )
    return rows, names


def check_spelling(labels: Iterable[tuple[str, str]]) -> None:
    """One number, one class: refuse data that write 1 as "1" and as "1.0" or "01".

    Args:
        labels: each with where it stands.
    """
    first: dict[int, tuple[str, str]] = {}
    for where, label in labels:
        value = number_of(label)
        if value is None:
            continue
        earlier, before = first.setdefault(value, (where, label))
        if label != before:
            raise InputError(
                f"{where}: label {label!r} is the number of {before!r} in {earlier}, expected one"
                " way to write it"
            )


def check_label(label: Any, where: str) -> str:
    """A class name, or an integer as text.

    Raises:
        InputError: neither of these, or a word for a label that is missing.
    """
    if type(label) is int:
        label = str(label)
    if isinstance(label, str) and label.strip() in MISSING:
        raise InputError(
            f"{where}: label {label.strip()!r} stands for none, expected a class name or integer"
        )
    if not isinstance(label, str) or not label.strip():
        raise InputError(f"{where}: label {reprlib.repr(label)}, expected a class name or integer")
    return label.strip()


def _columns(table: PictureTable, header: Sequence[str]) -> list[int]:
    """Where path, label and, if there is one, split stand in the header."""
    wanted = [("--path-column", table.path_column), ("--label-column", table.label_column)]
    split = table.split_column
    if split is None:
        used = [name for _, name in wanted]
        alike = [name for name in header if name not in used and name.lower() == SPLIT_COLUMN]
        alike = alike or [
            name for name in header if name not in used and name.lower() in SPLIT_COLUMNS
        ]
        if len(alike) > 1:
            raise InputError(
                f"--split-column: missing; {table.file} has {' and '.join(map(repr, alike))},"
                " expected the name of one"
            )
        split = alike[0] if alike else None
    if split is not None:
        wanted.append(("--split-column", split))
    for flag, name in wanted:
        if header.count(name) != 1:
            has = ", ".join(map(repr, header[:12])) or "none"
            raise InputError(
                f"{flag} {name}: expected one such column in {table.file}, which has {has}"
            )
    return [header.index(name) for _, name in wanted]


# The names of the columns that are read, their cells by row, and the file's own class names.
Content = tuple[list[str], list[Sequence[Any]], dict[str, str]]


def _read_csv(table: PictureTable) -> Content:
    # The signature that spreadsheets write before UTF-8 is no part of the first column's name.
    with open(table.file, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, skipinitialspace=True, strict=True)
        rows = []
        try:
            header = [name.strip() for name in next(reader, [])]
            columns = _columns(table, header)
            for number, cells in enumerate(filter(None, reader), start=1):
                if len(cells) != len(header):
                    raise InputError(
                        f"{table.file}: row {number} has {len(cells)} cells,"
                        f" expected the header's {len(header)}"
                    )
                rows.append([cells[column] for column in columns])
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"--table {table.file}: not a UTF-8 .csv file ({error})") from None
    return [header[column] for column in columns], rows, {}


def need_parquet(where: str) -> tuple[ModuleType, ModuleType]:
    """The library that reads .parquet, and its part that does; see :func:`need`."""
    modules = (need(where, name, "parquet", otherwise="; .csv does without") for name in _LIBRARY)
    return tuple(modules)


def _read_parquet(table: PictureTable) -> Content:
    pyarrow, parquet = need_parquet(f"--table {table.file}")
    try:
        with parquet.ParquetFile(table.file) as content:
            schema = content.schema_arrow
            names = [schema.names[column] for column in _columns(table, schema.names)]
            columns = content.read(columns=names)
    except pyarrow.ArrowException as error:
        raise InputError(f"--table {table.file}: not a .parquet file ({error})") from None
    rows = list(zip(*(columns[name].to_pylist() for name in names), strict=True))
    return names, rows, _own_names(schema, table.label_column)


def _own_names(schema: Any, column: str) -> dict[str, str]:
    """What the datasets library writes beside a column of ClassLabel: the name of each number.

    Only where the column holds numbers, and the names are what they should be.
    """
    try:
        written = json.loads((schema.metadata or {})[b"huggingface"])
        names = written["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    numbers = str(schema.field(column).type).startswith(("int", "uint"))
    if not numbers or not isinstance(names, list):
        return {}
    if not all(isinstance(name, str) and name.strip() for name in names):
        return {}
    return {str(number): name.replace("_", " ") for number, name in enumerate(names)}


def _row(cells: Sequence[Any], where: str) -> Row:
    path, label, *rest = cells
    if not isinstance(path, str) or not path:
        raise InputError(f"{where}: path {reprlib.repr(path)}, expected the path of a picture")
    label = check_label(label, where)
    part = None
    if rest:
        part = part_of(rest[0]) if isinstance(rest[0], str) else None
        if part is None:
            raise InputError(f"{where}: split {reprlib.repr(rest[0])}, expected train, val or test")
    return Row(path, label, part)
