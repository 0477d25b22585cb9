"""Sources, the protocol applied to them, and batches that depend on nothing but their seed."""

import csv
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lamp_fast.clip.settings import ClipConfig
from lamp_fast.data.benchmark import build_benchmark, check_benchmark
from lamp_fast.data.catalog import CATALOG
from lamp_fast.data.loading import evaluation_batches, training_batches
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.settings import DataConfig
from lamp_fast.data.sources import digits, load_source
from lamp_fast.data.sources.table import PictureTable
from lamp_fast.data.transforms import Preprocessing, evaluation_transform, training_transform
from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.runs.config import TrainConfig, apply_preset, saved_settings
from lamp_fast.runs.experiment import assemble

NO_DRAW = {"imb": 1, "cap": None, "shots": None, "seed": 1}


def save_picture(file, seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def split_rows(classes=("ant", "big_cat", "cup"), train=4, val=1, test=2):
    return {
        part: [
            [f"{folder}/{part}{number}.jpg", label, folder]
            for label, folder in enumerate(classes)
            for number in range(each)
        ]
        for part, each in (("train", train), ("val", val), ("test", test))
    }


def write_coop(root, split=None):
    """A miniature Caltech101 in CoOp's layout; returns its split file."""
    split = split or split_rows()
    folder = root / "caltech-101"
    rows = [row for part in ("train", "val", "test") for row in split[part]]
    for seed, (path, _, _) in enumerate(rows):
        save_picture(folder / "101_ObjectCategories" / path, seed)
    file = folder / "split_zhou_Caltech101.json"
    file.write_text(json.dumps(split))
    return file


def write_folders(root, counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            save_picture(root / name / f"{number}.png", seed=number)
    return root


def refusal(call, *arguments, **named):
    with pytest.raises(InputError) as error:
        call(*arguments, **named)
    message = str(error.value)
    assert "\n" not in message
    return message


def files_and_labels(pictures):
    return list(zip(pictures.names, pictures.labels.tolist(), strict=True))


def test_digits_are_the_scans():
    from sklearn.datasets import load_digits

    source = load_source("digits", None)
    scans = load_digits()
    assert source.classnames == digits.NAMES
    assert not source.augment
    parts = (source.train, source.val, source.test)
    assert sorted(name for part in parts for name in part.names) == sorted(
        f"digits/{index}" for index in range(1797)
    )
    for part, share in zip(parts, (0.5, 0.2, 0.3), strict=True):
        counts = np.bincount(part.labels) / np.bincount(scans.target)
        assert np.abs(counts - share).max() < 0.01
        for position in (0, len(part) - 1):
            index = int(part.name(position).removeprefix("digits/"))
            assert part.labels[position] == scans.target[index]
            # 16 grey levels, white ink on black, the same in each channel
            expected = torch.from_numpy(np.round(scans.images[index] * 255 / 16))
            assert (part.load(position) == expected).all()
    again = load_source("digits", "unused", template="a {} by hand")
    assert again.train.names == source.train.names
    assert again.template == "a {} by hand"


def test_block_counts():
    bitmap = np.random.default_rng(0).random((2, 32, 32)) < 0.4
    counts = digits.block_counts(bitmap)
    assert counts.dtype == np.uint8
    for row, column in ((0, 0), (3, 7), (7, 2)):
        block = bitmap[1, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert counts[1, row, column] == block.sum()
    assert digits.block_counts(np.ones((32, 32), bool)).tolist() == [[16] * 8] * 8


def test_coop_layout(tmp_path):
    write_coop(tmp_path)
    source = load_source("caltech101", str(tmp_path))
    assert source.classnames == ("ant", "big cat", "cup")
    assert source.template == "a photo of a {}."
    assert source.augment
    for part, rows in split_rows().items():
        assert files_and_labels(getattr(source, part)) == [(path, label) for path, label, _ in rows]
    assert source.train.load(0).shape == (3, 8, 10)
    assert source.drawn == ()


def test_links_that_stay_inside_are_fine(tmp_path):
    split = split_rows()
    write_coop(tmp_path / "real", split)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "caltech-101").symlink_to(tmp_path / "real" / "caltech-101")
    images = tmp_path / "real" / "caltech-101" / "101_ObjectCategories"
    (images / "ant" / "train0.jpg").unlink()
    (images / "ant" / "train0.jpg").symlink_to(images / "cup" / "train0.jpg")
    assert len(load_source("caltech101", tmp_path / "data").train) == 12


def broken_split(change):
    """A split with one thing wrong, and the row that is wrong."""
    split = split_rows()
    change(split)
    return split


def set_row(part, index, row):
    return lambda split: split[part].__setitem__(index, row)


MALFORMED_SPLITS = {
    "absolute": (
        set_row("test", 1, ["/etc/passwd", 0, "ant"]),
        r"test\[1\].*'/etc/passwd'.*inside",
    ),
    "above": (set_row("train", 0, ["ant/../../../x.jpg", 0, "ant"]), r"train\[0\].*'ant/\.\./"),
    "short row": (
        set_row("val", 2, ["cup/val0.jpg", 2]),
        r"val\[2\] is .*\[path, label, class name\]",
    ),
    "no row": (set_row("train", 1, "ant/train1.jpg"), r"train\[1\] is 'ant/train1.jpg', expected"),
    "text label": (set_row("train", 1, ["ant/train1.jpg", "0", "ant"]), r"train\[1\] is "),
    "boolean label": (set_row("train", 1, ["ant/train1.jpg", False, "ant"]), r"train\[1\] is "),
    "negative label": (set_row("train", 1, ["ant/train1.jpg", -1, "ant"]), r"train\[1\] is "),
    "blank name": (set_row("train", 0, ["ant/train0.jpg", 0, " "]), r"train\[0\] is "),
    "blank path": (set_row("train", 0, ["", 0, "ant"]), r"train\[0\] is "),
    "two names": (set_row("test", 0, ["ant/test0.jpg", 0, "bee"]), r"label 0 'bee'.*'ant'"),
    "gap": (lambda split: split.update(split_rows_with_gap()), "up to 3 but 2 is missing"),
    "no test": (lambda split: split.pop("test"), "expected lists named train, val, test"),
    "test no list": (lambda split: split.update(test={}), "expected lists named train, val, test"),
}


def split_rows_with_gap():
    return {
        part: [[path, 3 if label == 2 else label, name] for path, label, name in rows]
        for part, rows in split_rows().items()
    }


@pytest.mark.parametrize("case", MALFORMED_SPLITS)
def test_malformed_split_files(tmp_path, case):
    change, expected = MALFORMED_SPLITS[case]
    file = write_coop(tmp_path)
    file.write_text(json.dumps(broken_split(change)))
    message = refusal(load_source, "caltech101", tmp_path)
    assert message.startswith(str(file))
    assert re.search(expected, message), message


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "[" * 100_000, "\xff\xfe", "null"])
def test_split_files_that_are_no_split(tmp_path, text):
    file = write_coop(tmp_path)
    file.write_text(text, encoding="latin-1")
    message = refusal(load_source, "caltech101", tmp_path)
    assert message.startswith(str(file))
    assert "JSON" in message or "expected lists" in message


