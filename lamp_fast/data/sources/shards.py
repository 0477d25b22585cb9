"""Pictures in WebDataset's shards: tar files whose members KEY.jpg, KEY.cls, ... are a sample.

Nothing is unpacked or unpickled: a member is found by its header and read where its bytes lie, and
its name is never a path on this machine. No shard is fetched or piped from anywhere. The library
groups the members of a sample, and names the shards that braces mean.
"""

import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lamp_fast.data.pictures import EXTENSIONS, check_size
from lamp_fast.data.sources.files import check_regular
from lamp_fast.data.sources.source import Given, Source
from lamp_fast.errors import InputError
from lamp_fast.extras import need

SUFFIX = ".tar"
# In a folder of shards 0.tar, 1.tar, ...: how many there are.
COUNT_FILE = "nshards.txt"
PICTURES = tuple(ending.removeprefix(".") for ending in EXTENSIONS)
# Members that the library keeps for itself.
_ASIDE = re.compile(r"__[^/]*__($|/)")
_END = bytes(tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class ShardStore:
    """Pictures within .tar files; a place is (shard, offset, size), offset and size in bytes.

    A file is opened for each picture, as where every picture is a file: thousands of shards and any
    number of threads or processes need nothing more.
    """

    shards: tuple[Path, ...]

    def read(self, place: Sequence[int]) -> bytes:
        """See :class:`lamp_fast.data.pictures.Store`."""
        shard, offset, size = place
        check_size(size)
        with open(self.shards[shard], "rb") as stream:
            stream.seek(offset)
            content = stream.read(size)
        if len(content) != size:
            raise ValueError("the shard ends before the picture does")
        return content


def find_shards(argument: Path, where: str | None = None) -> list[Path] | None:
    """The shards that ``train-{0000..0099}.tar``, a .tar file, or a folder of them means.

    Args:
        argument: as a command line has it.
        where: how messages begin; by default with the argument.

    Returns:
        None where the argument is something else.

    Raises:
        InputError: a shard that is missing, a count that is none, or no library.
    """
    where = os.fspath(argument) if where is None else where
    counted = argument / COUNT_FILE
    if counted.is_file():
        return _existing(where, (argument / f"{n}{SUFFIX}" for n in range(_count(counted))))
    if argument.suffix.lower() != SUFFIX or argument.is_dir():
        return None
    if argument.exists():
        return [argument]
    library = need(where, "braceexpand", "webdataset")
    try:
        return _existing(where, map(Path, library.braceexpand(os.fspath(argument))))
    except library.UnbalancedBracesError as error:
        raise InputError(f"{where}: {error}, expected NAME-{{0000..0099}}.tar") from None


def _count(file: Path) -> int:
    try:
        count = int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        count = 0
    if not 1 <= count <= 1_000_000:
        raise InputError(f"{file}: expected the number of shards")
    return count


def _existing(where: str, shards: Iterator[Path]) -> list[Path]:
    found = []
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"{where}: {shard} does not exist, expected a shard")
        found.append(shard)
    return found


def shards_source(argument: Path, shards: Sequence[Path]) -> Source:
    """The pictures of some shards; what else is in them is not looked at."""
    _library(argument)
    identity = tuple((os.fspath(shard), shard.stat().st_size) for shard in shards)
    return Source(partial(_pictures, shards), tuple(shards), identity)


def _pictures(shards: Sequence[Path]) -> Iterator[Given]:
    store = ShardStore(tuple(shards))
    for number, shard in enumerate(shards):
        for sample in read_samples(shard, lambda ending: ending in PICTURES):
            member, place = picture_of(shard, sample)
            name = shard / member.lstrip("/")
            if not isinstance(place, InputError):
                try:
                    place = store.read((number, *place))
                except (OSError, ValueError) as error:
                    place = InputError(f"{str(name)!r}: cannot be read ({error})")
            yield Given(name, place)


def picture_of(shard: Path, sample: dict[str, Any]) -> tuple[str, tuple[int, int] | InputError]:
    """The member that is the picture of a sample, and where it lies; see :func:`read_samples`."""
    endings = [ending for ending in sample if ending in PICTURES]
    member = ".".join([sample["__key__"], *endings[:1]])
    if len(endings) != 1:
        has = " and ".join(endings) or "none"
        told = f"{f'{shard}/{member}'!r}: expected one picture a sample, it has {has}"
        return member, InputError(told)
    if member.startswith("/") or ".." in member.split("/"):
        return member, InputError(f"{shard}: {member!r} leads out of the shard, expected a name")
    return os.path.normpath(member), sample[endings[0]]


def read_samples(shard: Path, wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """The samples of a shard: ``__key__``, and offset and size of each wanted member by its ending.

    Args:
        shard: a .tar file.
        wanted: whether a member of this ending, in lower case, counts.

    Raises:
        InputError: no tar file, a damaged one or one that is cut short, or a sample with two
            members of one ending.
    """
    library = _library(shard)
    try:
        check_regular(shard)
        with open(shard, "rb") as stream:
            yield from library.group_by_keys(_members(shard, stream, wanted))
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(f"{shard}: cannot be read ({reason})") from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise InputError(f"{shard}: not a whole .tar file of samples ({reason})") from None


def _members(
    shard: Path, stream: BinaryIO, wanted: Callable[[str], bool]
) -> Iterator[dict[str, Any]]:
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while (entry := archive.next()) is not None:
            archive.members.clear()  # which would hold every header
            ending = entry.name.rpartition("/")[2].partition(".")[2].lower()
            if not entry.isreg() or _ASIDE.match(entry.name) or not wanted(ending):
                continue
            if entry.issparse() or entry.size < 0:
                raise ValueError(f"{entry.name!r} has holes or no size")
            place = (entry.offset_data, entry.size)
            yield {"fname": entry.name, "data": place, "__url__": str(shard)}
        # At a broken header behind the first, and at the end of a file that is cut between two
        # members, tarfile just stops.
        stream.seek(archive.offset)
        if stream.read(len(_END)) != _END:
            raise ValueError("it is cut short or damaged: the mark of its end is missing")


def _library(argument: Path) -> Any:
    return need(str(argument), "webdataset.tariterators", "webdataset")
