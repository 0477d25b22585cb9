"""Tables of pictures (.csv, .parquet): a row a picture, with its path, its class and its part."""

import csv
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamp_fast.errors import InputError

SPLIT_COLUMN = "split"
# What people call the parts, in columns of tables and as folders, in any case.
PART_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class Table:
    """A file of pictures and what its columns are called.

    Attributes:
        file: .csv (UTF-8, comma, a header) or .parquet.
        path_column: a path per picture.
        label_column: a class name, or an integer, per picture.
        split_column: train, val or test, or another word of :data:`PART_OF`, in any case, per
            picture; None takes the column "split" where there is one.
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


def read_table(table: Table) -> list[Row]:
    """Read every row, in order.

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
        rows = [
            _row(cells, f"{file}: row {number}")
            for number, cells in enumerate(reader(table), start=1)
        ]
    except OSError as error:
        raise InputError(f"--table {file}: cannot be read ({error.strerror or error})") from None
    if not rows:
        raise InputError(f"--table {file}: has no rows, expected a row a picture")
    return rows


def _columns(table: Table, header: Sequence[str]) -> list[int]:
    """Where path, label and, if there is one, split stand in the header."""
    wanted = [("--path-column", table.path_column), ("--label-column", table.label_column)]
    if table.split_column is not None:
        wanted.append(("--split-column", table.split_column))
    elif SPLIT_COLUMN in header:
        wanted.append(("--split-column", SPLIT_COLUMN))
    for flag, name in wanted:
        if header.count(name) != 1:
            has = ", ".join(map(repr, header[:12])) or "none"
            raise InputError(
                f"{flag} {name}: expected one such column in {table.file}, which has {has}"
            )
    return [header.index(name) for _, name in wanted]


def _read_csv(table: Table) -> Iterable[list[Any]]:
    # The signature that spreadsheets write before UTF-8 is no part of the first column's name.
    with open(table.file, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, skipinitialspace=True, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            columns = _columns(table, header)
            for number, cells in enumerate(filter(None, reader), start=1):
                if len(cells) != len(header):
                    raise InputError(
                        f"{table.file}: row {number} has {len(cells)} cells,"
                        f" expected the header's {len(header)}"
                    )
                yield [cells[column] for column in columns]
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"--table {table.file}: not a UTF-8 .csv file ({error})") from None


def _read_parquet(table: Table) -> Iterable[tuple[Any, ...]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"--table {table.file}: reading .parquet needs pyarrow"
            " (pip install 'lamp_fast[parquet]'); .csv does without"
        ) from None
    try:
        with parquet.ParquetFile(table.file) as content:
            header = content.schema_arrow.names
            names = [header[column] for column in _columns(table, header)]
            columns = content.read(columns=names)
    except pyarrow.ArrowException as error:
        raise InputError(f"--table {table.file}: not a .parquet file ({error})") from None
    return zip(*(columns[name].to_pylist() for name in names), strict=True)


def _row(cells: Sequence[Any], where: str) -> Row:
    path, label, *rest = cells
    if not isinstance(path, str) or not path:
        raise InputError(f"{where}: path {reprlib.repr(path)}, expected the path of a picture")
    if type(label) is int:
        label = str(label)
    if not isinstance(label, str) or not label.strip():
        raise InputError(f"{where}: label {reprlib.repr(label)}, expected a class name or integer")
    part = None
    if rest:
        part = PART_OF.get(rest[0].strip().lower()) if isinstance(rest[0], str) else None
        if part is None:
            raise InputError(f"{where}: split {reprlib.repr(rest[0])}, expected train, val or test")
    return Row(path, label.strip(), part)