def test_missing_pictures_are_counted_and_the_first_is_named(tmp_path):
    file = write_coop(tmp_path)
    images = tmp_path / "caltech-101" / "101_ObjectCategories"
    (images / "big_cat" / "train2.jpg").unlink()
    (images / "cup" / "test0.jpg").unlink()
    (images / "cup" / "test1.jpg").unlink()
    (images / "cup" / "test1.jpg").mkdir()
    (images / "cup" / "val0.jpg").unlink()
    (images / "cup" / "val0.jpg").symlink_to(images / "gone.jpg")
    message = refusal(load_source, "caltech101", tmp_path)
    assert str(file) in message
    assert "4 of the 21 listed pictures" in message
    assert str(images / "big_cat" / "train2.jpg") in message


def test_paths_that_no_file_system_has(tmp_path):
    split = split_rows()
    file = write_coop(tmp_path, split)
    split["train"] += [["ant/\0.jpg", 0, "ant"], ["ant/\ud800.jpg", 0, "ant"]]
    file.write_text(json.dumps(split))
    assert "2 of the 23" in refusal(load_source, "caltech101", tmp_path)


@pytest.mark.parametrize("what", ["picture", "folder"])
def test_links_out_of_the_image_folder_are_refused(tmp_path, what):
    file = write_coop(tmp_path / "data")
    images = file.parent / "101_ObjectCategories"
    # A sibling whose name only begins like the image folder's is outside, too.
    outside = file.parent / "101_ObjectCategories_secret"
    (images / "ant").rename(outside)
    if what == "picture":
        (images / "ant").mkdir()
        for picture in outside.iterdir():
            (images / "ant" / picture.name).symlink_to(picture)
    else:
        (images / "ant").symlink_to(outside)
    message = refusal(load_source, "caltech101", tmp_path / "data")
    assert str(file) in message
    assert "'ant/train0.jpg' leads out" in message


def test_classes_with_one_name(tmp_path):
    write_coop(tmp_path, split_rows(("cat", "big_cat", "big cat")))
    message = refusal(load_source, "caltech101", tmp_path)
    assert "2 classes are called 'big cat'" in message


@pytest.mark.parametrize("name", ["caltech101", "folder"])
def test_roots_that_are_not_there(tmp_path, name):
    message = refusal(load_source, name, None)
    assert message.startswith("--root")
    assert name in message
    gone, empty, file = tmp_path / "gone", tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.touch()
    for root, word in ((gone, "does not exist"), (empty, "is empty"), (file, "is a file")):
        message = refusal(load_source, name, root)
        assert message.startswith(f"--root {root}: {word}")


def test_roots_without_the_data_set(tmp_path):
    (tmp_path / "else").mkdir()
    message = refusal(load_source, "caltech101", tmp_path)
    assert "--data caltech101 needs caltech-101/101_ObjectCategories/ in it" in message
    (tmp_path / "caltech-101" / "101_ObjectCategories").mkdir(parents=True)
    message = refusal(load_source, "caltech101", tmp_path)
    assert "101_ObjectCategories: expected one folder of pictures a class" in message


