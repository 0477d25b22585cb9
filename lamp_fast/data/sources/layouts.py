"""The layouts in which the catalog's data sets lie on disk, one reader each.

With its ``split_zhou_*.json`` a data set is read from that file alone. Without, it is read from its
official annotations by the rules that made those files; where these draw at random, the draw here
is our own (:data:`SPLIT_SEED`) and :attr:`Found.drawn` says so.
"""

import contextlib
import os
import re
import reprlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lamp_fast.data.catalog import CATALOG, images_folder, names_file
from lamp_fast.data.entries import SPLIT_PARTS, DataSet
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.protocol import stratified_split
from lamp_fast.data.sources import long_tail
from lamp_fast.data.sources.class_names import named, names_by_id, shown
from lamp_fast.data.sources.files import (
    Found,
    LeftOut,
    check_files,
    labelled,
    pictures_by_class,
    read_json,
    read_lines,
    visible_folders,
)
from lamp_fast.data.sources.matlab import read_variables
from lamp_fast.errors import InputError

# What has no split of its own is split alike in every run, whatever the run's seed.
SPLIT_SEED = 0
# Labels are 0..C-1; one beyond this belongs to no data set.
_MAX_CLASSES = 2**31

Row = tuple[str, int, str]


def missing(entry: DataSet, root: Path) -> list[str]:
    """What a data set lacks before it can be read, each as a path below ``root``.

    A folder ends in "/". Where a split file would do in place of official files, the line of the
    first of these says so.
    """
    if entry.layout == "cifar":
        return long_tail.missing_cifar(root / entry.folder, entry)
    folder = f"{entry.folder}/"
    inside = {
        "imagenet": [f"{entry.images}/train", f"{entry.images}/val"],
        "matlab annotations": ["cars_train", "cars_test"],
        "inaturalist": ["train_val2018"],
    }.get(entry.layout, [entry.images])
    folders = [f"{folder}{each}/" for each in inside]
    lacking = [each for each in folders if not (root / each).is_dir()]
    if entry.images_of is not None and lacking:
        elsewhere = images_folder(entry, root)
        instead = f"{lacking[0]} (or {elsewhere.relative_to(root)}/)"
        lacking = [] if elsewhere.is_dir() else [instead]
    if entry.split_file is not None and (root / entry.folder / entry.split_file).is_file():
        return lacking
    needed = [*entry.lists.values()]
    if entry.layout == "labelled lists":
        needed = [each for part, each in entry.lists.items() if part != "val"]
    if entry.class_list and not names_file(entry, root).is_file():
        needed = [entry.class_list, *needed]
    files = [f"{folder}{each}" for each in needed if not (root / entry.folder / each).is_file()]
    if files and entry.split_file is not None:
        files = [f"{folder}{entry.split_file} (or {', '.join(files)})"]
    return lacking + files


def read(name: str, root: Path, level: str | None = None, imb: float | None = None) -> Found:
    """List the pictures of a data set of the catalog.

    Args:
        name: the catalog's.
        root: the folder that holds the data set's folder.
        level: what labels are, of a data set that has levels; None takes its finest.
        imb: the imbalance ratio of a data set that is drawn by it here; None takes its default.

    Raises:
        InputError: what is missing or malformed, by file and line.
    """
    entry = CATALOG[name]
    lacking = missing(entry, root)
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise InputError(
            f"--root {root}: --data {name} needs {lacking[0]}{more} in it;"
            f" python -m lamp_fast.data --check {shlex.quote(str(root))} says more"
        )
    folder = root / entry.folder
    try:
        if entry.split_file is not None and (folder / entry.split_file).is_file():
            return _split_file(folder, entry)
        options = {"level": level or entry.levels[0]} if entry.levels else {}
        if entry.draws_tail:
            options["imb"] = imb or entry.protocol.imb
        return _READERS[entry.layout](folder, entry, **options)
    except OSError as error:
        raise InputError(f"--root {root}: cannot be read ({error})") from None


