"""Data sets as they lie on disk: class names, a template, and pictures to train and test on."""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lamp_fast.data import catalog
from lamp_fast.data.catalog import CATALOG
from lamp_fast.data.entries import OWN_DATA, SPLIT_PARTS, DataSet
from lamp_fast.data.hierarchy import Hierarchy
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.protocol import stratified_split
from lamp_fast.data.sources import digits, layouts
from lamp_fast.data.sources.layouts import SPLIT_SEED
from lamp_fast.data.sources.lists import PictureLists
from lamp_fast.data.sources.own import OwnPictures, read_own
from lamp_fast.data.sources.own_parts import TEST_SHARE, VAL_SHARE, checked_root
from lamp_fast.data.sources.table import PictureTable
from lamp_fast.data.words import Words
from lamp_fast.errors import InputError

OWN_TEMPLATE = "a photo of a {}."


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
        excluded: names of the pictures that were left out of each part because a user said so.
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
    excluded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def load_source(
    name: str,
    root: str | Path | None,
    template: str | None = None,
    table: PictureTable | None = None,
    *,
    lists: PictureLists | None = None,
    path_column: str = OwnPictures.path_column,
    label_column: str = OwnPictures.label_column,
    level: str | None = None,
    imb: float | None = None,
    only_test: bool = False,
) -> DataSource:
    """Find a data set and list its pictures; no picture is read yet.

    Args:
        name: "digits", "folder", "table", "list", "webdataset", "hf" or a data set of the catalog,
            in any of its spellings.
        root: the folder that holds the data set's folder (for "folder": the class folders; for
            "table" and "list": what paths start from, by default the folder of the table or of the
            first list; for "webdataset": shards, or a folder of them; for "hf": the name of a
            dataset on the hub, or its folder); unused for "digits".
        template: class prompt with {} for the name, in place of the data set's own.
        table: for "table" alone.
        lists: for "list"; for "webdataset" the shards of each part, in place of ``root``, and the
            file of class names, which "hf" takes, too.
        path_column: for "hf", the column of pictures.
        label_column: for "hf", and for "webdataset" the ending or field of labels.
        level: what labels are, for a data set that has levels; by default its finest.
        imb: the imbalance ratio, for a data set that is drawn by it; by default its own.
        only_test: nothing will be trained on the data set. One's own pictures without
            parts are then test pictures, all of them, and a test part needs no other beside it.

    Raises:
        InputError: an unknown name, or a data set that is missing, incomplete or malformed.
    """
    own = OwnPictures(
        None if root is None else Path(root),
        table,
        lists or PictureLists({}),
        path_column,
        label_column,
    )
    where = f"--data {name}" if root is None else f"--root {root}"
    known = catalog.find(name)
    if name == "digits":
        source = _digits()
    elif name in OWN_DATA:
        found, where = read_own(name, own, only_test)
        source = DataSource(
            name=name,
            classnames=found.classnames,
            template=OWN_TEMPLATE,
            **found.parts,
            drawn=found.drawn,
            notes=found.notes,
        )
    elif known is not None:
        root = checked_root(name, root, f"{CATALOG[known].folder}/")
        source = _named(known, root, level, imb)
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
        notes=found.notes,
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
