"""Files below a data root: listed fast, and never followed out of it."""

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lamp_fast.data.pictures import EXTENSIONS, Pictures
from lamp_fast.errors import InputError


def path_below(root: Path, path: str, where: str) -> str:
    """A path relative to the root, refused where it leads elsewhere by its letters alone."""
    relative = os.path.relpath(path, os.path.abspath(root)) if os.path.isabs(path) else path
    relative = os.path.normpath(relative)
    if ".." in (*path.split("/"), *relative.split("/")) or relative == ".":
        raise InputError(f"{where}: path {path!r}, expected a path below {root} (see --root)")
    return relative


def check_files(file: Path, pictures: Mapping[str, Pictures]) -> None:
    """Every picture that a file lists is a file, and below the image folder.

    Raises:
        InputError: a symbolic link that leads out, or missing files: the first and how many.
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
            if not real.startswith(os.path.join(images, "")):
                raise InputError(f"{file}: {relative!r} leads out of the image folder {each.root}")
            if not stat.S_ISREG(mode):
                missing.append(each.name(index))
    if missing:
        listed = sum(len(each) for each in pictures.values())
        raise InputError(
            f"{file}: {len(missing)} of the {listed} listed pictures are missing, first"
            f" {missing[0]!r}"
        )


def visible_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(each.name for each in entries if _visible(each) and each.is_dir())


def pictures_by_class(root: Path, part: str) -> dict[str, list[str]]:
    """The pictures of every class folder below ``root / part``, as paths relative to ``root``."""
    found = {}
    for name in visible_folders(root / part):
        relative = os.path.join(part, name)
        found[name] = sorted(_pictures_below(os.path.join(root, relative), relative, set()))
    return found


def _pictures_below(folder: str, relative: str, seen: set[str]) -> Iterator[str]:
    """Picture files at any depth; links are followed, but no folder is entered twice."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    # ImageNet has 1.3 million files: an entry knows its kind without asking the disk again.
    with os.scandir(folder) as entries:
        for each in entries:
            if not _visible(each):
                continue
            if each.is_dir():
                yield from _pictures_below(each.path, f"{relative}/{each.name}", seen)
            elif os.path.splitext(each.name)[1].lower() in EXTENSIONS:
                yield f"{relative}/{each.name}"


def _visible(entry: os.DirEntry) -> bool:
    return not entry.name.startswith(".")


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
        return json.loads(file.read_text(encoding="utf-8"))
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
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{file}: not a text file ({error})") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{file}: is empty")
    return found