def test_unknown_data_set():
    message = refusal(load_source, "caltech", "anywhere")
    assert message.startswith(
        "--data caltech: expected one of digits, folder, table, list, webdataset, hf, caltech101,"
    )
    assert message.endswith(f", {list(CATALOG)[-1]}")


def test_folders_are_split_alike_every_time(tmp_path):
    root = write_folders(tmp_path, {"red_fox": 10, "ant": 20, "cup": 1})
    save_picture(root / "ant" / "deep" / "er" / "20.JPEG")
    save_picture(root / "ant" / ".hidden.png")
    save_picture(root / "ant" / ".thumbnails" / "1.png")
    save_picture(root / ".cache" / "1.png")
    (root / "ant" / "notes.txt").write_text("none")
    (root / "readme.md").write_text("none")
    source = load_source("folder", root)
    assert source.classnames == ("ant", "cup", "red fox")
    assert source.template == "a photo of a {}."
    sizes = [np.bincount(part.labels, minlength=3).tolist() for part in (source.train, source.val)]
    assert sizes == [[11, 1, 5], [4, 0, 2]]
    assert np.bincount(source.test.labels, minlength=3).tolist() == [6, 0, 3]
    names = [name for part in (source.train, source.val, source.test) for name in part.names]
    expected = [f"ant/{n}.png" for n in range(20)] + [f"red_fox/{n}.png" for n in range(10)]
    assert sorted(names) == sorted([*expected, "cup/0.png", "ant/deep/er/20.JPEG"])
    for part in (source.train, source.val, source.test):
        folders = [("ant", "cup", "red_fox")[label] for label in part.labels]
        assert [name.split("/")[0] for name in part.names] == folders
    again = load_source("folder", root, "{}")
    assert again.test.names == source.test.names
    assert again.template == "{}"


def test_folders_split_by_hand(tmp_path):
    for part, counts in (("train", (3, 2)), ("val", (1, 0)), ("test", (2, 1))):
        write_folders(tmp_path / part, dict(zip(("ant", "cup"), counts, strict=True)))
    source = load_source("folder", tmp_path)
    assert files_and_labels(source.train) == [
        *((f"train/ant/{n}.png", 0) for n in range(3)),
        *((f"train/cup/{n}.png", 1) for n in range(2)),
    ]
    assert files_and_labels(source.val) == [("val/ant/0.png", 0)]
    assert [label for _, label in files_and_labels(source.test)] == [0, 0, 1]


def test_parts_by_other_names(tmp_path):
    """Not classes called Train and valid, which would train without a word."""
    for part in ("Train", "valid", "TESTING"):
        write_folders(tmp_path / part, {"ant": 2, "cup": 1})
    source = load_source("folder", tmp_path)
    assert source.classnames == ("ant", "cup")
    assert source.train.names == ("Train/ant/0.png", "Train/ant/1.png", "Train/cup/0.png")
    assert source.val.names[0] == "valid/ant/0.png"
    assert source.test.names[0] == "TESTING/ant/0.png"
    assert source.drawn == ()
    write_folders(tmp_path / "val", {"ant": 1})
    message = refusal(load_source, "folder", tmp_path)
    assert message == f"--root {tmp_path}: val and valid, expected one folder of the part val"


@pytest.mark.parametrize("with_val", [False, True])
def test_folders_without_a_test_part(tmp_path, with_val):
    write_folders(tmp_path / "train", {"ant": 10, "cup": 20})
    if with_val:
        write_folders(tmp_path / "val", {"ant": 1, "cup": 1})
    source = load_source("folder", tmp_path)
    sizes = [len(part) for part in (source.train, source.val, source.test)]
    assert sizes == ([30, 0, 2] if with_val else [15, 6, 9])
    assert not set(source.train.names) & {*source.test.names, *source.val.names}
    assert source.drawn == (() if with_val else ("val", "test"))
    told = " ".join(build_benchmark(source, split="all", **NO_DRAW).describe())
    assert ("val and test drawn here" in told) != with_val
    assert ("the val pictures are the test set" in told) == with_val


def test_a_class_may_be_called_train(tmp_path):
    source = load_source("folder", write_folders(tmp_path, {"train": 4, "bus": 4}))
    assert source.classnames == ("bus", "train")


def test_links_in_folders_are_followed_but_not_in_circles(tmp_path):
    root = write_folders(tmp_path / "data", {"ant": 4})
    elsewhere = write_folders(tmp_path / "elsewhere", {"cup": 5})
    (root / "cup").symlink_to(elsewhere / "cup")
    (elsewhere / "cup" / "again").symlink_to(elsewhere / "cup")
    source = load_source("folder", root)
    labels = np.concatenate([source.train.labels, source.val.labels, source.test.labels])
    assert np.bincount(labels).tolist() == [4, 5]


def test_class_names_file(tmp_path):
    root = write_folders(tmp_path, {"n01": 2, "n_02": 2})
    file = root / "classes.json"
    file.write_text('{"n01": "great white_shark"}')
    assert load_source("folder", root).classnames == ("great white_shark", "n 02")
    for text, expected in (
        ('["a"]', "expected an object"),
        ('{"n01": 3}', "expected an object"),
        ('{"n01": ""}', "expected an object"),
        ('{"n07": "a"}', "'n07', which is no class of the data"),
        ("{", "not valid JSON"),
    ):
        file.write_text(text)
        message = refusal(load_source, "folder", root)
        assert message.startswith(str(file))
        assert expected in message
    file.write_text('{"n01": "n 02"}')
    assert "2 classes are called 'n 02'" in refusal(load_source, "folder", root)