def _split_file(folder: Path, entry: DataSet) -> Found:
    file = folder / entry.split_file
    split = read_json(file)
    if not isinstance(split, dict) or not all(
        isinstance(split.get(part), list) for part in SPLIT_PARTS
    ):
        raise InputError(f"{file}: expected lists named {', '.join(SPLIT_PARTS)}")

    def rows(part: str) -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(split[part]):
            yield f"{part}[{number}]", row

    return _from_rows(folder / entry.images, {part: (file, rows(part)) for part in SPLIT_PARTS})


def _class_folders(folder: Path, entry: DataSet) -> Found:
    """A folder a class, without parts: 50% train, 20% val, 30% test of every class."""
    images = folder / entry.images
    left_out = LeftOut()
    found = pictures_by_class(images, "", left_out)
    classes = [name for name in sorted(found) if name not in entry.ignored]
    if not classes:
        raise InputError(f"{images}: expected one folder of pictures a class")
    names = [entry.renamed.get(name, name) for name in classes]
    listed = _drawn(shown(names), {"train": labelled(images, classes, found)})
    return replace(listed, notes=left_out.lines(every_file=False))


def _text_lists(folder: Path, entry: DataSet) -> Found:
    """A text file a part with a line a picture."""
    form = _LINES[entry.line]
    labels: dict[str, int] = {}
    if entry.class_list is not None:
        file = folder / entry.class_list
        for place, (number, line) in enumerate(read_lines(file)):
            with _explained(f"{file}: line {number}", line, form.class_form):
                key, label = form.read_class(line, place)
            labels[key] = label

    def rows(file: Path) -> Iterator[tuple[str, Row]]:
        for number, line in read_lines(file):
            with _explained(f"{file}: line {number}", line, form.form):
                row = form.read(line, labels)
            yield f"line {number}", row

    parts = {part: (folder / each, rows(folder / each)) for part, each in entry.lists.items()}
    return _from_rows(folder / entry.images, parts)


def _matlab_annotations(folder: Path, entry: DataSet) -> Found:
    """StanfordCars: a struct a picture with ``fname`` and ``class``, from 1."""
    files = {part: folder / each for part, each in entry.lists.items()}
    wanted = {folder / entry.class_list: "class_names"} | dict.fromkeys(
        files.values(), "annotations"
    )
    models, *annotations = read_variables(wanted)
    names = [_year_first(str(name)) for name in models]

    def rows(part: str, annotated: list[Any]) -> Iterator[tuple[str, Row]]:
        for number, each in enumerate(annotated, 1):
            where = f"annotation {number}"
            with _explained(f"{files[part]}: {where}", each, "a struct with fname and class"):
                label = int(each["class"]) - 1
                if label < 0 or not isinstance(each["fname"], str):
                    raise ValueError
                row = (f"cars_{part}/{each['fname']}", label, names[label])
            yield where, row

    parts = {
        part: (file, rows(part, each))
        for (part, file), each in zip(files.items(), annotations, strict=True)
    }
    return _from_rows(folder / entry.images, parts)


def _matlab_labels(folder: Path, entry: DataSet) -> Found:
    """Flowers102: label i, from 1, is of ``image_0000i.jpg``; no parts."""
    file = folder / entry.lists["train"]
    names = read_json(folder / entry.class_list)
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{folder / entry.class_list}: expected an object of label: class name")

    [labels] = read_variables({file: "labels"})

    def rows() -> Iterator[tuple[str, Row]]:
        for number, label in enumerate(labels, 1):
            with _explained(f"{file}: label {number}", label, f"one of {entry.class_list}"):
                row = (f"image_{number:05}.jpg", int(label) - 1, names[str(int(label))])
            yield f"label {number}", row

    return _from_rows(folder / entry.images, {"train": (file, rows())})


