"""A user's own pictures: folders, tables, lists, WebDataset's shards, Hugging Face datasets."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lamp_fast.data.entries import SPLIT_PARTS
from lamp_fast.data.sources.files import (
    Found,
    LeftOut,
    check_files,
    count_beside,
    holds_only_folders,
    holds_pictures,
    labelled,
    path_below,
    pictures_by_class,
    visible_folders,
)
from lamp_fast.data.sources.lists import PictureLists, read_own_lists
from lamp_fast.data.sources.own_parts import (
    WHOLE,
    checked_root,
    names_of,
    numbers_in_order,
    settle_parts,
)
from lamp_fast.data.sources.table import PART_OF, PictureTable, part_of, read_table
from lamp_fast.data.sources.within import read_dataset, read_shards
from lamp_fast.errors import InputError

# Beside other folders, a folder of pictures that is called so is a class; "test" is not.
CLASSES_LIKE_PARTS = ("train", "training", "valid")


@dataclass(frozen=True)
class OwnPictures:
    """What a command line says of one's own pictures.

    See :class:`lamp_fast.data.settings.DataConfig`.

    Attributes:
        root: a folder, or what else the kind of data set is named by.
        table: for "table".
        lists: text files for "list"; for "webdataset" the shards of each part, and the names.
        path_column, label_column: of "hf"; of "webdataset" the ending or field of labels.
    """

    root: Path | None = None
    table: PictureTable | None = None
    lists: PictureLists = field(default_factory=lambda: PictureLists({}))
    path_column: str = "path"
    label_column: str = "label"


def read_own(name: str, own: OwnPictures, only_test: bool) -> tuple[Found, str]:
    """List pictures of one's own, of one of :data:`lamp_fast.data.entries.OWN_DATA`.

    Returns:
        What was found, and the flag and value that named it.

    Raises:
        InputError: what is missing, malformed or unclear.
    """
    if name == "table":
        if own.table is None:
            raise InputError("--table: missing; --data table needs a .csv or .parquet file")
        return _table(own.table, own.root, only_test), f"--table {own.table.file}"
    if name == "list":
        return _list(own.lists, own.root, only_test), "--data list"
    if name == "webdataset":
        where = "--data webdataset" if own.root is None else f"--root {own.root}"
        found = read_shards(own.root, own.lists.files, own.lists.names, own.label_column, only_test)
        return found, where
    if name == "hf":
        columns = own.path_column, own.label_column
        found = read_dataset(own.root, own.lists.names, *columns, only_test)
        return found, f"--root {own.root}"
    root = checked_root(name, own.root, "a folder of pictures for each class")
    try:
        return _folders(root, only_test), f"--root {root}"
    except OSError as error:
        raise InputError(f"--root {root}: cannot be read ({error})") from None


def _folders(root: Path, only_test: bool) -> Found:
    left_out = LeftOut()
    folders = _part_folders(root)
    if folders:
        count_beside(root, "", left_out)
        found = {
            part: pictures_by_class(root, folder, left_out) for part, folder in folders.items()
        }
        for name in visible_folders(root):
            if name not in folders.values():
                left_out.add("folders without pictures beside the parts", name)
    else:
        found = {WHOLE: pictures_by_class(root, "", left_out)}
    classes = sorted(set().union(*found.values()))
    if not classes:
        raise InputError(f"--root {root}: expected one folder of pictures a class")
    pictures = {part: labelled(root, classes, each) for part, each in found.items()}
    pictures, drawn, notes = settle_parts(pictures, only_test)
    return Found(names_of(root, classes), pictures, drawn, (*notes, *left_out.lines()))


def _part_folders(root: Path) -> dict[str, str]:
    """The folder of each part; empty where the folders are classes.

    Raises:
        InputError: folders that look like parts and are not clear. As classes they would train
            without a word.
    """
    folders = visible_folders(root)
    parts = {name: part_of(name) for name in folders if part_of(name)}
    others = [name for name in folders if name not in parts]
    if parts:
        others = [name for name in others if holds_pictures(root, name)]
    if parts and not others:
        part, often = Counter(parts.values()).most_common(1)[0]
        if often > 1:
            both = " and ".join(name for name, of in parts.items() if of == part)
            raise InputError(f"--root {root}: {both}, expected one folder of the part {part}")
        for name in parts:
            if not visible_folders(root / name) and holds_pictures(root, name):
                raise InputError(
                    f"--root {root}: {name} holds pictures of no class, expected a folder a class"
                    " in it"
                )
        return {part: name for name, part in parts.items()}
    unclear = [name for name in folders if _looks_like_a_part(root / name)]
    if len(set(parts.values())) > 1:
        unclear = sorted({*unclear, *parts})
    if unclear:
        like = "looks like a part" if len(unclear) == 1 else "look like parts"
        beside = next((f" beside {name}" for name in others if name not in unclear), "")
        raise InputError(
            f"--root {root}: {', '.join(unclear)} {like}{beside}; expected folders called train,"
            " val and test and nothing else, or classes alone (or say with --data table what each"
            " picture is)"
        )
    return {}


def _looks_like_a_part(folder: Path) -> bool:
    """By its name, where what it holds does not make it a class of that name."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+", folder.name)
    if part_of(folder.name) and folder.name.lower() not in CLASSES_LIKE_PARTS:
        return True
    named = any(word.lower() in PART_OF or part_of(word) for word in words)
    return named and holds_only_folders(folder)


def _table(table: PictureTable, root: str | Path | None, only_test: bool) -> Found:
    if root is None:
        root = table.file.parent
    else:
        root = checked_root("table", root, "the pictures of the table")
    rows, own_names = read_table(table)
    classes = sorted({row.label for row in rows}, key=numbers_in_order)
    found: dict[str, dict[str, list[str]]] = {}
    first_row: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        path = path_below(root, row.path, f"{table.file}: row {number}")
        if first_row.setdefault(path, number) != number:
            raise InputError(
                f"{table.file}: row {number} lists {row.path!r} again, after row {first_row[path]};"
                " expected a row a picture"
            )
        found.setdefault(row.part or WHOLE, {}).setdefault(row.label, []).append(path)
    pictures = {part: labelled(root, classes, each) for part, each in found.items()}
    check_files(table.file, pictures, links_may_leave=True)
    pictures, drawn, notes = settle_parts(pictures, only_test)
    return Found(names_of(root, classes, own_names), pictures, drawn, notes)


def _list(lists: PictureLists, root: str | Path | None, only_test: bool) -> Found:
    files = {f"--{part}": lists.files.get(part) for part in SPLIT_PARTS}
    for flag, needed in (("--train", not only_test), ("--test", True)):
        if needed and files[flag] is None:
            raise InputError(f"{flag}: missing; --data list needs a text file of pictures")
    for flag, file in {**files, "--names": lists.names}.items():
        if file is not None and not file.is_file():
            found = "is a folder" if file.is_dir() else "does not exist"
            raise InputError(f"{flag} {file}: {found}, expected a text file")
    if root is None:
        root = next(file.parent for file in files.values() if file is not None)
    else:
        root = checked_root("list", root, "the pictures of the lists")
    parts, names, are_folders = read_own_lists(lists, root)
    return Found(names_of(root, list(names)) if are_folders else names, parts)
