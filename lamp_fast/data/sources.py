"""Data sets as they lie on disk: class names, a template, and pictures to train and test on."""

import json
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lamp_fast.data import digits
from lamp_fast.data.catalog import SPLIT_FILE_DATA, SplitFileLayout
from lamp_fast.data.pictures import EXTENSIONS, Pictures
from lamp_fast.data.protocol import stratified_split
from lamp_fast.data.table import Table, read_table
from lamp_fast.errors import InputError

PARTS = ("train", "val", "test")
# Data sets without a split of their own are split alike in every run, whatever the run's seed.
SPLIT_SEED = 0
VAL_SHARE, TEST_SHARE = 0.2, 0.3
OWN_TEMPLATE = "a photo of a {}."
CLASS_NAMES_FILE = "classes.json"


@dataclass(frozen=True, eq=False)
class DataSource:
    """A data set before any protocol is applied.

    Attributes:
        name: as given to ``--data``.
        classnames: C names; label l means ``classnames[l]``.
        template: class prompt with {} for the name.
        train, val, test: pictures with labels over all classes.
        augment: whether random crops and flips leave the classes what they are.
        drawn: parts that the data set does not have, drawn from its training pictures here.
    """

    name: str
    classnames: tuple[str, ...]
    template: str
    train: Pictures
    val: Pictures
    test: Pictures
    augment: bool = True
    drawn: tuple[str, ...] = ()


def load_source(
    name: str,
    root: str | Path | None,
    template: str | None = None,
    table: Table | None = None,
) -> DataSource:
    """Find a data set and list its pictures; no picture is read yet.

    Args:
        name: "digits", "folder", "table" or a data set of the catalog.
        root: the folder that holds the data set's folder (for "folder": the class folders; for
            "table": what its paths start from, by default the table's folder); unused for "digits".
        template: class prompt with {} for the name, in place of the data set's own.
        table: for "table" alone.

    Raises:
        InputError: an unknown name, or a data set that is missing, incomplete or malformed.
    """
    where = f"--data {name}" if root is None else f"--root {root}"
    if name == "digits":
        source = _digits()
    elif name == "table":
        if table is None:
            raise InputError("--table: missing; --data table needs a .csv or .parquet file")
        where = f"--table {table.file}"
        source = _table(table, root)
    elif name == "folder":
        root = _checked_root(name, root, "a folder of pictures for each class")
        try:
            source = _folders(root)
        except OSError as error:
            raise InputError(f"--root {root}: cannot be read ({error})") from None
    elif name in SPLIT_FILE_DATA:
        layout = SPLIT_FILE_DATA[name]
        source = _split_file(name, _checked_root(name, root, f"{layout.folder}/"), layout)
    else:
        known = ", ".join(("digits", "folder", "table", *SPLIT_FILE_DATA))
        raise InputError(f"--data {name}: expected one of {known}")
    _check_classes(source, where)
    return source if template is None else replace(source, template=template)


def _digits() -> DataSource:
    # Here, because it takes a second and worker processes import this module too.
    from sklearn.datasets import load_digits

    scans = load_digits()
    pictures = Pictures(
        names=tuple(f"digits/{index}" for index in range(len(scans.target))),
        labels=scans.target,
        arrays=digits.to_pictures(scans.images),
    )
    train, val, test = stratified_split(pictures.labels, (VAL_SHARE, TEST_SHARE), SPLIT_SEED)
    return DataSource(
        name="digits",
        classnames=digits.NAMES,
        template=digits.TEMPLATE,
        train=pictures.select(train),
        val=pictures.select(val),
        test=pictures.select(test),
        augment=False,
        drawn=("val", "test"),
    )


