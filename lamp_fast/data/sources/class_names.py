"""Class names as files give them: a line a class, alone or behind an id."""

import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from lamp_fast.data.sources.files import read_lines
from lamp_fast.errors import InputError

_WNID = re.compile(r"n\d{8}", re.ASCII)
_SPACE = re.compile(r"[ \t]+")

Lines = Sequence[tuple[int, str]]


def shown(names: Sequence[str]) -> tuple[str, ...]:
    """Class names as prompts have them."""
    return tuple(name.replace("_", " ") for name in names)


def names_by_id(file: Path) -> dict[str, str]:
    """The names of a file with ``id name`` a line, by id, in order.

    Raises:
        InputError: a line without a name, or an id that is there twice.
    """
    names: dict[str, str] = {}
    for number, line in read_lines(file):
        key, *name = _SPACE.split(line, maxsplit=1)
        if not name or key in names:
            raise InputError(f"{file}: line {number} is {line!r}, expected a new id and its name")
        names[key] = name[0]
    return names


def named(folders: Sequence[str], names: Mapping[str, str], images: Path) -> tuple[str, ...]:
    """The names of class folders that are ids; see :func:`names_by_id`.

    Raises:
        InputError: a folder without a name.
    """
    for folder in folders:
        if folder not in names:
            raise InputError(f"{images}: folder {folder!r} is no id of the file of class names")
    return shown([names[folder] for folder in folders])


def names_by_line(file: Path, lines: Lines, folders: Mapping[int, str | None]) -> tuple[str, ...]:
    """Names of labels, the first line of label 0: ``id name`` a line, or the name alone.

    First words are ids, and no part of the names, where every line has more behind them and they
    are all WordNet's (n01440764), or the folders of the labels' pictures, or the labels themselves,
    or the names once more (amusement_park amusement park), or set off by a tab.

    Args:
        file: what the lines are of.
        lines: see :func:`read_lines`.
        folders: of each label that has pictures, the folder of all of them; None without such.

    Raises:
        InputError: an id that is there twice, or one that is the folder of another label.
    """
    split = [_SPACE.split(line, maxsplit=1) for _, line in lines]
    wordnet = [_WNID.fullmatch(words[0]) is not None for words in split]
    for (number, line), words, each in zip(lines, split, wordnet, strict=True):
        if sum(wordnet) * 2 > len(lines) and (not each or len(words) < 2):
            raise InputError(
                f"{file}: line {number} is {reprlib.repr(line)}, expected an id of WordNet and a"
                " name, as in most lines"
            )
    if not _begin_with_ids(lines, split, wordnet, folders):
        return shown([line for _, line in lines])
    line_of: dict[str, int] = {}
    for (number, _), (key, _) in zip(lines, split, strict=True):
        if line_of.setdefault(key, number) != number:
            raise InputError(
                f"{file}: line {number} has the id {key!r} again, after line {line_of[key]}"
            )
    for label, folder in folders.items():
        key, number = split[label][0], lines[label][0]
        if folder in line_of and key != folder:
            raise InputError(
                f"{file}: line {number} names {key!r}, but the pictures of label {label} lie in"
                f" {folder!r}; expected the names in the order of the labels"
            )
    return shown([name for _, name in split])


def _begin_with_ids(
    lines: Lines,
    split: Sequence[Sequence[str]],
    wordnet: Sequence[bool],
    folders: Mapping[int, str | None],
) -> bool:
    if not all(len(words) == 2 for words in split):
        return False
    first = [words[0] for words in split]
    return (
        all(wordnet)
        or all("\t" in line for _, line in lines)
        or (bool(folders) and set(folders.values()) <= set(first))
        or first in ([str(number + base) for number in range(len(first))] for base in (0, 1))
        or all(key.replace("_", " ") == name.replace("_", " ") for key, name in split)
    )
