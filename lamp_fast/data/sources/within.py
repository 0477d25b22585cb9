"""Labelled pictures within other files: WebDataset's shards, and Hugging Face datasets."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lamp_fast.cli import expand_path
from lamp_fast.data.pictures import Pictures, Store
from lamp_fast.data.sources.class_names import names_by_line
from lamp_fast.data.sources.files import Found, read_lines, visible_folders
from lamp_fast.data.sources.hugging_face import PREFIX, read_hub
from lamp_fast.data.sources.own_parts import WHOLE, names_of, numbers_in_order, settle_parts
from lamp_fast.data.sources.shard_index import index_shards
from lamp_fast.data.sources.shards import COUNT_FILE, ShardStore, find_shards
from lamp_fast.data.sources.source import Rows
from lamp_fast.data.sources.table import check_spelling, number_of, part_of
from lamp_fast.errors import InputError

# In a folder of shards, as CLIP_benchmark writes it: a class name a line, the first of label 0.
NAMES_FILE = "classnames.txt"


def read_shards(
    root: Path | None,
    patterns: Mapping[str, Path],
    names: Path | None,
    label_column: str,
    only_test: bool,
) -> Found:
    """List the pictures of ``--data webdataset``.

    Args:
        root: shards, a folder of them, or one with a folder of them for each part.
        patterns: in place of it, the shards of each part.
        names: the file of class names; None takes that in the root, where labels are numbers.
        label_column: see :func:`index_shards`.
        only_test: nothing is trained on them.

    Raises:
        InputError: shards that are missing, unclear, damaged or listed twice, or as
            :func:`index_shards`; labels without a class name.
    """
    shards, base = _shards_by_part(root, patterns, only_test)
    store = ShardStore(tuple(shard for each in shards.values() for shard in each))
    listed: set[str] = set()
    for shard in store.shards:
        real = os.path.realpath(shard)
        if real in listed:
            raise InputError(f"{shard}: is listed twice, expected every shard once")
        listed.add(real)
    given = None if names is None else _names_in(names)
    rows = index_shards(store, base, shards, label_column)
    return _from_store(rows, store, base, given, only_test, names_file=base / NAMES_FILE)


def _shards_by_part(
    root: Path | None, patterns: Mapping[str, Path], only_test: bool
) -> tuple[dict[str, list[Path]], Path]:
    """The shards of each part, and the folder that the names of their pictures start from."""
    if patterns:
        flags = ", ".join(f"--{part}" for part in patterns)
        if root is not None:
            raise InputError(f"--root {root}: expected it or {flags}, not both")
        if "train" not in patterns and not only_test:
            raise InputError(f"--train: missing beside {flags}, expected shards to train on")
        found = {part: find_shards(file, f"--{part} {file}") for part, file in patterns.items()}
        for part, each in found.items():
            if each is None:
                raise InputError(f"--{part} {patterns[part]}: {_not_shards(patterns[part])}")
    elif root is None:
        raise InputError("--root: missing; --data webdataset needs NAME-{0000..0099}.tar")
    else:
        root = expand_path(root)
        whole = find_shards(root, f"--root {root}")
        found = _part_shards(root) if whole is None else {WHOLE: whole}
        if root.is_dir():
            return found, root
    folders = {os.path.abspath(shard.parent) for each in found.values() for shard in each}
    return found, Path(os.path.commonpath(folders))


def _part_shards(root: Path) -> dict[str, list[Path]]:
    """The shards of each part of a folder, laid out as CLIP_benchmark does."""
    found: dict[str, list[Path]] = {}
    folders = visible_folders(root) if root.is_dir() else []
    for name in folders:
        if not (root / name / COUNT_FILE).is_file():
            continue
        part = part_of(name)
        if part is None or part in found:
            why = "is no part" if part is None else f"is one more folder of the part {part}"
            raise InputError(f"--root {root}: {name} {why}, expected train, val and test")
        found[part] = find_shards(root / name, f"--root {root}")
    if not found:
        raise InputError(f"--root {root}: {_not_shards(root)}")
    return found


def _not_shards(place: Path) -> str:
    there = "has no shards" if place.is_dir() else "is no shard"
    there = there if place.exists() else "does not exist"
    return (
        f"{there}, expected NAME-{{0000..0099}}.tar, a folder with {COUNT_FILE}, or one with these"
        " in train/ and test/"
    )


def read_dataset(
    root: Path | None, names: Path | None, picture_column: str, label_column: str, only_test: bool
) -> Found:
    """List the pictures of ``--data hf``.

    Args:
        root: the dataset's name on the hub, or its folder.
        names: the file of class names; None takes the dataset's own.
        picture_column, label_column: see :func:`read_hub`.
        only_test: nothing is trained on them.

    Raises:
        InputError: as :func:`read_hub`; splits that are no parts, or labels without a class name.
    """
    if root is None:
        raise InputError("--root: missing; --data hf needs a name on the hub, or a folder")
    name = os.fspath(root).removeprefix(PREFIX)
    data = read_hub(f"--root {name}", name, picture_column, label_column)
    parts: dict[str, str] = {}
    notes = list(data.notes)
    named = {split: part_of(split) for split in data.rows}
    if len(named) == 1 and None in named.values():
        named = dict.fromkeys(named, WHOLE)
    for split, part in named.items():
        if part is None:
            notes.append(f"left out: split {split}, which is no part")
        elif part in parts.values():
            other = next(each for each in parts if parts[each] == part)
            raise InputError(f"--root {name}: splits {other} and {split} are both the part {part}")
        else:
            parts[split] = part
    if not parts:
        raise InputError(
            f"--root {name}: splits with labels are {', '.join(named) or 'none'}, expected train,"
            " validation or test"
        )
    rows = {part: data.rows[split] for split, part in parts.items()}
    given = None if data.classnames is None else (data.classnames, f"column {data.label_column}")
    if names is not None:
        classnames, where = _names_in(names)
        if given is not None and len(classnames) != len(given[0]):
            raise InputError(
                f"--names {names}: has {len(classnames)} names, expected the {len(given[0])} of"
                f" {given[1]}"
            )
        given = classnames, where
    folder = Path(f"{PREFIX}{name}")
    return _from_store(rows, data.store, folder, given, only_test, notes=tuple(notes))


def _names_in(file: Path) -> tuple[tuple[str, ...], str]:
    file = expand_path(file)
    if not file.is_file():
        there = "is a folder" if file.is_dir() else "does not exist"
        raise InputError(f"--names {file}: {there}, expected a text file")
    return names_by_line(file, read_lines(file), {}), str(file)


def _from_store(
    rows: Mapping[str, Rows],
    store: Store,
    root: Path,
    given: tuple[tuple[str, ...], str] | None,
    only_test: bool,
    *,
    names_file: Path | None = None,
    notes: tuple[str, ...] = (),
) -> Found:
    """Labelled pictures that are no files of their own.

    Args:
        rows: by part.
        store: where they lie.
        root: what their names start from.
        given: class names of labels, which are then numbers, and where they are from.
        only_test: nothing is trained on them.
        names_file: has class names where labels turn out to be numbers.
        notes: more for whoever reads a result.
    """

    def located() -> Iterator[tuple[str, str]]:
        for each in rows.values():
            for name, label in zip(each.names, each.labels, strict=True):
                yield f"{root}/{name}", label

    classes = sorted({label for _, label in located()}, key=numbers_in_order)
    if given is None and all(number_of(label) is not None for label in classes):
        if names_file is None or not names_file.is_file():
            place = "" if names_file is None else f", or {names_file}"
            name, label = next(located())
            raise InputError(
                f"--names: missing; labels are numbers, as {label!r} of {name},"
                f" expected a file of class names, the first of label 0{place}"
            )
        given = _names_in(names_file)
    if given is None:
        check_spelling(located())
        label_of, classnames = {label: at for at, label in enumerate(classes)}, None
    else:
        classnames, where = given
        label_of = {}
        for name, label in located():
            number = number_of(label)
            if number is None or not 0 <= number < len(classnames):
                raise InputError(
                    f"{name}: label {label!r}, expected 0..{len(classnames) - 1}, a label for each"
                    f" of the {len(classnames)} names of {where}"
                )
            label_of[label] = number
    found = {
        part: Pictures(
            names=each.names,
            labels=np.array([label_of[label] for label in each.labels], np.int64),
            root=root,
            store=store,
            places=each.places,
        )
        for part, each in rows.items()
    }
    pictures, drawn, how = settle_parts(found, only_test)
    if classnames is None:
        classnames = names_of(root, classes)
    return Found(classnames, pictures, drawn, (*how, *notes))
