"""Files below a data root: listed fast, and never followed out of it."""

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lamp_fast.data.pictures import EXTENSIONS, Pictures
from lamp_fast.errors import InputError

CLASS_NAMES_FILE = "classes.json"
# Thumbnails, resource forks, deleted files: what systems put among one's own folders.
SYSTEM_FOLDERS = (
    "@eadir",
    "__macosx",
    "#recycle",
    "@recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "__pycache__",
)

# What :class:`LeftOut` counts.
RUN = "folders of runs"
LOOSE = "pictures beside the class folders"
UNREADABLE = "folders that cannot be read"
NO_ENDING = "pictures whose names have no ending, as .jpg"
OTHER = "files that are no pictures"
_NOT_READ = {
    ending: f"{ending} files, a format that is not read"
    for ending in (
        *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".ico", ".exr"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
    )
}
# How files of the formats that are read begin.
_SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"GIF8",
    b"RIFF",
    b"II*\0",
    b"MM\0*",
    b"BM",
    b"P5",
    b"P6",
)


@dataclass(frozen=True)
class Found:
    """What lies on disk of a data set.

    Attributes:
        classnames: label l means ``classnames[l]``.
        parts: train, val and test.
        drawn: parts that were drawn here, from what is otherwise training pictures.
        notes: how the parts came about, and what was left out (see :class:`LeftOut`), a line each.
        imb: the imbalance ratio that the training pictures were drawn with; None where they are
            what the data set has.
        group_counts: see :class:`lamp_fast.data.sources.DataSource`.
    """

    classnames: tuple[str, ...]
    parts: dict[str, Pictures]
    drawn: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    imb: float | None = None
    group_counts: tuple[int, ...] | None = None


def path_below(root: Path, path: str, where: str) -> str:
    """A path relative to the root, refused where it leads elsewhere by its letters alone."""
    relative = os.path.relpath(path, os.path.abspath(root)) if os.path.isabs(path) else path
    relative = os.path.normpath(relative)
    if ".." in (*path.split("/"), *relative.split("/")) or relative == ".":
        raise InputError(f"{where}: path {path!r}, expected a path below {root} (see --root)")
    return relative


def check_files(
    file: Path, pictures: Mapping[str, Pictures], *, links_may_leave: bool = False
) -> None:
    """Every picture that a file lists is a file, and below the image folder.

    Args:
        file: what lists the pictures.
        pictures: by part.
        links_may_leave: whether a link in the image folder may lead out of it.

    Raises:
        InputError: a symbolic link that may not lead out, or missing files: the first and how many.
    """
    missing = []
    # Folders hold many pictures: following links once a folder keeps this fast.
    resolve = lru_cache(maxsize=None)(os.path.realpath)
    for each in pictures.values():
        images = resolve(each.root)
        for index, relative in enumerate(each.names):
            path = os.path.join(images, relative)
            try:
                mode = os.lstat(path).st_mode
                real = os.path.join(resolve(os.path.dirname(path)), os.path.basename(path))
                if stat.S_ISLNK(mode):
                    real = os.path.realpath(path)
                    mode = os.stat(real).st_mode
            except (OSError, ValueError):
                missing.append(each.name(index))
                continue
            if not links_may_leave and not real.startswith(os.path.join(images, "")):
                raise InputError(f"{file}: {relative!r} leads out of the image folder {each.root}")
            if not stat.S_ISREG(mode):
                missing.append(each.name(index))
    if missing:
        listed = sum(len(each) for each in pictures.values())
        raise InputError(
            f"{file}: {len(missing)} of the {listed} listed pictures are missing, first"
            f" {missing[0]!r}"
        )


class LeftOut:
    """What lies below folders of pictures and is not listed: how much of what, and the first.

    Args:
        skip_unreadable: count a folder that cannot be read; else its OSError is raised.
    """

    def __init__(self, *, skip_unreadable: bool = False) -> None:
        self.skip_unreadable = skip_unreadable
        self._found: dict[str, list[str]] = {}

    def add(self, what: str, path: str) -> None:
        """Count one more."""
        self._found.setdefault(what, []).append(path)

    def count(self, *kinds: str) -> int:
        """How many there are of some kinds."""
        return sum(len(self._found.get(what, ())) for what in kinds)

    def lines(self, *, every_file: bool = True) -> tuple[str, ...]:
        """A line for each kind; without ``every_file`` none for what is no picture at all."""
        return tuple(
            f"left out: {what}: {len(paths):,} ({'first ' if len(paths) > 1 else ''}{paths[0]!r})"
            for what, paths in sorted(self._found.items())
            if every_file or what != OTHER
        )

    @property
    def looks_like_pictures(self) -> int:
        """How many may be pictures that somebody wanted to be read, or folders of them."""
        return self.count(UNREADABLE, NO_ENDING, *_NOT_READ.values())