def test_folders_with_too_little(tmp_path):
    flat = tmp_path / "flat"
    save_picture(flat / "1.png")
    assert "expected one folder of pictures a class" in refusal(load_source, "folder", flat)
    one = write_folders(tmp_path / "one", {"ant": 3})
    assert "at least 2 classes, found ['ant']" in refusal(load_source, "folder", one)
    hollow = write_folders(tmp_path / "hollow", {"ant": 3, "bee": 0, "cup": 3, "dog": 0})
    message = refusal(load_source, "folder", hollow)
    assert "2 of 4 classes have no training picture, first 'bee'" in message
    for part, classes in (("train", {"ant": 3, "bee": 3}), ("test", {"ant": 3, "cup": 3})):
        write_folders(tmp_path / "parts" / part, classes)
    message = refusal(load_source, "folder", tmp_path / "parts")
    assert "1 of 3 classes have no training picture, first 'cup'" in message


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    """Simulated, because the permissions of files do not stop root."""
    root = write_folders(tmp_path, {"ant": 3, "bee": 3})
    listed = os.scandir

    def refuse_bee(folder):
        if os.path.basename(folder) == "bee":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", refuse_bee)
    message = refusal(load_source, "folder", root)
    assert message.startswith(f"--root {root}: cannot be read")
    assert str(root / "bee") in message


TABLE = [
    ("a/1.png", "red_fox", "train"),
    ("a/2.png", "red_fox", "Train"),
    ("b/1.png", "ant", "train"),
    ("b/2.png", "ant", "VALIDATION"),
    ("a/3.png", "red_fox", "test"),
    ("b/3.png", "ant", "test"),
]


