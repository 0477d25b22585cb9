"""Pictures as a command line names them, without labels: files, folders, lists, tables, shards.

What an argument means is known before any picture is read, and is gone through as often as one
likes; of lists, tables and shards no more than a block of rows is held at a time.
"""

import csv
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lamp_fast.data.pictures import EXTENSIONS
from lamp_fast.data.sources.files import LeftOut, check_regular, pictures_below
from lamp_fast.data.sources.hugging_face import PREFIX, hub_source
from lamp_fast.data.sources.shards import find_shards, shards_source
from lamp_fast.data.sources.source import Given, Source
from lamp_fast.data.sources.table import need_parquet
from lamp_fast.errors import InputError

# Rows of a table with the pictures inside that are held at a time.
_ROWS = 64


class Inputs:
    """The pictures of some arguments, one after the other; iterable again and again.

    Args:
        arguments: pictures, folders of them at any depth, .txt lists, .csv and .parquet tables,
            WebDataset shards, or ``hf:NAME:SPLIT``.
        path_column: of tables; paths start from the file's own folder. A column of .parquet may
            hold the pictures themselves, as bytes or as the datasets library has them.
        left_out: what lies in folders and is not taken is counted there.

    Raises:
        InputError: no such file or folder, a folder without pictures, a table of another form.
    """

    def __init__(self, arguments: Sequence[Path], path_column: str, left_out: LeftOut) -> None:
        self.sources = [find_source(each, path_column, left_out) for each in arguments]

    def __iter__(self) -> Iterator[Given]:
        for source in self.sources:
            yield from source.read()

    def files(self) -> Iterator[Path]:
        """Every file that is read."""
        for source in self.sources:
            yield from source.files
            if source.identity is None:
                yield from (each.picture for each in source.read())

    def check(self) -> tuple[int | None, str]:
        """Go once through everything that names pictures.

        Returns:
            How many there are, None where only reading them tells; and the sha256, in hex, of what
            they are called, in order.

        Raises:
            InputError: a row without a path, or a file that is not of its kind.
        """
        digest, counts = hashlib.sha256(), []
        for source in self.sources:
            if source.identity is not None:
                digest.update(repr(source.identity).encode(errors="backslashreplace"))
                counts.append(source.count)
                continue
            counts.append(0)
            for each in source.read():
                digest.update(os.fsencode(each.name) + b"\0")
                counts[-1] += 1
        return None if None in counts else sum(counts), digest.hexdigest()


def list_pictures(argument: Path, path_column: str, left_out: LeftOut) -> list[Path]:
    """The picture files that an argument means, in order; no picture is read yet.

    Raises:
        InputError: as :class:`Inputs`; pictures that are no files of their own.
    """
    source = find_source(argument, path_column, left_out)
    if source.identity is not None:
        raise InputError(f"{argument}: holds the pictures themselves, expected paths of pictures")
    return [each.name for each in source.read()]


def find_source(argument: Path, path_column: str, left_out: LeftOut) -> Source:
    """What an argument means; see :class:`Inputs`."""
    if os.fspath(argument).startswith(PREFIX) and not argument.exists():
        return hub_source(os.fspath(argument), path_column)
    if (shards := find_shards(argument)) is not None:
        return shards_source(argument, shards)
    if argument.is_dir():
        return _folder(argument, left_out)
    if not argument.exists():
        raise InputError(
            f"{argument}: does not exist, expected a picture, a folder, a .txt list, a .csv or"
            " .parquet table, .tar shards or hf:NAME"
        )
    kind = argument.suffix.lower()
    if kind == ".parquet":
        return _parquet(argument, path_column)
    readers = {
        ".csv": partial(_csv_paths, argument, path_column),
        ".txt": partial(_lines, argument),
    }
    if kind in readers:
        return Source(partial(_below, argument, readers[kind]), (argument,))
    return Source(lambda: iter([Given(argument, argument)]), (argument,))


