"""Pictures in WebDataset's shards: tar files whose members KEY.jpg, KEY.cls, ... are a sample.

Members are read as bytes; nothing is ever unpickled, and no shard is fetched or piped from
anywhere. The library groups the members of a sample, and names the shards that braces mean.
"""

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lamp_fast.data.pictures import EXTENSIONS
from lamp_fast.data.sources.files import check_regular
from lamp_fast.data.sources.source import Given, Source
from lamp_fast.errors import InputError
from lamp_fast.extras import need

SUFFIX = ".tar"
# In a folder of shards 0.tar, 1.tar, ...: how many there are.
COUNT_FILE = "nshards.txt"
_PICTURES = tuple(ending.removeprefix(".") for ending in EXTENSIONS)


def find_shards(argument: Path) -> list[Path] | None:
    """The shards that ``train-{0000..0099}.tar``, a .tar file, or a folder of them means.

    Returns:
        None where the argument is something else.

    Raises:
        InputError: a shard that is missing, a count that is none, or no library.
    """
    counted = argument / COUNT_FILE
    if counted.is_file():
        return _existing(argument, [argument / f"{n}{SUFFIX}" for n in range(_count(counted))])
    if argument.suffix.lower() != SUFFIX or argument.is_dir():
        return None
    if argument.exists():
        return [argument]
    _library(argument)
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        found = [Path(name) for name in braceexpand(os.fspath(argument))]
    except UnbalancedBracesError as error:
        raise InputError(f"{argument}: {error}, expected NAME-{{0000..0099}}.tar") from None
    return _existing(argument, found)


def _count(file: Path) -> int:
    try:
        count = int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        count = 0
    if not 1 <= count <= 1_000_000:
        raise InputError(f"{file}: expected the number of shards")
    return count


def _existing(argument: Path, shards: Sequence[Path]) -> list[Path]:
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"{argument}: {shard} does not exist, expected a shard")
    return list(shards)


def shards_source(argument: Path, shards: Sequence[Path]) -> Source:
    """The pictures of some shards; what else is in them is not looked at."""
    _library(argument)
    identity = tuple((os.fspath(shard), shard.stat().st_size) for shard in shards)
    return Source(partial(_pictures, shards), tuple(shards), identity)


def _pictures(shards: Sequence[Path]) -> Iterator[Given]:
    for shard in shards:
        for sample in read_samples(shard, lambda ending: ending in _PICTURES):
            name, picture = picture_of(shard, sample)
            yield Given(name, picture)


def picture_of(shard: Path, sample: dict[str, Any]) -> tuple[Path, bytes | InputError]:
    """The picture of a sample and what to call it."""
    endings = [ending for ending in sample if ending in _PICTURES]
    name = shard / ".".join([sample["__key__"], *endings[:1]])
    if len(endings) != 1:
        has = " and ".join(endings) or "none"
        return name, InputError(f"{str(name)!r}: expected one picture a sample, it has {has}")
    return name, sample[endings[0]]


def read_samples(shard: Path, wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """The samples of a shard: ``__key__``, and the bytes of each wanted member by its ending.

    Args:
        shard: a .tar file.
        wanted: whether a member of this ending, in lower case, is read.

    Raises:
        InputError: no tar file, a damaged one, or a sample with two members of one ending.
    """
    library = _library(shard)

    def named(name: str) -> bool:
        return wanted(name.rpartition("/")[2].partition(".")[2].lower())

    try:
        check_regular(shard)
        with open(shard, "rb") as stream:
            members = library.tar_file_iterator(stream, select_files=named)
            located = ({**member, "__url__": str(shard)} for member in members)
            yield from library.group_by_keys(located)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(f"{shard}: cannot be read ({reason})") from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise InputError(f"{shard}: not a whole .tar file of samples ({reason})") from None


def _library(argument: Path) -> Any:
    return need(str(argument), "webdataset.tariterators", "webdataset")