def _split_file(name: str, root: Path, layout: SplitFileLayout) -> DataSource:
    folder = root / layout.folder
    file, images = folder / layout.split_file, folder / layout.images
    for place, there in ((folder, folder.is_dir()), (images, images.is_dir())):
        if not there:
            raise InputError(
                f"--root {root}: --data {name} needs the folder {place.relative_to(root)}/ in it"
            )
    split = _read_json(file)
    if not isinstance(split, dict) or not all(isinstance(split.get(part), list) for part in PARTS):
        raise InputError(f"{file}: expected lists named {', '.join(PARTS)}")
    names: dict[int, str] = {}
    for part in PARTS:
        for number, row in enumerate(split[part]):
            _check_row(row, names, f"{file}: {part}[{number}]")
    if sorted(names) != list(range(len(names))):
        missing = next(label for label in range(len(names)) if label not in names)
        raise InputError(
            f"{file}: labels go up to {max(names)} but {missing} is missing; expected 0..C-1"
        )
    pictures = {
        part: Pictures(
            names=tuple(path for path, _, _ in split[part]),
            labels=np.array([label for _, label, _ in split[part]], dtype=np.int64),
            root=images,
        )
        for part in PARTS
    }
    _check_files(file, pictures)
    return DataSource(
        name=name,
        classnames=tuple(names[label].replace("_", " ") for label in range(len(names))),
        template=layout.template,
        **pictures,
    )


def _check_row(row: Any, names: dict[int, str], where: str) -> None:
    """Check one ``[path, label, class name]`` and enter its class into ``names``."""
    if not (
        isinstance(row, list)
        and [type(each) for each in row] == [str, int, str]
        and row[0]
        and row[1] >= 0
        and row[2].strip()
    ):
        raise InputError(f"{where} is {reprlib.repr(row)}, expected [path, label, class name]")
    path, label, name = row
    if os.path.isabs(path) or ".." in path.split("/"):
        raise InputError(f"{where} is {path!r}, expected a path inside the image folder")
    if names.setdefault(label, name) != name:
        raise InputError(f"{where} calls label {label} {name!r}, earlier rows {names[label]!r}")


def _check_files(file: Path, pictures: Mapping[str, Pictures]) -> None:
    """Every picture that a split file lists is a file, and below the image folder.

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


def _folders(root: Path) -> DataSource:
    folders = _visible_folders(root)
    # A data set of vehicles may have a class "train"; then it has other folders beside it.
    presplit = "train" in folders and set(folders) <= set(PARTS)
    found = (
        {part: _pictures_by_class(root, part) for part in folders}
        if presplit
        else {"train": _pictures_by_class(root, "")}
    )
    classes = sorted(set().union(*found.values()))
    if not classes:
        raise InputError(f"--root {root}: expected one folder of pictures a class")
    pictures = {part: _labelled(root, classes, found.get(part, {})) for part in PARTS}
    pictures, drawn = _draw_missing_parts(pictures, found)
    return DataSource(
        name="folder",
        classnames=_names_of(root, classes),
        template=OWN_TEMPLATE,
        **pictures,
        drawn=drawn,
    )


def _draw_missing_parts(
    pictures: dict[str, Pictures], found: Collection[str]
) -> tuple[dict[str, Pictures], tuple[str, ...]]:
    """Without a test part, draw one, and a val part if that is missing too, from train."""
    if "test" in found:
        return pictures, ()
    drawn = ("test",) if "val" in found else ("test", "val")
    shares = {"test": TEST_SHARE, "val": VAL_SHARE}
    whole = pictures["train"]
    train, *others = stratified_split(whole.labels, [shares[part] for part in drawn], SPLIT_SEED)
    taken = {part: whole.select(indices) for part, indices in zip(drawn, others, strict=True)}
    pictures = pictures | {"train": whole.select(train)} | taken
    return pictures, tuple(part for part in PARTS if part in drawn)


def _table(table: Table, root: str | Path | None) -> DataSource:
    if root is None:
        root = table.file.parent
    else:
        root = _checked_root("table", root, "the pictures of the table")
    rows = read_table(table)
    classes = sorted({row.label for row in rows}, key=_numbers_in_order)
    found: dict[str, dict[str, list[str]]] = {}
    first_row: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        path = _path_below(root, row.path, f"{table.file}: row {number}")
        if first_row.setdefault(path, number) != number:
            raise InputError(
                f"{table.file}: row {number} lists {row.path!r} again, after row {first_row[path]};"
                " expected a row a picture"
            )
        found.setdefault(row.part or "train", {}).setdefault(row.label, []).append(path)
    pictures = {part: _labelled(root, classes, found.get(part, {})) for part in PARTS}
    _check_files(table.file, pictures)
    pictures, drawn = _draw_missing_parts(pictures, found)
    return DataSource(
        name="table",
        classnames=_names_of(root, classes),
        template=OWN_TEMPLATE,
        **pictures,
        drawn=drawn,
    )


def _numbers_in_order(label: str) -> tuple[bool, int, str]:
    """A sort key that has "10" after "9", and numbers before names."""
    number = label.isdecimal() and len(label) < 20
    return (not number, int(label) if number else 0, label)


def _path_below(root: Path, path: str, where: str) -> str:
    """A path relative to the root, refused where it leads elsewhere by its letters alone."""
    relative = os.path.relpath(path, os.path.abspath(root)) if os.path.isabs(path) else path
    relative = os.path.normpath(relative)
    if ".." in (*path.split("/"), *relative.split("/")) or relative == ".":
        raise InputError(f"{where}: path {path!r}, expected a path below {root} (see --root)")
    return relative


def _visible_folders(folder: Path) -> list[str]:
    return sorted(
        each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")
    )


def _pictures_by_class(root: Path, part: str) -> dict[str, list[str]]:
    """The pictures of every class folder below ``root / part``, as paths relative to ``root``."""
    return {
        name: sorted(
            str(path.relative_to(root)) for path in _pictures_below(root / part / name, set())
        )
        for name in _visible_folders(root / part)
    }


def _pictures_below(folder: Path, seen: set[str]) -> Iterator[Path]:
    """Picture files at any depth; links are followed, but no folder is entered twice."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _pictures_below(path, seen)
        elif path.suffix.lower() in EXTENSIONS:
            yield path


