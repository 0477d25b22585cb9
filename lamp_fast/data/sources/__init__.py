"""Data sets as they lie on disk: class names, a template, and pictures to train and test on."""

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from lamp_fast.cli import expand_path
from lamp_fast.data import catalog
from lamp_fast.data.catalog import CATALOG
from lamp_fast.data.entries import OWN_DATA, DataSet
from lamp_fast.data.hierarchy import Hierarchy
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.protocol import stratified_split
from lamp_fast.data.sources import digits, layouts
from lamp_fast.data.sources.files import (
    CLASS_NAMES_FILE,
    LeftOut,
    check_files,
    count_beside,
    holds_only_folders,
    holds_pictures,
    labelled,
    path_below,
    pictures_by_class,
    read_json,
    visible_folders,
)
from lamp_fast.data.sources.layouts import SPLIT_PARTS, SPLIT_SEED
from lamp_fast.data.sources.lists import PictureLists, read_own_lists
from lamp_fast.data.sources.table import PART_OF, PictureTable, number_of, part_of, read_table
from lamp_fast.data.words import Words
from lamp_fast.errors import InputError

VAL_SHARE, TEST_SHARE = 0.2, 0.3
# In place of a part: pictures that are in none.
WHOLE = "whole"
OWN_TEMPLATE = "a photo of a {}."
# Beside other folders, a folder of pictures that is called so is a class; "test" is not.
CLASSES_LIKE_PARTS = ("train", "training", "valid")


@dataclass(frozen=True, eq=False)
class DataSource:
    """A data set before any protocol is applied.

    Attributes:
        name: what ``--data`` knows it by.
        classnames: C names; label l means ``classnames[l]``.
        template: class prompt with {} for the name.
        own_template: whether that is the data set's own, and not the user's.
        words: several texts a class, which the template is one of; None where it is the one.
        hierarchy: what classes are kinds of, where that is known.
        train, val, test: pictures with labels over all classes.
        augment: whether random crops and flips leave the classes what they are.
        drawn: parts that the data set does not have, drawn from its training pictures here.
        test_only: has nothing to train on, as the variants of ImageNet.
        notes: what a reader of a result must know of how the pictures were found, a line each.
        imb: the imbalance ratio of a long tail that ``train`` was drawn with already; None where it
            is what the data set has.
        group_counts: training pictures a class that the field makes its groups by size of, where
            these are not those of ``train``.
    """

    name: str
    classnames: tuple[str, ...]
    template: str
    train: Pictures
    val: Pictures
    test: Pictures
    augment: bool = True
    drawn: tuple[str, ...] = ()
    test_only: bool = False
    own_template: bool = True
    words: Words | None = None
    hierarchy: Hierarchy | None = None
    notes: tuple[str, ...] = ()
    imb: float | None = None
    group_counts: tuple[int, ...] | None = None


def load_source(
    name: str,
    root: str | Path | None,
    template: str | None = None,
    table: PictureTable | None = None,
    *,
    lists: PictureLists | None = None,
    level: str | None = None,
    imb: float | None = None,
    only_test: bool = False,
) -> DataSource:
    """Find a data set and list its pictures; no picture is read yet.

    Args:
        name: "digits", "folder", "table", "list" or a data set of the catalog, in any of its
            spellings.
        root: the folder that holds the data set's folder (for "folder": the class folders; for
            "table" and "list": what paths start from, by default the folder of the table or of the
            first list); unused for "digits".
        template: class prompt with {} for the name, in place of the data set's own.
        table: for "table" alone.
        lists: for "list" alone.
        level: what labels are, for a data set that has levels; by default its finest.
        imb: the imbalance ratio, for a data set that is drawn by it; by default its own.
        only_test: nothing will be trained on the data set. Pictures of "folder" and "table" without
            parts are then test pictures, all of them, and a test part needs no other beside it.

    Raises:
        InputError: an unknown name, or a data set that is missing, incomplete or malformed.
    """
    where = f"--data {name}" if root is None else f"--root {root}"
    known = catalog.find(name)
    if name == "digits":
        source = _digits()
    elif name == "table":
        if table is None:
            raise InputError("--table: missing; --data table needs a .csv or .parquet file")
        where = f"--table {table.file}"
        source = _table(table, root, only_test)
    elif name == "list":
        where = "--data list"
        source = _list(lists or PictureLists({}), root, only_test)
    elif name == "folder":
        root = _checked_root(name, root, "a folder of pictures for each class")
        try:
            source = _folders(root, only_test)
        except OSError as error:
            raise InputError(f"--root {root}: cannot be read ({error})") from None
    elif known is not None:
        source = _named(known, _checked_root(name, root, f"{CATALOG[known].folder}/"), level, imb)
    else:
        expected = ", ".join(("digits", *OWN_DATA, *CATALOG))
        raise InputError(f"--data {name}: expected one of {expected}")
    distinct = known is None or CATALOG[known].distinct_names
    _check_classes(source, where, distinct=distinct, only_test=only_test)
    if template is not None:
        source = replace(source, template=template, own_template=False)
    return source


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


