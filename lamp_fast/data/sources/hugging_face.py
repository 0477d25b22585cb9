"""Pictures of a Hugging Face dataset, on the hub or in a folder, read as a stream.

Pictures stay encoded until they are decoded as files are. Only builders that are part of the
library are asked, and of these only such as read pictures: no code of a dataset runs.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lamp_fast.data.sources.source import Given, Source
from lamp_fast.errors import InputError
from lamp_fast.extras import need

PREFIX = "hf:"
_BUILDERS = ("imagefolder", "parquet", "arrow", "webdataset")


def hub_source(argument: str, column: str) -> Source:
    """The pictures of ``hf:NAME`` or ``hf:NAME:SPLIT``; NAME may be a folder.

    Args:
        argument: without a split, the dataset's only one.
        column: taken where there is such a column, else the only one of pictures.

    Raises:
        InputError: no library, no such dataset or split, no column of pictures, or no network.
    """
    name, _, split = argument.removeprefix(PREFIX).partition(":")
    builder = open_builder(argument, name)
    split = _split(argument, builder, split)
    data = open_stream(argument, builder, split)
    features = data.features or {}
    column = find_column(argument, features, column)
    files = (builder.config.data_files or {}).get(split, ())
    known = repr((list(files), getattr(files, "origin_metadata", None)))
    digest = hashlib.sha256(known.encode(errors="backslashreplace")).hexdigest()
    identity = (name, split, column, digest)
    where = Path(f"{PREFIX}{name}") / split
    lying = _kind(builder) == "imagefolder"
    return Source(partial(_pictures, argument, data, column, where, lying), (), identity)


def open_builder(argument: str, name: str) -> Any:
    """What knows a dataset's splits and columns."""
    datasets = _library(argument)
    with _one_line(argument):
        builder = datasets.load_dataset_builder(name)
    if _kind(builder) not in _BUILDERS:
        raise InputError(f"{argument}: is {_kind(builder)}, expected {' or '.join(_BUILDERS)}")
    return builder


def _kind(builder: Any) -> str:
    return type(builder).__module__.rpartition(".")[2]


def open_stream(argument: str, builder: Any, split: str) -> Any:
    """The rows of a split, without decoding any picture."""
    datasets = _library(argument)
    with _one_line(argument):
        data = builder.as_streaming_dataset(split=split)
        if data.features is None:
            data = data._resolve_features()
        for name, feature in (data.features or {}).items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(name, datasets.Image(decode=False))
    return data


def find_column(argument: str, features: Any, column: str) -> str:
    """The column of pictures."""
    datasets = _library(argument)
    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if column in found:
        return column
    if len(found) != 1:
        has = " and ".join(map(repr, found)) or "none"
        raise InputError(f"--path-column {column}: {argument} has {has}, expected one of pictures")
    return found[0]


def _split(argument: str, builder: Any, split: str) -> str:
    known = list(builder.info.splits or {}) or list(builder.config.data_files or {})
    if split in known or (split and not known):
        return split
    if not split and len(known) == 1:
        return str(known[0])
    has = ", ".join(map(str, known)) or "none that is known"
    raise InputError(f"{argument}: expected {PREFIX}NAME:SPLIT, splits are {has}")


def _pictures(argument: str, data: Any, column: str, where: Path, lying: bool) -> Iterator[Given]:
    rows = enumerate(data)
    while True:
        with _one_line(argument):
            number, row = next(rows, (None, None))
            if number is None:
                return
            given = picture_of(row[column], where / str(number), lying)
        yield given


def picture_of(cell: Any, name: Path, lying: bool) -> Given:
    """A picture as the library gives it undecoded: its bytes, or where its file lies.

    Args:
        cell: "bytes" and "path", either may be None.
        name: what to call it without a file of its own.
        lying: whether the library itself found the files. A path that a table holds is not
            followed: it could lead anywhere on this machine.
    """
    held = cell or {}
    if isinstance(held.get("bytes"), bytes):
        return Given(name, held["bytes"])
    file = held.get("path") if lying else None
    if not file:
        return Given(name, InputError(f"{str(name)!r}: holds no picture"))
    if "://" not in file:
        return Given(Path(file), Path(file))
    import fsspec

    with fsspec.open(file, "rb") as stream:
        return Given(name, stream.read())


@contextlib.contextmanager
def _one_line(argument: str) -> Iterator[None]:
    """Networks, hubs and files fail in many ways, and the library raises almost anything."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{argument}: cannot be read ({reason})") from None


def _library(argument: str) -> Any:
    datasets = need(argument, "datasets", "datasets")
    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):  # every attempt without a network is a warning
        logging.getLogger(name).setLevel(logging.ERROR)
    return datasets
