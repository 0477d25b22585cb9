"""Pictures of a Hugging Face dataset, on the hub or in a folder.

Prediction reads them as a stream; training reads them anywhere, from the Arrow files that the
library makes of any dataset in its own cache. Pictures stay encoded until they are decoded as files
are. Only builders that are part of the library are asked, and of these only such as read pictures:
no code of a dataset runs.
"""

import contextlib
import hashlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lamp_fast.data.pictures import read_file
from lamp_fast.data.sources.class_names import shown
from lamp_fast.data.sources.source import Given, Rows, Source
from lamp_fast.data.sources.table import check_label
from lamp_fast.errors import InputError
from lamp_fast.extras import need

PREFIX = "hf:"
# What the library's save_to_disk writes beside its Arrow files: of several splits, or of one.
_SAVED = ("dataset_dict.json", "state.json")
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
    file = _picture_in(cell, lying)
    if isinstance(file, bytes):
        return Given(name, file)
    if file is None:
        return Given(name, InputError(f"{str(name)!r}: holds no picture"))
    if "://" not in file:
        return Given(Path(file), Path(file))
    import fsspec

    with fsspec.open(file, "rb") as stream:
        return Given(name, stream.read())


def _picture_in(cell: Any, lying: bool) -> bytes | str | None:
    """Its bytes, its file, or neither; see :func:`picture_of`."""
    held = cell or {}
    if isinstance(held.get("bytes"), bytes):
        return held["bytes"]
    return (held.get("path") or None) if lying else None


@dataclass(frozen=True)
class HubStore:
    """Pictures of datasets in Arrow files, which are mapped into memory; a place is (split, row).

    Attributes:
        splits: datasets of the library with the one column of undecoded pictures.
        column: its name.
        lying: see :func:`picture_of`.
    """

    splits: tuple[Any, ...]
    column: str
    lying: bool

    def read(self, place: Sequence[int]) -> bytes:
        """See :class:`lamp_fast.data.pictures.Store`."""
        split, row = place
        held = _picture_in(self.splits[split][row][self.column], self.lying)
        if held is None:
            raise ValueError("the row holds no picture")
        return held if isinstance(held, bytes) else read_file(Path(held))


@dataclass(frozen=True, eq=False)
class HubData:
    """What a dataset holds to train and test on.

    Attributes:
        rows: by split, of those that have labels.
        store: of all of them.
        label_column: where labels stand.
        classnames: of labels that are numbers, where the dataset itself has names.
        notes: splits that were left out, a line each.
    """

    rows: Mapping[str, Rows]
    store: HubStore
    label_column: str
    classnames: tuple[str, ...] | None
    notes: tuple[str, ...]


def read_hub(where: str, name: str, picture_column: str, label_column: str) -> HubData:
    """The labelled pictures of every split; only labels are read.

    Args:
        where: the flag and value that named the dataset, for messages.
        name: on the hub, or a folder: of files that the library knows how to read, or one that its
            ``save_to_disk`` wrote.
        picture_column: as in :func:`hub_source`.
        label_column: taken where there is such a column, else the only one of ClassLabel.

    Raises:
        InputError: no library, no such dataset, no such columns, rows without a label in a split
            that has some, or no network.
    """
    datasets = _library(where)
    splits, lying = _open_splits(where, name)
    rows, notes, kept = {}, [], []
    first: Any = None
    for split, data in splits.items():
        if first is None:
            first = data.features
            pictures = find_column(where, first, picture_column)
            column = _label_column(where, first, label_column)
        elif data.features != first:
            raise InputError(f"{where}: split {split} has other columns than {next(iter(splits))}")
        with _one_line(where):
            labels = list(data[column])
        # How the library writes a label that is kept from those who compete.
        if all(label is None or label == -1 for label in labels):
            notes.append(f"left out: split {split}, which has no labels")
            continue
        names = [f"{split}/{row}" for row in range(len(labels))]
        texts = [
            check_label(label, f"{where}: {row}") for label, row in zip(labels, names, strict=True)
        ]
        places = np.stack([np.full(len(labels), len(kept)), np.arange(len(labels))], axis=1)
        rows[split] = Rows(names, texts, places)
        with _one_line(where):
            undecoded = data.select_columns([pictures])
            kept.append(undecoded.cast_column(pictures, datasets.Image(decode=False)))
    known = first[column] if first is not None else None
    classnames = shown(known.names) if isinstance(known, datasets.ClassLabel) else None
    store = HubStore(tuple(kept), pictures, lying)
    return HubData(rows, store, column, classnames, tuple(notes))


def _open_splits(where: str, name: str) -> tuple[dict[str, Any], bool]:
    """Every split as a dataset that is read anywhere, and whether the library found the files."""
    datasets = _library(where)
    folder = Path(name)
    if any((folder / file).is_file() for file in _SAVED):
        with _one_line(where):
            saved = datasets.load_from_disk(name)
        return dict(saved) if isinstance(saved, dict) else {"saved": saved}, False
    builder = open_builder(where, name)
    with _one_line(where):
        builder.download_and_prepare()
        splits = {str(split): builder.as_dataset(split=split) for split in builder.info.splits}
    return splits, _kind(builder) == "imagefolder"


def _label_column(where: str, features: Any, column: str) -> str:
    datasets = _library(where)
    if column in features:
        return column
    found = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(found) != 1:
        has = ", ".join(map(repr, features)) or "none"
        raise InputError(f"--label-column {column}: expected a column of {where}, which has {has}")
    return found[0]


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
    if sys.stderr.isatty():
        datasets.enable_progress_bars()
    else:
        datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):  # every attempt without a network is a warning
        logging.getLogger(name).setLevel(logging.ERROR)
    return datasets