def write_table(folder, rows=TABLE, header=("path", "label", "split"), name="table.csv"):
    """A table and, beside it, the pictures that its first column names."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (path, *_) in enumerate(rows):
        if not str(path).startswith(("/", "..")):
            save_picture(folder / path, seed)
    file = folder / name
    if file.suffix.lower() == ".csv":
        with open(file, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([header, *rows])
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
        parquet.write_table(pyarrow.table(columns), file)
    return file


def load_table(file, root=None, only_test=False, **columns):
    return load_source("table", root, None, PictureTable(file, **columns), only_test=only_test)


@pytest.mark.parametrize("name", ["table.csv", "table.parquet", "TABLE.CSV"])
def test_tables(tmp_path, name):
    source = load_table(write_table(tmp_path, name=name))
    assert source.classnames == ("ant", "red fox")
    assert source.template == "a photo of a {}."
    assert source.drawn == ()
    assert files_and_labels(source.train) == [("b/1.png", 0), ("a/1.png", 1), ("a/2.png", 1)]
    assert files_and_labels(source.val) == [("b/2.png", 0)]
    assert files_and_labels(source.test) == [("b/3.png", 0), ("a/3.png", 1)]
    assert source.test.load(0).shape == (3, 8, 10)


def test_tables_with_columns_of_other_names_and_another_root(tmp_path):
    rows = [("x", path, label, part) for path, label, part in TABLE]
    header = ("split", "file name", "klass", "fold")
    for seed, (_, path, *_) in enumerate(rows):
        save_picture(tmp_path / "pictures" / path, seed)
    (tmp_path / "tables").mkdir()
    file = tmp_path / "tables" / "t.csv"
    with open(file, "w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows([header, *rows])
    columns = {"path_column": "file name", "label_column": "klass", "split_column": "fold"}
    source = load_table(file, tmp_path / "pictures", **columns)
    assert [len(source.train), len(source.val), len(source.test)] == [3, 1, 2]
    message = refusal(load_table, file, tmp_path / "pictures")
    assert message == (
        f"--path-column path: expected one such column in {file},"
        " which has 'split', 'file name', 'klass', 'fold'"
    )
    message = refusal(load_table, file, tmp_path / "pictures", **(columns | {"split_column": "x"}))
    assert message.startswith("--split-column x: expected one such column")


def test_tables_without_parts_are_split_like_folders(tmp_path):
    """The same pictures in class folders and in a table: the same parts."""
    write_folders(tmp_path, {"ant": 10, "cup": 20})
    rows = [
        (f"{name}/{n}.png", name) for name, many in (("ant", 10), ("cup", 20)) for n in range(many)
    ]
    # In the order in which folders list them.
    file = write_table(tmp_path, sorted(rows), ("path", "label"))
    table, folder = load_table(file), load_source("folder", tmp_path)
    for part in ("train", "val", "test"):
        assert files_and_labels(getattr(table, part)) == files_and_labels(getattr(folder, part))
    assert table.drawn == folder.drawn == ("val", "test")


def test_table_labels(tmp_path):
    """Numbers in numeric order, named by classes.json; spaces around a name do not count."""
    rows = [(f"{n}.png", label) for n, label in enumerate([10, 9, " 9", "10 ", 9, 10])]
    file = write_table(tmp_path, rows, ("path", "label"))
    assert load_table(file).classnames == ("9", "10")
    (tmp_path / "classes.json").write_text('{"9": "great auk", "10": "dodo"}')
    assert load_table(file).classnames == ("great auk", "dodo")
    (tmp_path / "classes.json").write_text('{"11": "dodo"}')
    assert "names '11', which is no class" in refusal(load_table, file)


def test_paths_of_tables_stay_below_the_root(tmp_path):
    inside = [(str(tmp_path / "data" / path), label) for path, label, _ in TABLE]
    write_table(tmp_path / "data")
    file = write_table(tmp_path / "data", inside, ("path", "label"), "absolute.csv")
    source = load_table(file)
    names = [*source.train.names, *source.val.names, *source.test.names]
    assert sorted(names) == sorted(path for path, _, _ in TABLE)
    assert "expected a path below" in refusal(load_table, file, tmp_path / "data" / "b")
    save_picture(tmp_path / "secret.png")
    for path in ("../secret.png", str(tmp_path / "secret.png"), "a/../1.png", ".", "/"):
        file = write_table(tmp_path / "data", [], name="outside.csv")
        file.write_text(f"path,label\na/1.png,fox\n{path},ant\n")
        message = refusal(load_table, file)
        assert message.startswith(f"{file}: row 2: path {path!r}, expected a path below")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    file.write_text("path,label\na/1.png,fox\nlink.png,ant\n")
    assert len(load_table(file, only_test=True).test) == 2  # a link is followed, as in folders
    file.write_text("path,label\na/1.png,fox\ngone.png,ant\n")
    assert "1 of the 2 listed pictures are missing" in refusal(load_table, file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "--path-column path: expected one such column in .* which has none"),
        ("path;label\n", "which has 'path;label'"),
        ("path,label,path\n", "--path-column path: expected one such column"),
        ("path,label\n", "--table .* has no rows"),
        ("path,label\na/1.png\n", "row 1 has 1 cells, expected the header's 2"),
        ("path,label\na/1.png,x,y\n", "row 1 has 3 cells"),
        ("path,label\na/1.png,\n", "row 1: label '', expected a class name"),
        ("path,label\n\n,x\n", "row 1: path '', expected the path of a picture"),
        ("path,label,split\na/1.png,x,half\n", "row 1: split 'half', expected train, val or test"),
        ("path,label\na/1.png,x\na/./1.png,x\n", "row 2 lists 'a/./1.png' again, after row 1"),
        ("path,label\na/1.png,x\na/2.png,x\n", "--table .*: expected at least 2 classes"),
        ('path,label\n"a/1.png,x\n', "not a UTF-8 .csv file"),
        ("path,label\na/1.png,\udcff\n", "not a UTF-8 .csv file"),
        ("path,label\na/1.png,big cat\na/2.png,big_cat\n", "2 classes are called 'big cat'"),
        ("path,label,split\na/1.png,x,test\nb/1.png,y,train\n", "1 of 2 classes have no training"),
    ],
)
def test_malformed_tables(tmp_path, text, expected):
    file = write_table(tmp_path)
    file.write_bytes(text.encode(errors="surrogateescape"))
    message = refusal(load_table, file)
    assert str(file) in message
    assert re.search(expected, message), message


def test_tables_that_are_not_there(tmp_path):
    assert "--table: missing" in refusal(load_source, "table", None)
    for name, expected in (
        ("gone.csv", "cannot be read (No such file or directory)"),
        ("gone.txt", "expected a .csv or .parquet file"),
        ("folder.csv", "cannot be read (Is a directory)"),
    ):
        (tmp_path / "folder.csv").mkdir(exist_ok=True)
        message = refusal(load_table, tmp_path / name)
        assert message == f"--table {tmp_path / name}: {expected}"
    file = write_table(tmp_path)
    assert "--root" in refusal(load_table, file, tmp_path / "gone")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").touch()
    message = refusal(load_table, tmp_path / "t.parquet")
    assert "needs pyarrow (pip install 'lamp_fast[parquet]')" in message


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 2], None),
        (["ant", "bee"], None),
        ([1.5, 2.0], "row 1: label 1.5, expected a class name or integer"),
        (["ant", None], "row 2: label None"),
        ([True, False], "row 1: label True"),
    ],
)
def test_cells_of_parquet(tmp_path, labels, expected):
    rows = [(f"{n}.png", labels[n % 2]) for n in range(6)]
    file = write_table(tmp_path, rows, ("path", "label"), "t.parquet")
    if expected is None:
        assert load_table(file).classnames == tuple(map(str, labels))
    else:
        assert expected in refusal(load_table, file)
    file.write_bytes(b"PAR1 and no more")
    assert f"--table {file}: not a .parquet file" in refusal(load_table, file)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("base-new", 10, 100)),
        ({"shots": 4}, ("base-new", 1, 100)),
        ({"data": "caltech101"}, ("base-new", 10, 100)),
        ({"data": "caltech101", "cap": None, "split": "all"}, ("all", 10, None)),
        ({"data": "folder"}, ("all", 1, None)),
        ({"data": "table"}, ("all", 1, None)),
        ({"data": "folder", "split": "base-new", "imb": 5, "cap": 7}, ("base-new", 5, 7)),
    ],
)
def test_own_data_is_taken_as_it_is(given, expected):
    """Papers halve and thin the classes of their data sets; of a user's own pictures all count."""
    data = DataConfig(**given).resolved()
    assert (data.split, data.imb, data.cap) == expected
    assert data.resolved() == data