def visible_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones and what systems make."""
    return [each.name for each in _entries(folder) if _is_folder(each) and not _unwanted(each)]


def pictures_by_class(root: Path, part: str, left_out: LeftOut) -> dict[str, list[str]]:
    """The pictures of every class folder below ``root / part``, as paths relative to ``root``.

    A folder that holds nothing but run folders is no class.
    """
    count_beside(root, part, left_out)
    found = {}
    for name in visible_folders(root / part):
        runs = left_out.count(RUN)
        relative = os.path.join(part, name)
        pictures = sorted(_walk(os.path.join(root, relative), relative, set(), left_out))
        if pictures or left_out.count(RUN) == runs:
            found[name] = pictures
    return found


def count_beside(root: Path, part: str, left_out: LeftOut) -> None:
    """Count what lies beside the class folders, or the parts, in ``root / part``."""
    for each in _entries(root / part):
        relative = os.path.join(part, each.name)
        if _is_folder(each):
            if unwanted := _unwanted(each):
                left_out.add(unwanted, relative)
        elif _is_picture(each.name):
            left_out.add(LOOSE, relative)
        elif relative != CLASS_NAMES_FILE:
            left_out.add(_kind(each), relative)


def pictures_below(folder: Path, left_out: LeftOut) -> list[str]:
    """The pictures in a folder at any depth, as paths relative to it, sorted."""
    return sorted(_walk(str(folder), "", set(), left_out))


def holds_pictures(root: Path, name: str) -> bool:
    """Whether there is a picture at any depth of a folder, outside run folders."""
    left_out = LeftOut(skip_unreadable=True)
    return next(_walk(os.path.join(root, name), name, set(), left_out), None) is not None


def holds_only_folders(folder: Path) -> bool:
    """Whether a folder holds visible folders, and no picture beside them."""
    kinds = {_is_folder(each) for each in _entries(folder) if _is_wanted(each)}
    return kinds == {True}


def is_run(folder: str) -> bool:
    """Whether a folder is a run's by its own record, whose plots are no training pictures."""
    try:
        record = json.loads(_read_text(Path(folder, "config.json")))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"settings", "clip", "data"} <= record.keys()


def _walk(folder: str, relative: str, seen: set[str], left_out: LeftOut) -> Iterator[str]:
    """Picture files at any depth; links are followed, but no folder is entered twice."""
    real = os.path.realpath(folder)
    if real in seen:
        left_out.add("links to a folder that is listed already", relative)
        return
    seen.add(real)
    try:
        entries = _entries(folder)
    except OSError:
        if not left_out.skip_unreadable:
            raise
        left_out.add(UNREADABLE, relative or folder)
        return
    # Not the folder that was asked for.
    if relative and any(each.name == "config.json" for each in entries) and is_run(folder):
        left_out.add(RUN, relative)
        return
    for each in entries:
        below = os.path.join(relative, each.name)
        # First, for there are 1.3 million of them in ImageNet.
        if _is_picture(each.name) and not _is_folder(each):
            yield below
        elif not _is_folder(each):
            left_out.add(_kind(each), below)
        elif unwanted := _unwanted(each):
            left_out.add(unwanted, below)
        else:
            yield from _walk(each.path, below, seen, left_out)


def _entries(folder: str | Path) -> list[os.DirEntry]:
    # An entry knows its kind without asking the disk again.
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda each: each.name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def _is_wanted(entry: os.DirEntry) -> bool:
    return not _unwanted(entry) if _is_folder(entry) else _is_picture(entry.name)


def _unwanted(folder: os.DirEntry) -> str | None:
    """Why a folder is never looked into."""
    if folder.name.lower() in SYSTEM_FOLDERS:
        return "folders that systems make"
    return "hidden folders" if folder.name.startswith(".") else None


def _kind(entry: os.DirEntry) -> str:
    """What a file is that is not taken for a picture."""
    stem, ending = os.path.splitext(entry.name)
    if stem.startswith("."):
        return OTHER
    if not ending:
        return NO_ENDING if _begins_like_a_picture(entry) else OTHER
    return _NOT_READ.get(ending.lower(), OTHER)


def _begins_like_a_picture(entry: os.DirEntry) -> bool:
    try:
        if not entry.is_file():
            return False
        with open(entry.path, "rb") as stream:
            begin = stream.read(12)
    except OSError:
        return False
    return begin.startswith(_SIGNATURES) or begin[4:12] in (b"ftypheic", b"ftypavif", b"ftypmif1")


def labelled(root: Path, classes: Sequence[str], found: Mapping[str, Sequence[str]]) -> Pictures:
    """Pictures by class as one set, labels in the order of ``classes``."""
    counts = [len(found.get(name, ())) for name in classes]
    return Pictures(
        names=tuple(path for name in classes for path in found.get(name, ())),
        labels=np.repeat(np.arange(len(classes)), counts),
        root=root,
    )


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: naming a file that cannot be read or is no JSON.
    """
    try:
        return json.loads(_read_text(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error})") from None


def read_lines(file: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, stripped, each with its number from 1.

    Raises:
        InputError: naming a file that cannot be read, is no text, or holds nothing.
    """
    try:
        lines = _read_text(file).splitlines()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{file}: not a text file ({error})") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{file}: is empty")
    return found


def check_regular(file: Path) -> None:
    """Refuse what would block for ever or never end: pipes, devices.

    Raises:
        OSError: the file is missing, or neither a regular file nor a folder (which opening names).
    """
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))


def _read_text(file: Path) -> str:
    """UTF-8, without the signature that some editors write before it."""
    check_regular(file)
    return file.read_text(encoding="utf-8-sig")