def _imagenet(folder: Path, entry: DataSet) -> Found:
    """``train`` and ``val`` by wnid, labels in the order of wnids; val is also the test set."""
    images, names = folder / entry.images, names_by_id(folder / entry.class_list)
    left_out = LeftOut()
    found = {part: pictures_by_class(images, part, left_out) for part in ("train", "val")}
    wnids = sorted(found["train"])
    odd = sorted(found["train"].keys() ^ found["val"].keys())
    if odd:
        # Labels are places in the sorted list: with different lists they would mean other classes.
        raise InputError(
            f"{images}: {odd[0]!r} is in {'train' if odd[0] in found['train'] else 'val'}/ alone"
            f" ({len(odd)} such); expected the same folders, one a wnid, in train/ and val/"
        )
    classnames = named(wnids, names, images)
    train, val = (labelled(images, wnids, found[part]) for part in ("train", "val"))
    parts = {"train": train, "val": val, "test": val}
    return Found(classnames, parts, notes=left_out.lines(every_file=False))


def _wnid_folders(folder: Path, entry: DataSet) -> Found:
    """A test set by wnid, over the classes that are there alone."""
    images = folder / entry.images
    names = names_by_id(names_file(entry, folder.parent))
    left_out = LeftOut()
    found = pictures_by_class(images, "", left_out)
    wnids = sorted(found)
    return _only_test(named(wnids, names, images), labelled(images, wnids, found), left_out)


def _numbered_folders(folder: Path, entry: DataSet) -> Found:
    """ImageNet-V2: folder i, from 0, holds the class of the i-th line of classnames.txt."""
    images, file = folder / entry.images, names_file(entry, folder.parent)
    names = list(names_by_id(file).values())
    expected = [str(number) for number in range(len(names))]
    odd = sorted(set(expected) ^ set(visible_folders(images)))
    if odd:
        raise InputError(
            f"{images}: folder {odd[0]!r} is {'missing' if odd[0] in expected else 'one too many'}"
            f" ({len(odd)} such); expected 0..{len(names) - 1}, a folder a line of {file}"
        )
    left_out = LeftOut()
    found = pictures_by_class(images, "", left_out)
    return _only_test(shown(names), labelled(images, expected, found), left_out)


_READERS: Mapping[str, Callable[..., Found]] = {
    "class folders": _class_folders,
    "text lists": _text_lists,
    "matlab annotations": _matlab_annotations,
    "matlab labels": _matlab_labels,
    "imagenet": _imagenet,
    "wnid folders": _wnid_folders,
    "numbered folders": _numbered_folders,
    "labelled lists": long_tail.read_labelled_lists,
    "inaturalist": long_tail.read_inaturalist,
    "cifar": long_tail.read_cifar,
}


@dataclass(frozen=True)
class _Line:
    """How a line of a text list is written, and one of the class list.

    Attributes:
        form: what a line looks like, for a message.
        read: from a line and the labels by class to path, label and name.
        class_form: what a line of the class list looks like.
        read_class: from such a line and its place, from 0, to class and label.
    """

    form: str
    read: Callable[[str, Mapping[str, int]], Row]
    class_form: str = ""
    read_class: Callable[[str, int], tuple[str, int]] = lambda line, place: (line, place)


def _pets(line: str, labels: Mapping[str, int]) -> Row:
    picture, label, _, _ = line.split(" ")
    breed, underscore, _ = picture.rpartition("_")
    if not underscore:
        raise ValueError
    return f"{picture}.jpg", int(label) - 1, breed.lower()


def _aircraft(line: str, labels: Mapping[str, int]) -> Row:
    picture, _, variant = line.partition(" ")
    return f"{picture}.jpg", labels[variant], variant


def _sun(line: str, labels: Mapping[str, int]) -> Row:
    # Class /c/church/indoor reads "indoor church": what specifies it comes first.
    slash, path = line[0], line[1:]
    if slash != "/":
        raise ValueError
    scene = os.path.dirname(path)
    return path, labels[f"/{scene}"], " ".join(reversed(scene.split("/")[1:]))


def _ucf(line: str, labels: Mapping[str, int]) -> Row:
    action, video = line.split(" ")[0].split("/")
    name = "_".join(re.findall("[A-Z][^A-Z]*", action))
    return f"{name}/{video.removesuffix('.avi')}.jpg", labels[action], name


def _ucf_class(line: str, place: int) -> tuple[str, int]:
    number, action = line.split(" ")
    return action, int(number) - 1


