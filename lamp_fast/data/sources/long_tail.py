"""The long-tail field's data sets on disk: published lists, iNaturalist's categories, CIFAR-100.

Their training pictures are long-tailed already. Those of CIFAR-100-LT are drawn here, as the field
draws them: see :func:`lamp_fast.data.protocol.label_order_tail`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lamp_fast.data.catalog import images_folder, names_file
from lamp_fast.data.entries import DataSet
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.protocol import label_order_tail
from lamp_fast.data.sources.class_names import named, names_by_id, shown
from lamp_fast.data.sources.files import (
    Found,
    LeftOut,
    check_regular,
    labelled,
    pictures_by_class,
    read_json,
    read_lines,
)
from lamp_fast.data.sources.lists import check_gaps, folders_of_labels, read_lists
from lamp_fast.errors import InputError

# A record of CIFAR-100's binary version: a coarse label, the fine one, 32 x 32 pixels by channel.
_SIDE = 32
_RECORD = 2 + 3 * _SIDE**2
_PICKLED = ("cifar-100-python", "train", "test", "meta")


def read_labelled_lists(folder: Path, entry: DataSet) -> Found:
    """ImageNet-LT, Places-LT: a list a part; the folder of a label's pictures is its class's id."""
    images = images_folder(entry, folder.parent)
    names = names_by_id(names_file(entry, folder.parent))
    files = {part: folder / each for part, each in entry.lists.items()}
    # Not all who publish the lists have that of val, which nothing is trained on.
    files = {part: file for part, file in files.items() if part != "val" or file.is_file()}
    parts = read_lists(images, files)
    folders = folders_of_labels(parts)
    first = next(iter(files.values()))
    check_gaps(first, folders)
    owner: dict[str, int] = {}
    for label, each in folders.items():
        if each is None or owner.setdefault(each, label) != label:
            raise InputError(
                f"{first}: the pictures of label {label} lie in no folder of their own, expected a"
                " folder a class"
            )
    return Found(named([*folders.values()], names, images), parts)


def read_inaturalist(folder: Path, entry: DataSet, level: str) -> Found:
    """iNaturalist: labels are categories of ``categories.json``, or what these belong to.

    Args:
        folder: of the data set.
        entry: of the catalog.
        level: one of the entry's levels.
    """
    file = folder / entry.class_list
    categories = _categories(file, entry.levels[0])
    files = {part: folder / each for part, each in entry.lists.items()}
    parts = read_lists(folder, files, len(categories), file)
    if level == entry.levels[0]:
        return Found(_told_apart([_lineage(each, entry.levels) for each in categories]), parts)
    wanted = entry.levels[entry.levels.index(level) :]
    lineages = []
    for number, category in enumerate(categories):
        if _text(category, level) is None:
            raise InputError(f"{file}: category {number} has no {level}, expected its name")
        lineages.append(_lineage(category, wanted))
    # One name may be given to a genus of animals and to one of plants.
    groups = sorted(set(lineages))
    place = {lineage: label for label, lineage in enumerate(groups)}
    mapping = {species: place[lineage] for species, lineage in enumerate(lineages)}
    return Found(_told_apart(groups), {part: each.relabel(mapping) for part, each in parts.items()})


def _categories(file: Path, species: str) -> list[Mapping[str, Any]]:
    """iNaturalist's categories by id, 0..C-1; what is called "name" there is the species."""
    listed = read_json(file)
    expected = "expected a list of objects with an id, 0..C-1, and a name"
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{file}: {expected}")
    found: dict[int, Mapping[str, Any]] = {}
    for place, category in enumerate(listed):
        where = f"{file}: entry {place}"
        if not isinstance(category, dict) or type(category.get("id")) is not int:
            raise InputError(f"{where} has no id, {expected}")
        number = category["id"]
        if not 0 <= number < len(listed) or number in found:
            raise InputError(f"{where} has the id {number}, {expected}")
        if _text(category, "name") is None:
            raise InputError(f"{where} has no name, {expected}")
        found[number] = {**category, species: category["name"]}
    return [found[number] for number in range(len(found))]


def _text(category: Mapping[str, Any], field: str) -> str | None:
    value = category.get(field)
    return value.strip() if isinstance(value, str) and value.strip() else None


def _lineage(category: Mapping[str, Any], levels: Sequence[str]) -> tuple[str, ...]:
    """Names from the finest level upwards; "" where a category has none."""
    return tuple(_text(category, level) or "" for level in levels)