def _folder(folder: Path, left_out: LeftOut) -> Source:
    """A folder as training lists that of a class; its names are held, for they are sorted."""
    found = pictures_below(folder, left_out)
    if not found:
        beside = "; ".join(left_out.lines())
        raise InputError(
            f"{folder}: holds no pictures ({', '.join(EXTENSIONS)}){beside and '; ' + beside}"
        )

    def read() -> Iterator[Given]:
        for name in found:
            yield Given(folder / name, folder / name)

    found.sort(key=lambda name: name.split(os.sep))  # folder by folder, as paths compare
    return Source(read, ())


def _below(file: Path, paths: Callable[[], Iterator[tuple[str, str]]]) -> Iterator[Given]:
    """The pictures that a list names.

    Args:
        file: the list.
        paths: what each path is called in messages, and the path.
    """
    folder, empty = file.parent, True
    try:
        check_regular(file)
        for where, path in paths():
            if not path or "\0" in path:
                raise InputError(f"{file}: {where} has no path")
            empty = False
            yield Given(folder / path, folder / path)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a UTF-8 {file.suffix} file ({error})") from None
    if empty:
        raise InputError(f"{file}: has no rows, expected a row a picture")


def _csv_paths(file: Path, column: str) -> Iterator[tuple[str, str]]:
    # The signature that spreadsheets write before UTF-8 is no part of the first column's name.
    with open(file, encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, skipinitialspace=True, strict=True)
        _check_column(file, column, rows.fieldnames or ())
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row[column]


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    with open(file, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if path := line.strip():
                yield f"line {number}", path


def _check_column(file: Path, column: str, columns: Iterable[str]) -> None:
    if column not in columns:
        has = ", ".join(map(repr, list(columns)[:12])) or "none"
        raise InputError(f"--path-column {column}: expected such a column in {file}; it has {has}")


def _parquet(file: Path, column: str) -> Source:
    """A table whose column holds paths, or the bytes of pictures."""
    pyarrow, parquet = need_parquet(str(file))

    def cells() -> Iterator[tuple[str, Any]]:
        with parquet.ParquetFile(file) as table:
            number = 0
            for block in table.iter_batches(_ROWS, columns=[column]):
                for cell in block.column(0).to_pylist():
                    number += 1
                    yield f"row {number}", cell

    def pictures() -> Iterator[Given]:
        try:
            for where, cell in cells():
                held = cell if isinstance(cell, dict) else {"bytes": cell}
                name = file / (held.get("path") or where)
                missing = InputError(f"{name}: {where} holds no picture")
                content = held.get("bytes")
                yield Given(name, content if isinstance(content, bytes) else missing)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{file}: cannot be read ({error})") from None

    def paths() -> Iterator[tuple[str, str]]:
        try:
            yield from cells()
        except pyarrow.ArrowException as error:
            raise InputError(f"{file}: cannot be read ({error})") from None

    try:
        check_regular(file)
        with parquet.ParquetFile(file) as table:
            schema, rows = table.schema_arrow, table.metadata.num_rows
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None
    except pyarrow.ArrowException as error:
        raise InputError(f"{file}: not a .parquet file ({error})") from None
    _check_column(file, column, schema.names)
    kind = schema.field(column).type
    types = pyarrow.types
    if types.is_string(kind) or types.is_large_string(kind):
        return Source(partial(_below, file, paths), (file,))
    held = kind.field("bytes").type if _has_bytes(kind, types) else kind
    if not types.is_binary(held) and not types.is_large_binary(held):
        raise InputError(
            f"--path-column {column}: {kind} in {file}, expected paths or the bytes of pictures"
        )
    if not rows:
        raise InputError(f"{file}: has no rows, expected a row a picture")
    return Source(pictures, (file,), (str(file), column, file.stat().st_size, rows), rows)


def _has_bytes(kind: Any, types: Any) -> bool:
    """Whether a column is what the datasets library makes of pictures: bytes and a path."""
    return types.is_struct(kind) and kind.get_field_index("bytes") >= 0