def _labelled(root: Path, classes: list[str], found: Mapping[str, list[str]]) -> Pictures:
    paths = [(path, label) for label, name in enumerate(classes) for path in found.get(name, [])]
    return Pictures(
        names=tuple(path for path, _ in paths),
        labels=np.array([label for _, label in paths], dtype=np.int64),
        root=root,
    )


def _names_of(root: Path, classes: list[str]) -> tuple[str, ...]:
    """Class names: of classes.json where it names the folder or label, else those themselves."""
    file = root / CLASS_NAMES_FILE
    given = _read_json(file) if file.exists() else {}
    if not isinstance(given, dict) or not all(
        isinstance(name, str) and name.strip() for name in given.values()
    ):
        raise InputError(f"{file}: expected an object of folder: class name")
    unknown = sorted(given.keys() - set(classes))
    if unknown:
        raise InputError(f"{file}: names {unknown[0]!r}, which is no class of the data")
    return tuple(given.get(name, name.replace("_", " ")) for name in classes)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error})") from None


def _checked_root(name: str, root: str | Path | None, holds: str) -> Path:
    if root is None:
        raise InputError(f"--root: missing; --data {name} needs the folder that holds {holds}")
    root = Path(root).expanduser()
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise InputError(f"--root {root}: {found}, expected the folder that holds {holds}")
    try:
        empty = next(root.iterdir(), None) is None
    except OSError as error:
        raise InputError(f"--root {root}: cannot be read ({error.strerror})") from None
    if empty:
        raise InputError(f"--root {root}: is empty, expected the folder that holds {holds}")
    return root


def _check_classes(source: DataSource, where: str) -> None:
    """At least two classes, each with its own name and something to train on."""
    names = source.classnames
    if len(names) < 2:
        raise InputError(f"{where}: expected at least 2 classes, found {list(names)}")
    name, often = Counter(names).most_common(1)[0]
    if often > 1:
        raise InputError(f"{where}: {often} classes are called {name!r}, expected distinct names")
    counts = np.bincount(source.train.labels, minlength=len(names))
    if (counts == 0).any():
        first = names[int(np.argmin(counts))]
        raise InputError(
            f"{where}: {(counts == 0).sum()} of {len(names)} classes have no training picture,"
            f" first {first!r}"
        )
