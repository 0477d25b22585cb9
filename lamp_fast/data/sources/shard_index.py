"""Labelled pictures in WebDataset's shards, found once and then read where they lie.

A shard's index says of each of its samples what the picture is called, where its bytes lie, and its
label. It is kept on disk by what tells the shard from others (place, size, times of change), with a
checksum that finds a damaged one, which is made again.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lamp_fast.data.disk_cache import DiskCache, default_folder
from lamp_fast.data.sources.shards import PICTURES, ShardStore, picture_of, read_samples
from lamp_fast.data.sources.source import Rows
from lamp_fast.data.sources.table import check_label
from lamp_fast.errors import InputError
from lamp_fast.extras import need

# WebDataset's ending for labels, and what a field of KEY.json is called without --label-column.
LABEL_ENDING, LABEL_FIELD = "cls", "label"
_FIELDS = "json"
# Raised whenever an index holds something else of the same shard.
_REVISION = 1
# Of ImageNet an index takes about 100 MB.
_LIMIT = 10**9


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in order.

    Attributes:
        names: of the pictures, as members of the shard.
        labels: a class name, or an integer as text.
        places: offset and size of each picture, in bytes.
    """

    names: Sequence[str]
    labels: Sequence[str]
    places: Sequence[Sequence[int]]


class ShardIndexCache(DiskCache):
    """The indices of one machine; see :class:`DiskCache`."""

    subfolder = "shards"

    def read(self, key: str) -> ShardIndex | None:
        """What is kept under a key; None where nothing is, or a damaged one, which is removed."""
        file = self._file(key)
        try:
            checksum, _, content = file.read_bytes().partition(b"\n")
            if checksum == _checksum(file, content):
                self._used(file)
                return ShardIndex(**json.loads(content))
        except FileNotFoundError:
            return None
        except OSError:
            pass
        with contextlib.suppress(OSError):
            file.unlink()
        return None

    def write(self, key: str, index: ShardIndex) -> None:
        """Keep an index where there is room."""
        file, content = self._file(key), json.dumps(asdict(index)).encode()
        self._write(file, _checksum(file, content) + b"\n" + content)

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name


def _checksum(file: Path, content: bytes) -> bytes:
    """Over content and name, which stands for the shard that it is of."""
    return hashlib.sha256(file.name.encode() + content).hexdigest().encode()


def index_shards(
    store: ShardStore, root: Path, shards: Mapping[str, Sequence[Path]], column: str
) -> dict[str, Rows]:
    """The labelled pictures of every part.

    Args:
        store: of the shards of all parts, one after the other.
        root: what names start from.
        shards: by part.
        column: where labels stand: a member KEY.column, or this field of KEY.json; "label" means
            KEY.cls too.

    Raises:
        InputError: a damaged shard, a sample without one picture and a label, or a name that is
            there twice or leads out of the shard.
    """
    # Also where every index is kept already: what works must not depend on a cache.
    need(str(store.shards[0]), "webdataset", "webdataset")
    cache = ShardIndexCache(default_folder(), _LIMIT)
    found, number = {}, 0
    bar = tqdm(total=len(store.shards), desc="indexing shards", leave=False, disable=None)
    with bar:
        for part, each in shards.items():
            names: list[str] = []
            labels: list[str] = []
            places = [np.empty((0, 3), np.int64)]
            for shard in each:
                index = _read_index(store, number, column, cache)
                below = os.path.relpath(shard, root)
                names += [f"{below}/{name}" for name in index.names]
                labels += index.labels
                held = np.array(index.places, np.int64).reshape(-1, 2)
                places.append(np.insert(held, 0, number, axis=1))
                number += 1
                bar.update()
            if not names:
                raise InputError(f"{each[0]}: the shards of {part} hold no samples")
            found[part] = Rows(names, labels, np.concatenate(places))
    return found


def _read_index(store: ShardStore, number: int, column: str, cache: ShardIndexCache) -> ShardIndex:
    shard = store.shards[number]
    try:
        status = shard.stat()
    except OSError as error:
        raise InputError(f"{shard}: cannot be read ({error.strerror})") from None
    times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    key = json.dumps([_REVISION, column, os.path.realpath(shard), *times])
    index = cache.read(key)
    if index is None:
        index = _index(store, number, column)
        cache.write(key, index)
    return index


def _index(store: ShardStore, number: int, column: str) -> ShardIndex:
    shard = store.shards[number]
    beside = {*_label_members(column), _FIELDS}
    names: dict[str, int] = {}
    labels, places = [], []
    for sample in read_samples(shard, {*PICTURES, *beside}.__contains__):
        name, place = picture_of(shard, sample)
        if isinstance(place, InputError):
            raise place
        if names.setdefault(name, len(names)) != len(labels):
            raise InputError(f"{shard}: {name!r} is there twice, expected every picture once")
        read = {
            ending: partial(store.read, (number, *at))
            for ending, at in sample.items()
            if ending in beside
        }
        labels.append(_label(f"{shard}/{name}", read, column))
        places.append(place)
    return ShardIndex(list(names), labels, places)


def _label_members(column: str) -> tuple[str, ...]:
    """Endings of members that are a label as they stand; the first that is there counts."""
    return (column.lower(), *((LABEL_ENDING,) if column == LABEL_FIELD else ()))


def _label(where: str, read: Mapping[str, Callable[[], bytes]], column: str) -> str:
    """The label of a sample, of whose members beside the picture ``read`` gives the bytes."""
    members = _label_members(column)
    for ending in members:
        if ending in read:
            return check_label(_text(where, ending, read[ending]), where)
    if _FIELDS in read:
        try:
            fields = json.loads(_text(where, _FIELDS, read[_FIELDS]))
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{where}: its {_FIELDS} is no JSON ({error})") from None
        if isinstance(fields, dict) and column in fields:
            return check_label(fields[column], where)
    expected = " or ".join(f"KEY.{ending}" for ending in members)
    raise InputError(
        f"{where}: has no label beside it, expected {expected} or {column!r} in KEY.{_FIELDS}"
        " (--label-column names another ending or field)"
    )


def _text(where: str, ending: str, read: Callable[[], bytes]) -> str:
    try:
        return read().decode()
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: its {ending} cannot be read as UTF-8 ({error})") from None