def test_a_run_on_a_table(tmp_path):
    """From the settings to what is trained, and back from the settings that a run saves."""
    file = write_table(tmp_path)
    data = DataConfig(data="table", table=file)
    config = apply_preset(TrainConfig(data=data, clip=ClipConfig("tiny")), "tiny")
    experiment = assemble(config)
    assert experiment.benchmark.base_names == ("ant", "red fox")
    assert experiment.benchmark.new_names == ()
    assert experiment.benchmark.counts.tolist() == [1, 2]
    saved = saved_settings(experiment.record()["settings"], "config.json")
    assert saved.data == experiment.config.data
    assert (saved.data.split, saved.data.imb, saved.data.cap) == ("all", 1, None)
    assert assemble(saved).data_hash == experiment.data_hash
    halved = replace(config, data=replace(config.data, split="base-new"))
    assert "2 classes give a new half of 1" in refusal(assemble, halved)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"split": "half"}, "--split half: expected all or base-new"),
        ({"cap": "many"}, "--cap many: expected a number, none or auto"),
        ({"cap": 0}, "--cap 0: expected at least 1"),
        ({"table": Path("t.csv")}, "--table t.csv: expected --data table with it, not digits"),
    ],
)
def test_settings_of_data_that_make_no_sense(given, expected):
    assert refusal(validate, DataConfig(**given)) == expected


@pytest.fixture
def uneven(tmp_path):
    """Five classes of 30, 8, 20, 5 and 9 training pictures, 2 test pictures each."""
    classes = dict(zip("abcde", (30, 8, 20, 5, 9), strict=True))
    write_folders(tmp_path / "train", classes)
    write_folders(tmp_path / "test", dict.fromkeys(classes, 2))
    return load_source("folder", tmp_path)


def test_the_benchmark_without_draws(uneven):
    benchmark = build_benchmark(uneven, **NO_DRAW)
    assert (benchmark.base_names, benchmark.new_names) == (("a", "b", "c"), ("d", "e"))
    assert benchmark.counts.tolist() == [30, 8, 20]
    assert benchmark.head.tolist() == [True, False, False]
    for part, names, folder in (
        ("train", benchmark.base_names, "train"),
        ("adapt", benchmark.new_names, "train"),
        ("test_base", benchmark.base_names, "test"),
        ("test_new", benchmark.new_names, "test"),
    ):
        pictures = getattr(benchmark, part)
        assert np.unique(pictures.labels).tolist() == list(range(len(names)))
        for file, label in files_and_labels(pictures):
            assert file.startswith(f"{folder}/{names[label]}/")
    assert [len(benchmark.adapt), len(benchmark.test_base), len(benchmark.test_new)] == [14, 6, 4]


def test_the_order_of_draws(uneven):
    """Cap over all classes, then halves, then the tail of the base half from the capped maximum."""
    benchmark = build_benchmark(uneven, imb=4, cap=16, shots=None, seed=3)
    # Targets 16, 8, 4 by count: a (16 after the cap), c (16), b (8); ties in label order.
    assert benchmark.counts.tolist() == [16, 4, 8]
    assert len(benchmark.adapt) == 5 + 9
    capped = build_benchmark(uneven, imb=1, cap=16, shots=None, seed=3)
    assert capped.counts.tolist() == [16, 8, 16]
    assert set(benchmark.train.names) < set(capped.train.names)
    assert benchmark.adapt.names == capped.adapt.names
    steep = build_benchmark(uneven, imb=50, cap=16, shots=None, seed=3)
    assert steep.counts.tolist() == [16, 1, 2]  # 16 / 50 ** (1 / 2) is 2.26
    assert steep.adapt.names == capped.adapt.names  # new classes have no tail
    uncapped = build_benchmark(uneven, imb=4, cap=None, shots=None, seed=3)
    assert uncapped.counts.tolist() == [30, 7, 15]
    shots = build_benchmark(uneven, imb=1, cap=16, shots=6, seed=3)
    assert shots.counts.tolist() == [6, 6, 6]
    assert shots.head is None
    assert len(shots.adapt) == 5 + 6
    other = build_benchmark(uneven, imb=4, cap=16, shots=None, seed=4)
    assert other.train.names != benchmark.train.names
    assert other.test_base.names == benchmark.test_base.names


def test_every_class_together(uneven):
    benchmark = build_benchmark(uneven, split="all", **NO_DRAW)
    assert benchmark.new_names == ()
    assert benchmark.counts.tolist() == [30, 8, 20, 5, 9]
    assert [len(benchmark.adapt), len(benchmark.test_base), len(benchmark.test_new)] == [0, 10, 0]
    assert "10 test pictures" in benchmark.describe()