def _named(name: str, root: Path, level: str | None, imb: float | None) -> DataSource:
    entry = CATALOG[name]
    found = layouts.read(name, root, level, imb)
    source = DataSource(
        name=name,
        classnames=found.classnames,
        template=entry.template,
        **found.parts,
        drawn=found.drawn,
        test_only=entry.test_only,
        notes=found.left_out,
        imb=found.imb,
        group_counts=found.group_counts,
    )
    # Of a coarser level nothing is published that we know of.
    published = level is None or level == entry.levels[0]
    for line in _differences(source, entry) if published else ():
        warnings.warn(f"--data {name}: {line}", stacklevel=3)
    return source


def _differences(source: DataSource, entry: DataSet) -> list[str]:
    """What keeps results from being comparable with published ones, a line each.

    Not refused: a part of a data set is one to train on, too, and its labels are right.
    """
    lines = []
    if source.drawn:
        lines.append(
            f"{entry.split_file} is missing, so {' and '.join(source.drawn)} are drawn here: alike"
            " in every run, but not the published draw"
        )
    counts = tuple(len(getattr(source, part)) for part in SPLIT_PARTS)
    train, *others = entry.counts
    # Of a long tail that is drawn here, only that of the default ratio is noted.
    published = (train if source.imb in (None, entry.protocol.imb) else None, *others)
    differ = any(known not in (None, here) for known, here in zip(published, counts, strict=True))
    if differ or len(source.classnames) != entry.classes:
        here, there = (
            f"{classes:,} classes, {' + '.join('?' if n is None else f'{n:,}' for n in each)}"
            " pictures"
            for classes, each in (
                (len(source.classnames), counts),
                (entry.classes, published),
            )
        )
        lines.append(f"{here} (train + val + test), published results have {there}")
    return lines


def _folders(root: Path, only_test: bool) -> DataSource:
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
    pictures, drawn, notes = _settle_parts(pictures, only_test)
    return DataSource(
        name="folder",
        classnames=_names_of(root, classes),
        template=OWN_TEMPLATE,
        **pictures,
        drawn=drawn,
        notes=(*notes, *left_out.lines()),
    )


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


def _settle_parts(
    found: dict[str, Pictures], only_test: bool
) -> tuple[dict[str, Pictures], tuple[str, ...], tuple[str, ...]]:
    """Train, val and test of the parts that there are, under :data:`WHOLE` what is in no part.

    Returns:
        The pictures of each part, the parts that were drawn, and notes.
    """
    whole = found.get(WHOLE, found.get("train"))
    nothing = next(iter(found.values())).select([])
    parts = dict.fromkeys(SPLIT_PARTS, nothing) | {
        part: found[part] for part in SPLIT_PARTS if part in found
    }
    if "test" in found:
        return parts, (), ()
    if "val" in found:
        # Whoever keeps pictures apart means them to be tested on, as in ImageNet.
        parts |= {"val": nothing, "test": found["val"]}
        return parts, (), ("the val pictures are the test set, for there is no test part",)
    if only_test:
        parts |= {"train": nothing, "test": whole}
        return parts, (), ("all pictures are the test set, for there is no test part",)
    shares = {"test": TEST_SHARE, "val": VAL_SHARE}
    train, *others = stratified_split(whole.labels, list(shares.values()), SPLIT_SEED)
    taken = {part: whole.select(indices) for part, indices in zip(shares, others, strict=True)}
    return {"train": whole.select(train), **taken}, ("val", "test"), ()