def _told_apart(lineages: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The first name of each lineage, with the next higher one that differs where two are alike."""
    names = [lineage[0] for lineage in lineages]
    for height in range(1, max(map(len, lineages))):
        often = Counter(names)
        names = [
            f"{lineage[0]} ({lineage[height]})" if often[name] > 1 and lineage[height] else name
            for name, lineage in zip(names, lineages, strict=True)
        ]
    return shown(names)


def missing_cifar(folder: Path, entry: DataSet) -> list[str]:
    """What CIFAR-100 lacks before it can be read, as paths below the root."""
    if _has_class_folders(folder):
        return []
    lacking = [
        f"{entry.folder}/{each}" for each in entry.annotations if not (folder / each).is_file()
    ]
    if lacking:
        pickled = [each for each in _PICKLED if _is_pickled(folder, each)]
        also = " (or class folders in train/ and test/)"
        if pickled:
            also = (
                f" of the binary version ({pickled[0]} is of the python version, pickles, which can"
                f" run any code when they are read; get cifar-100-binary.tar.gz from {entry.home})"
            )
        lacking[0] += also
    return lacking


def _is_pickled(folder: Path, name: str) -> bool:
    if name == _PICKLED[0]:
        return any((place / name).is_dir() for place in (folder, folder.parent))
    return (folder / name).is_file()


def _has_class_folders(folder: Path) -> bool:
    return all((folder / part).is_dir() for part in ("train", "test"))


def read_cifar(folder: Path, entry: DataSet, imb: float) -> Found:
    """CIFAR-100 with its training pictures thinned out in the order of labels.

    Args:
        folder: of the data set, with the binary version's files, or with class folders in ``train``
            and ``test``, whose pictures are drawn in the order of their names.
        entry: of the catalog.
        imb: the first class's pictures over the last one's.
    """
    if _has_class_folders(folder):
        return _cifar_folders(folder, entry, imb)
    names = shown([line for _, line in read_lines(folder / entry.class_list)])
    parts = {part: _records(folder / each, len(names)) for part, each in entry.lists.items()}
    kept, group_counts = _thinned(parts["train"][:, 1], entry, imb)
    train, test = (
        Pictures(
            names=tuple(f"{part}/{index}" for index in indices.tolist()),
            labels=parts[part][indices, 1],
            # By channel in the file, by pixel here.
            arrays=parts[part][indices, 2:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1),
        )
        for part, indices in (("train", kept), ("test", np.arange(len(parts["test"]))))
    )
    parts = {"train": train, "val": test.select([]), "test": test}
    return Found(names, parts, imb=imb, group_counts=group_counts)


def _thinned(
    labels: np.ndarray, entry: DataSet, imb: float
) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """The pictures to keep, and the counts that LIFT groups the classes of every ratio by.

    These are of the default ratio, where the field's three groups are of about one size. None where
    they are the classes' own, or nothing is thinned out.
    """
    kept = label_order_tail(labels, imb)
    if imb in (1, entry.protocol.imb):
        return kept, None
    return kept, tuple(np.bincount(labels[label_order_tail(labels, entry.protocol.imb)]).tolist())


def _records(file: Path, classes: int) -> np.ndarray:
    """uint8 [N, 3074], a row a picture: see :data:`_RECORD`."""
    try:
        check_regular(file)
        content = np.fromfile(file, dtype=np.uint8)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    if not len(content) or len(content) % _RECORD:
        raise InputError(
            f"{file}: {len(content):,} bytes, expected a multiple of {_RECORD:,}, one record a"
            " picture"
        )
    records = content.reshape(-1, _RECORD)
    beyond = np.flatnonzero(records[:, 1] >= classes)
    if len(beyond):
        raise InputError(
            f"{file}: record {beyond[0]} has the label {records[beyond[0], 1]}, expected"
            f" 0..{classes - 1}"
        )
    return records


def _cifar_folders(folder: Path, entry: DataSet, imb: float) -> Found:
    left_out = LeftOut()
    found = {part: pictures_by_class(folder, part, left_out) for part in ("train", "test")}
    classes = sorted(found["train"])
    odd = sorted(found["train"].keys() ^ found["test"].keys())
    if odd:
        where = "train" if odd[0] in found["train"] else "test"
        raise InputError(
            f"{folder}: {odd[0]!r} is in {where}/ alone ({len(odd)} such); expected the same"
            " class folders in train/ and test/"
        )
    if not classes:
        raise InputError(f"{folder / 'train'}: expected one folder of pictures a class")
    train, test = (labelled(folder, classes, found[part]) for part in ("train", "test"))
    kept, group_counts = _thinned(train.labels, entry, imb)
    parts = {"train": train.select(kept), "val": test.select([]), "test": test}
    return Found(
        shown(classes),
        parts,
        notes=left_out.lines(every_file=False),
        imb=imb,
        group_counts=group_counts,
    )