def test_groups_by_the_runs_counts_or_by_a_benchmarks(uneven):
    benchmark = build_benchmark(uneven, split="all", **NO_DRAW)  # 30, 8, 20, 5, 9 a class
    assert benchmark.group_counts.tolist() == benchmark.counts.tolist()
    assert benchmark.size_groups.tolist() == ["medium", "few", "medium", "few", "few"]
    told = "classes by training pictures: 0 many (> 100), 2 medium (20..100), 3 few (< 20)"
    assert told in benchmark.describe()
    given = replace(benchmark, benchmark_counts=(500, 101, 100, 20, 19))
    assert given.size_groups.tolist() == ["many", "many", "medium", "medium", "few"]
    assert given.head.tolist() == benchmark.head.tolist()
    assert [each for each in given.describe() if "many" in each] == [
        "classes by training pictures, counted by the benchmark and not here:"
        " 2 many (> 100), 2 medium (20..100), 1 few (< 20)"
    ]
    equal = build_benchmark(uneven, split="all", imb=1, cap=None, shots=2, seed=1)
    assert equal.size_groups is None
    assert not any("many" in each for each in equal.describe())


def test_describe(uneven):
    lines = build_benchmark(uneven, imb=4, cap=16, shots=None, seed=3).describe()
    text = "\n".join(lines)
    for part in ("5 classes (3 base, 2 new)", "28 training pictures", "cap 16", "imb 4"):
        assert part in text
    assert "16 to 4 a class, realised imbalance 4;" in text
    assert "6 base, 4 new test pictures" in text
    assert (
        "(6 shots, imb 1)" in build_benchmark(uneven, imb=1, cap=9, shots=6, seed=3).describe()[1]
    )
    assert "cap none" in build_benchmark(uneven, **NO_DRAW).describe()[1]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"imb": 0.5}, "--imb 0.5: expected at least 1"),
        ({"imb": float("nan")}, "--imb nan: expected at least 1"),
        ({"cap": 0}, "--cap 0: expected at least 1"),
        ({"shots": 0}, "--shots 0: expected at least 1"),
        ({"split": "half"}, "--split half: expected base-new or all"),
    ],
)
def test_benchmark_refusals(uneven, changed, expected):
    assert expected in refusal(build_benchmark, uneven, **(NO_DRAW | changed))


@pytest.mark.parametrize("classes", [2, 3])
def test_a_half_needs_two_classes(tmp_path, classes):
    """Among one class every answer is right: it would score 100."""
    source = load_source("folder", write_folders(tmp_path, dict.fromkeys("abcd"[:classes], 4)))
    message = refusal(build_benchmark, source, **NO_DRAW)
    assert message.startswith(f"--split base-new: {classes} classes give a new half of 1")
    assert build_benchmark(source, **(NO_DRAW | {"split": "all"})).new_names == ()


def test_a_half_without_test_pictures(tmp_path):
    write_folders(tmp_path / "train", dict.fromkeys("abcd", 3))
    write_folders(tmp_path / "test", {"a": 1})
    source = load_source("folder", tmp_path)
    assert "no test picture of the new classes" in refusal(build_benchmark, source, **NO_DRAW)
    assert len(build_benchmark(source, **(NO_DRAW | {"split": "all"})).test_base) == 1
    (tmp_path / "test" / "a" / "0.png").unlink()
    source = load_source("folder", tmp_path)
    message = refusal(build_benchmark, source, **(NO_DRAW | {"split": "all"}))
    assert message == "--data folder: no test picture, expected at least 1"


def test_checking_a_benchmark(uneven):
    benchmark = build_benchmark(uneven, **NO_DRAW)
    checked, unreadable, before = check_benchmark(benchmark)
    assert unreadable == ()
    assert checked.train.names == benchmark.train.names
    root = benchmark.train.root
    damaged = [root / "train" / "b" / "3.png", root / "test" / "d" / "0.png"]
    for file in damaged:
        file.write_bytes(file.read_bytes()[:60])
    message = refusal(check_benchmark, benchmark)
    assert str(damaged[0]) in message
    assert "--skip-unreadable" in message
    checked, unreadable, after = check_benchmark(benchmark, skip_unreadable=True, progress=False)
    assert unreadable == tuple(map(str, damaged))
    assert checked.counts.tolist() == [30, 7, 20]
    assert len(checked.test_new) == 3
    assert before != after
    for file in (root / "train" / "b").iterdir():
        file.write_bytes(b"")
    message = refusal(check_benchmark, benchmark, skip_unreadable=True)
    assert "class 'b' has no readable training picture" in message


def test_pictures_outside_the_run_are_not_read(uneven):
    (uneven.train.root / "train" / "a" / "0.png").write_bytes(b"")
    benchmark = build_benchmark(uneven, imb=1, cap=1, shots=None, seed=1)
    assert "train/a/0.png" not in benchmark.train.names
    check_benchmark(benchmark)


def noise_pictures(count, seed=0):
    arrays = np.random.default_rng(seed).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
    names = tuple(f"noise/{index}" for index in range(count))
    return Pictures(names, np.arange(count) % 3, arrays=arrays)


def collect(batches):
    return [[tensor.clone() for tensor in batch] for batch in batches]


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for batch, twin in zip(one, other, strict=True)
        for a, b in zip(batch, twin, strict=True)
    )


TRANSFORM = training_transform(Preprocessing(8))