_LINES: Mapping[str, _Line] = {
    "pets": _Line("BREED_NUMBER CLASS SPECIES BREED", _pets),
    "aircraft": _Line("PICTURE VARIANT, a variant of variants.txt", _aircraft),
    "sun": _Line("/LETTER/SCENE/PICTURE.jpg, a scene of ClassName.txt", _sun),
    "ucf": _Line("ACTION/VIDEO.avi, an action of classInd.txt", _ucf, "NUMBER ACTION", _ucf_class),
}


@contextlib.contextmanager
def _explained(where: str, value: Any, expected: str) -> Iterator[None]:
    """A value of the wrong form becomes one line that says where and what."""
    try:
        yield
    except (ValueError, TypeError, LookupError):
        raise InputError(f"{where} is {reprlib.repr(value)}, expected {expected}") from None


def _year_first(name: str) -> str:
    """ "BMW X5 SUV 2007" as the peers prompt it: "2007 BMW X5 SUV"."""
    model, _, year = name.rpartition(" ")
    return f"{year} {model}".strip()


def _from_rows(images: Path, parts: Mapping[str, tuple[Path, Iterator[tuple[str, Any]]]]) -> Found:
    """Pictures from files that list [path, label, class name], each row with its place."""
    names: dict[int, str] = {}
    by_file: dict[Path, dict[str, Pictures]] = {}
    found: dict[str, Pictures] = {}
    for part, (file, rows) in parts.items():
        listed = [_checked_row(row, names, f"{file}: {place}") for place, row in rows]
        found[part] = Pictures(
            names=tuple(path for path, _, _ in listed),
            labels=np.array([label for _, label, _ in listed], dtype=np.int64),
            root=images,
        )
        by_file.setdefault(file, {})[part] = found[part]
    if sorted(names) != list(range(len(names))):
        gap = next(label for label in range(len(names)) if label not in names)
        raise InputError(
            f"{next(iter(by_file))}: labels go up to {max(names)} but {gap} is missing;"
            " expected 0..C-1"
        )
    for file, pictures in by_file.items():
        check_files(file, pictures)
    return _drawn(shown([names[label] for label in range(len(names))]), found)


def _checked_row(row: Any, names: dict[int, str], where: str) -> Row:
    """Check one ``[path, label, class name]`` and enter its class into ``names``."""
    if not (
        isinstance(row, (list, tuple))
        and [type(each) for each in row] == [str, int, str]
        and row[0]
        and 0 <= row[1] < _MAX_CLASSES
        and row[2].strip()
    ):
        raise InputError(f"{where} is {reprlib.repr(row)}, expected [path, label, class name]")
    path, label, name = row
    if os.path.isabs(path) or ".." in path.split("/"):
        raise InputError(f"{where} is {path!r}, expected a path inside the image folder")
    if names.setdefault(label, name) != name:
        raise InputError(f"{where} calls label {label} {name!r}, earlier rows {names[label]!r}")
    return path, label, name


def _drawn(classnames: tuple[str, ...], parts: dict[str, Pictures]) -> Found:
    """Draw the parts that are missing, in the shares of the published splits.

    Without a test part 50% train, 20% val and the rest test of every class; otherwise 20% of train
    become val.
    """
    if parts.keys() == set(SPLIT_PARTS):
        return Found(classnames, parts)
    whole = parts["train"]
    if "test" not in parts:
        test, train, val = stratified_split(whole.labels, (0.5, 0.2), SPLIT_SEED)
        drawn = {"train": train, "val": val, "test": test}
    else:
        train, val = stratified_split(whole.labels, (0.2,), SPLIT_SEED)
        drawn = {"train": train, "val": val}
    parts = parts | {part: whole.select(indices) for part, indices in drawn.items()}
    return Found(classnames, parts, tuple(part for part in drawn if part != "train"))


def _only_test(classnames: tuple[str, ...], test: Pictures, left_out: LeftOut) -> Found:
    nothing = test.select([])
    parts = {"train": nothing, "val": nothing, "test": test}
    return Found(classnames, parts, notes=left_out.lines(every_file=False))