def _table(table: PictureTable, root: str | Path | None, only_test: bool) -> DataSource:
    if root is None:
        root = table.file.parent
    else:
        root = _checked_root("table", root, "the pictures of the table")
    rows, own_names = read_table(table)
    classes = sorted({row.label for row in rows}, key=_numbers_in_order)
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
    pictures, drawn, notes = _settle_parts(pictures, only_test)
    return DataSource(
        name="table",
        classnames=_names_of(root, classes, own_names),
        template=OWN_TEMPLATE,
        **pictures,
        drawn=drawn,
        notes=notes,
    )


def _list(lists: PictureLists, root: str | Path | None, only_test: bool) -> DataSource:
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
        root = _checked_root("list", root, "the pictures of the lists")
    parts, names, are_folders = read_own_lists(lists, root)
    return DataSource(
        name="list",
        classnames=_names_of(root, list(names)) if are_folders else names,
        template=OWN_TEMPLATE,
        **parts,
    )


def _numbers_in_order(label: str) -> tuple[bool, int, str]:
    """A sort key that has "10" after "9", and numbers before names."""
    number = number_of(label)
    return (number is None, number or 0, label)


def _names_of(
    root: Path, classes: list[str], own: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, ...]:
    """Class names: of classes.json where it names the folder or label, else the data's ``own``.

    Where it has none, the folders or labels themselves.
    """
    file = root / CLASS_NAMES_FILE
    given = read_json(file) if file.exists() else {}
    if not isinstance(given, dict) or not all(
        isinstance(name, str) and name.strip() for name in given.values()
    ):
        raise InputError(f"{file}: expected an object of folder: class name")
    unknown = sorted(given.keys() - set(classes))
    if unknown:
        raise InputError(f"{file}: names {unknown[0]!r}, which is no class of the data")
    return tuple(given.get(name, own.get(name, name.replace("_", " "))) for name in classes)


def _checked_root(name: str, root: str | Path | None, holds: str) -> Path:
    if root is None:
        raise InputError(f"--root: missing; --data {name} needs the folder that holds {holds}")
    root = expand_path(root)
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


def _check_classes(source: DataSource, where: str, *, distinct: bool, only_test: bool) -> None:
    """At least two classes, each with its own name and something to train on.

    Without training pictures something to test on takes its place; names may be shared where they
    are not to be ``distinct``. Of one's own data a class to be tested needs no picture.
    """
    names = source.classnames
    if len(names) < 2:
        raise InputError(f"{where}: expected at least 2 classes, found {list(names)}")
    name, often = Counter(names).most_common(1)[0]
    if distinct and often > 1:
        raise InputError(f"{where}: {often} classes are called {name!r}, expected distinct names")
    if only_test and source.name in OWN_DATA:
        return
    kind, needed = ("test", source.test) if source.test_only else ("training", source.train)
    if not len(needed) and not source.test_only and len(source.test):
        raise InputError(
            f"{where}: has test pictures alone, expected some to train on;"
            f" python -m lamp_fast.evaluate RUN --data {source.name} tests on them"
        )
    counts = np.bincount(needed.labels, minlength=len(names))
    if (counts == 0).any():
        first = names[int(np.argmin(counts))]
        raise InputError(
            f"{where}: {(counts == 0).sum()} of {len(names)} classes have no {kind} picture,"
            f" first {first!r}"
        )
