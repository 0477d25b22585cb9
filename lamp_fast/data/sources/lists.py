"""Lists of pictures as the long-tail field has them: a text file a part, ``path label`` a line."""

import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lamp_fast.data.entries import SPLIT_PARTS
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.sources.class_names import names_by_line
from lamp_fast.data.sources.files import check_files, path_below, read_lines
from lamp_fast.errors import InputError

# Paths may hold spaces, labels do not.
_LINE = re.compile(r"(.*[^ \t])[ \t]+([^ \t]+)")
# No data set has a label of more digits.
_LABEL = re.compile(r"\d{1,9}", re.ASCII)


@dataclass(frozen=True)
class PictureLists:
    """Lists of one's own.

    Attributes:
        files: the list of each part that there is: of train, val and test.
        names: the file of class names; None takes the folders of the pictures.
    """

    files: Mapping[str, Path]
    names: Path | None = None


def read_lists(
    root: Path, files: Mapping[str, Path], classes: int | None = None, named_in: Path | None = None
) -> dict[str, Pictures]:
    """The pictures that lists name, by part; a part without a list has none.

    Tabs, Windows' line ends, a signature before the text and empty lines are tolerated.

    Args:
        root: what paths start from.
        files: by part.
        classes: labels are below it; None leaves that open.
        named_in: the file that says so, for messages.

    Raises:
        InputError: a file that is missing, empty or no text; by line a row of another form, a label
            that is no integer from 0 or has no name, a path that leads out of the root, or a
            picture that is listed twice, in one part or in two; or missing pictures.
    """
    seen: dict[str, tuple[str, int]] = {}
    found: dict[str, Pictures] = {}
    for part, file in files.items():
        names, labels = [], []
        for number, line in read_lines(file):
            where = f"{file}: line {number}"
            row = _LINE.fullmatch(line)
            if row is None:
                raise InputError(f"{where} is {reprlib.repr(line)}, expected a path and its label")
            path, label = row.groups()
            if not _LABEL.fullmatch(label):
                raise InputError(
                    f"{where}: label {reprlib.repr(label)}, expected an integer from 0"
                )
            if classes is not None and int(label) >= classes:
                raise InputError(
                    f"{where}: label {int(label)}, expected 0..{classes - 1}, a label for each of"
                    f" the {classes} names of {named_in}"
                )
            relative = path_below(root, path, where)
            earlier = seen.setdefault(relative, (part, number))
            if earlier != (part, number):
                raise InputError(
                    f"{where} lists {path!r} again, after line {earlier[1]} of"
                    f" {files[earlier[0]]}; expected every picture once, in one part"
                )
            names.append(relative)
            labels.append(int(label))
        found[part] = Pictures(names=tuple(names), labels=np.array(labels, np.int64), root=root)
        # A link is the user's own: ImageNet's pictures often lie elsewhere.
        check_files(file, {part: found[part]}, links_may_leave=True)
    nothing = next(iter(found.values())).select([])
    return {part: found.get(part, nothing) for part in SPLIT_PARTS}


def folders_of_labels(parts: Mapping[str, Pictures]) -> dict[int, str | None]:
    """The name of the folder that all pictures of a label lie in, of every label, ascending.

    ``train/abbey/1.jpg`` and ``val/abbey/2.jpg`` lie in abbey. None where a label's pictures lie in
    differing folders or directly in the root.
    """
    found: dict[int, set[str]] = {}
    for pictures in parts.values():
        for path, label in zip(pictures.names, pictures.labels.tolist(), strict=True):
            found.setdefault(label, set()).add(os.path.basename(os.path.dirname(path)))
    return {
        label: next(iter(folders)) or None if len(folders) == 1 else None
        for label, folders in sorted(found.items())
    }


def check_gaps(file: Path, folders: Mapping[int, str | None], otherwise: str = "") -> None:
    """Labels are 0..C-1, every one with a picture.

    Args:
        file: what lists the first of them.
        folders: by label, ascending.
        otherwise: what else is expected, for the message.

    Raises:
        InputError: naming the file and the first label without one.
    """
    for expected, label in enumerate(folders):
        if label != expected:
            raise InputError(
                f"{file}: labels go up to {max(folders)} but {expected} is missing; expected"
                f" 0..C-1{otherwise}"
            )


def read_own_lists(
    lists: PictureLists, root: Path
) -> tuple[dict[str, Pictures], tuple[str, ...], bool]:
    """Pictures by part of lists of one's own, and what their classes are called.

    Returns:
        The parts; by label a class name, or without a file of names the folder of its pictures; and
        whether they are such folders.

    Raises:
        InputError: as :func:`read_lists` and :func:`names_by_line`; without a file of names labels
            that are not 0..C-1, or whose folders tell no class apart.
    """
    lines = None if lists.names is None else read_lines(lists.names)
    classes = None if lines is None else len(lines)
    parts = read_lists(root, lists.files, classes, lists.names)
    folders = folders_of_labels(parts)
    if lines is not None:
        return parts, names_by_line(lists.names, lines, folders), False
    first = next(iter(lists.files.values()))
    check_gaps(first, folders, ", or a file of --names for classes without pictures")
    owner: dict[str | None, int] = {None: -1}
    for label, folder in folders.items():
        other = owner.setdefault(folder, label)
        if other != label:
            why = (
                "lie in no folder of their own"
                if folder is None
                else f"lie in {folder!r} as those of label {other}"
            )
            raise InputError(
                f"--names: missing; the pictures of label {label} in {first} {why}, expected a file"
                " of class names"
            )
    return parts, tuple(folders.values()), True