def test_training_batches_do_not_depend_on_workers_or_history():
    """In one process, in two, in any order of epochs, whatever else draws random numbers."""
    pictures = noise_pictures(23)
    alone = training_batches(pictures, TRANSFORM, 4, seed=5)
    epochs = [collect(alone.epoch(epoch)) for epoch in range(3)]
    parallel = training_batches(pictures, TRANSFORM, 4, seed=5, workers=2)
    torch.manual_seed(99)
    for epoch in (2, 0, 1):  # as a resumed run would begin
        assert same(collect(parallel.epoch(epoch)), epochs[epoch])
    # An epoch that was left half-way, as Ctrl-C would, leaves nothing behind.
    assert next(parallel.epoch(1))[2].tolist() == epochs[1][0][2].tolist()
    assert same(collect(parallel.epoch(2)), epochs[2])
    assert not same(epochs[0], epochs[1])
    assert not same(collect(training_batches(pictures, TRANSFORM, 4, seed=6)), epochs[0])


def test_training_batches_are_shuffled_pictures_with_their_labels():
    pictures = noise_pictures(23)
    batches = training_batches(pictures, evaluation_transform(Preprocessing(12)), 4, seed=5)
    assert len(batches) == 5
    seen = collect(batches.epoch(0))
    assert [len(images) for images, _, _ in seen] == [4] * 5  # the last 3 are dropped
    order = torch.cat([index for _, _, index in seen]).tolist()
    assert len(set(order)) == 20
    assert order != sorted(order)
    single = evaluation_transform(Preprocessing(12))
    for images, labels, index in seen:
        assert (images.dtype, labels.dtype, index.dtype) == (torch.float32, *[torch.int64] * 2)
        assert images.shape == (4, 3, 12, 12)
        assert labels.tolist() == pictures.labels[index].tolist()
        for image, each in zip(images, index.tolist(), strict=True):
            assert torch.equal(image, single(pictures.load(each)))
    later = [index for _, _, index in collect(batches.epoch(1))]
    assert torch.cat(later).tolist() != order


def test_a_picture_is_augmented_alike_in_any_batch():
    """Only (seed, epoch, index) decide: the batch size changes which batch, not which crop."""
    pictures = noise_pictures(12)
    crops = []
    for size in (1, 4, 12):
        batches = collect(training_batches(pictures, TRANSFORM, size, seed=1).epoch(3))
        found = {
            int(each): image
            for images, _, index in batches
            for image, each in zip(images, index, strict=True)
        }
        crops.append(torch.stack([found[each] for each in range(12)]))
    assert torch.equal(crops[0], crops[1])
    assert torch.equal(crops[0], crops[2])


def test_a_picture_is_augmented_anew_every_epoch_and_seed():
    """A batch of one picture has one order, so only the crop can differ."""
    picture = noise_pictures(1)
    crops = [
        next(training_batches(picture, TRANSFORM, 1, seed=seed).epoch(epoch))[0]
        for seed, epoch in ((1, 0), (1, 1), (2, 0), (2, 1))
    ]
    assert len({crop.numpy().tobytes() for crop in crops}) == 4


@pytest.mark.parametrize(
    ("count", "training", "evaluation"),
    [(3, [3], [3]), (4, [4], [4]), (5, [4], [4, 1]), (0, [], [])],
)
def test_batch_sizes(count, training, evaluation):
    pictures = noise_pictures(count)
    for batches, expected in (
        (training_batches(pictures, TRANSFORM, 4, seed=0), training),
        (evaluation_batches(pictures, TRANSFORM, 4), evaluation),
    ):
        assert len(batches) == len(expected)
        assert [len(images) for images, _, _ in batches] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_keep_order_and_every_picture(workers):
    pictures = noise_pictures(11)
    transform = evaluation_transform(Preprocessing(8))
    batches = evaluation_batches(pictures, transform, 4, workers=workers)
    for _ in range(2):
        seen = collect(batches)
        assert torch.cat([index for _, _, index in seen]).tolist() == list(range(11))
        labels = torch.cat([label for _, label, _ in seen])
        assert labels.tolist() == pictures.labels.tolist()
        images = torch.cat([image for image, _, _ in seen])
        expected = torch.stack([transform(pictures.load(each)) for each in range(11)])
        assert torch.equal(images, expected)


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    for workers in (0, 1):
        torch.manual_seed(3)
        collect(training_batches(noise_pictures(5), TRANSFORM, 2, seed=1, workers=workers))
        assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_vanishes_costs_one_line(tmp_path, workers):
    files = [save_picture(tmp_path / f"{number}.png") for number in range(4)]
    pictures = Pictures([file.name for file in files], [0] * 4, root=tmp_path)
    files[2].unlink()
    batches = evaluation_batches(pictures, TRANSFORM, 2, workers=workers)
    message = refusal(collect, batches)
    assert message.startswith(repr(str(files[2])))
    assert message.endswith("cannot be read as a picture (No such file or directory)")


def test_workers_start_from_a_clean_process():
    batches = training_batches(noise_pictures(2), v2.Identity(), 2, seed=1, workers=2)
    loader = batches._loader
    assert isinstance(loader, DataLoader)
    assert loader.multiprocessing_context.get_start_method() == "forkserver"
    assert loader.persistent_workers
    assert loader.num_workers == 1  # no more than there are batches
