"""Data sets as they lie on disk: class names, a template, and pictures to train and test on."""

import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lamp_fast.data.pictures import Pictures
from lamp_fast.data.protocol import stratified_split
from lamp_fast.data.sources import catalog, digits, layouts
from lamp_fast.data.sources.catalog import CATALOG, DataSet
from lamp_fast.data.sources.files import (
    check_files,
    labelled,
    path_below,
    pictures_by_class,
    read_json,
    visible_folders,
)
from lamp_fast.data.sources.layouts import PARTS, SPLIT_SEED
from lamp_fast.data.sources.table import PART_OF, Table, read_table
from lamp_fast.errors import InputError

VAL_SHARE, TEST_SHARE = 0.2, 0.3
OWN_TEMPLATE = "a photo of a {}."
CLASS_NAMES_FILE = "classes.json"


@dataclass(frozen=True, eq=False)
class DataSource:
    """A data set before any protocol is applied.

    Attributes:
        name: what ``--data`` knows it by.
        classnames: C names; label l means ``classnames[l]``.
        template: class prompt with {} for the name.
        train, val, test: pictures with labels over all classes.
        augment: whether random crops and flips leave the classes what they are.
        drawn: parts that the data set does not have, drawn from its training pictures here.
        test_only: has nothing to train on, as the variants of ImageNet.
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


def load_source(
    name: str,
    root: str | Path | None,
    template: str | None = None,
    table: Table | None = None,
) -> DataSource:
    """Find a data set and list its pictures; no picture is read yet.

    Args:
        name: "digits", "folder", "table" or a data set of the catalog, in any of its spellings.
        root: the folder that holds the data set's folder (for "folder": the class folders; for
            "table": what its paths start from, by default the table's folder); unused for "digits".
        template: class prompt with {} for the name, in place of the data set's own.
        table: for "table" alone.

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
        source = _table(table, root)
    elif name == "folder":
        root = _checked_root(name, root, "a folder of pictures for each class")
        try:
            source = _folders(root)
        except OSError as error:
            raise InputError(f"--root {root}: cannot be read ({error})") from None
    elif known is not None:
        source = _named(known, _checked_root(name, root, f"{CATALOG[known].folder}/"))
    else:
        expected = ", ".join(("digits", "folder", "table", *CATALOG))
        raise InputError(f"--data {name}: expected one of {expected}")
    _check_classes(source, where, distinct=known is None or CATALOG[known].distinct_names)
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


def _named(name: str, root: Path) -> DataSource:
    entry = CATALOG[name]
    found = layouts.read(name, root)
    source = DataSource(
        name=name,
        classnames=found.classnames,
        template=entry.template,
        **found.parts,
        drawn=found.drawn,
        test_only=entry.test_only,
    )
    for line in _differences(source, entry):
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
    counts = tuple(len(getattr(source, part)) for part in PARTS)
    if (len(source.classnames), counts) != (entry.classes, entry.counts):
        here, published = (
            f"{classes:,} classes, {train:,} + {val:,} + {test:,} pictures"
            for classes, (train, val, test) in (
                (len(source.classnames), counts),
                (entry.classes, entry.counts),
            )
        )
        lines.append(f"{here} (train + val + test), published results have {published}")
    return lines


def _folders(root: Path) -> DataSource:
    # A data set of vehicles may have a class "train"; then it has other folders beside it.
    parts = {folder: PART_OF.get(folder.lower()) for folder in visible_folders(root)}
    if "train" in parts.values() and None not in parts.values():
        part, often = Counter(parts.values()).most_common(1)[0]
        if often > 1:
            both = " and ".join(folder for folder, of in parts.items() if of == part)
            raise InputError(f"--root {root}: {both}, expected one folder of the part {part}")
        found = {part: pictures_by_class(root, folder) for folder, part in parts.items()}
    else:
        found = {"train": pictures_by_class(root, "")}
    classes = sorted(set().union(*found.values()))
    if not classes:
        raise InputError(f"--root {root}: expected one folder of pictures a class")
    pictures = {part: labelled(root, classes, found.get(part, {})) for part in PARTS}
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
        path = path_below(root, row.path, f"{table.file}: row {number}")
        if first_row.setdefault(path, number) != number:
            raise InputError(
                f"{table.file}: row {number} lists {row.path!r} again, after row {first_row[path]};"
                " expected a row a picture"
            )
        found.setdefault(row.part or "train", {}).setdefault(row.label, []).append(path)
    pictures = {part: labelled(root, classes, found.get(part, {})) for part in PARTS}
    check_files(table.file, pictures)
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


def _names_of(root: Path, classes: list[str]) -> tuple[str, ...]:
    """Class names: of classes.json where it names the folder or label, else those themselves."""
    file = root / CLASS_NAMES_FILE
    given = read_json(file) if file.exists() else {}
    if not isinstance(given, dict) or not all(
        isinstance(name, str) and name.strip() for name in given.values()
    ):
        raise InputError(f"{file}: expected an object of folder: class name")
    unknown = sorted(given.keys() - set(classes))
    if unknown:
        raise InputError(f"{file}: names {unknown[0]!r}, which is no class of the data")
    return tuple(given.get(name, name.replace("_", " ")) for name in classes)


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


def _check_classes(source: DataSource, where: str, *, distinct: bool) -> None:
    """At least two classes, each with its own name and something to train on.

    Without training pictures something to test on takes its place; names may be shared where they
    are not to be ``distinct``.
    """
    names = source.classnames
    if len(names) < 2:
        raise InputError(f"{where}: expected at least 2 classes, found {list(names)}")
    name, often = Counter(names).most_common(1)[0]
    if distinct and often > 1:
        raise InputError(f"{where}: {often} classes are called {name!r}, expected distinct names")
    kind, needed = ("test", source.test) if source.test_only else ("training", source.train)
    counts = np.bincount(needed.labels, minlength=len(names))
    if (counts == 0).any():
        first = names[int(np.argmin(counts))]
        raise InputError(
            f"{where}: {(counts == 0).sum()} of {len(names)} classes have no {kind} picture,"
            f" first {first!r}"
        )
