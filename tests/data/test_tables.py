"""Tables as other programs write them: columns, labels and files of many spellings."""

import json
import os

import pytest
from PIL import Image

from lamp_fast.data.sources import load_source
from lamp_fast.data.sources.files import read_json, read_lines
from lamp_fast.data.sources.table import PictureTable
from lamp_fast.errors import InputError

COUNT = 12


@pytest.fixture
def folder(tmp_path):
    for number in range(COUNT):
        Image.new("RGB", (4, 4), (number, 0, 90)).save(tmp_path / f"{number}.png")
    return tmp_path


def load(file, **options):
    only_test = options.pop("only_test", False)
    return load_source("table", None, None, PictureTable(file, **options), only_test=only_test)


def write(folder, label, header="path,label", *more):
    """A row a picture: its path, and what functions of its number say."""
    file = folder / "table.csv"
    rows = (
        ",".join([f"{number}.png", *(str(each(number)) for each in (label, *more))])
        for number in range(COUNT)
    )
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return file


def refusal(file, **options):
    with pytest.raises(InputError) as error:
        load(file, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def ant_or_bee(number):
    return ("ant", "bee")[number % 2]


def third(*words):
    return lambda number: words[number // 4]


@pytest.mark.parametrize(
    "name", ["split", "Split", "SPLIT", "partition", "Subset", "data_split", "phase", "set", "part"]
)
def test_the_column_of_parts_is_found_by_what_it_is_called(folder, name):
    file = write(folder, ant_or_bee, f"path,label,{name}", third("train", "Dev", "test set"))
    source = load(file)
    assert (len(source.train), len(source.val), len(source.test)) == (4, 4, 4)
    assert source.drawn == ()


def test_two_columns_of_parts_are_asked_about(folder):
    two = (third("train", "val", "test"), third("test", "val", "train"))
    file = write(folder, ant_or_bee, "path,label,Split,SPLIT", *two)
    assert "has 'Split' and 'SPLIT', expected the name of one" in refusal(file)
    assert load(file, split_column="SPLIT").test.names[0] == "0.png"


def test_a_column_that_names_no_part_is_about_something_else(folder):
    file = write(folder, ant_or_bee, "path,label,set", third("blue", "green", "red"))
    assert load(file).drawn == ("val", "test")
    file = write(folder, ant_or_bee, "path,label,set", third("blue", "green", "train"))
    assert "row 1: split 'blue'" in refusal(file)
    file = write(folder, ant_or_bee, "path,label,Split", third("blue", "green", "red"))
    assert "row 1: split 'blue'" in refusal(file)
    file = write(
        folder,
        third("ant", "bee", "cat"),
        "path,set",
    )
    assert load(file, label_column="set").classnames == ("ant", "bee", "cat")


@pytest.mark.parametrize("label", ["nan", "NaN", "None", "<NA>", "NaT", " nan "])
def test_missing_labels_are_no_class(folder, label):
    message = refusal(write(folder, lambda number: (*"ab", label)[number % 3]))
    assert f"row 3: label {label.strip()!r} stands for none" in message


def test_names_that_hold_such_words(folder):
    assert load(write(folder, third("nan bread", "none", "Nan"))).classnames == (
        "Nan",
        "nan bread",
        "none",
    )


@pytest.mark.parametrize("labels", [("1", "1.0"), ("01", "1"), ("7.", "+7"), ("0", "-0")])
def test_one_number_is_one_class(folder, labels):
    message = refusal(file := write(folder, lambda number: (*labels, "2")[number % 3]))
    told = f"row 2: label {labels[1]!r} is the number of {labels[0]!r} in {file}: row 1"
    assert told in message


@pytest.mark.parametrize(
    "labels",
    [("1", "2", "10"), ("1.0", "2.0", "10.0"), ("01", "02", "10"), ("1.5", "1.50", "v1")],
)
def test_numbers_written_alike_stay_as_they_are(folder, labels):
    assert load(write(folder, third(*labels))).classnames == labels


@pytest.mark.parametrize("label", [2**63, 2**64, 10**30, 10**60])
def test_labels_that_fit_no_machine_word(folder, label):
    """A number of any size is a name like another."""
    source = load(write(folder, lambda number: (label, 3)[number % 2]))
    assert source.classnames == ("3", str(label))
    assert source.train.labels.max() == 1


def test_split_files_with_labels_that_fit_no_machine_word(tmp_path):
    images = tmp_path / "caltech-101" / "101_ObjectCategories"
    images.mkdir(parents=True)
    file = tmp_path / "caltech-101" / "split_zhou_Caltech101.json"
    for label in (2**63, 2**31, 10**30):
        rows = [["0.png", 0, "ant"], ["1.png", label, "bee"]]
        file.write_text(json.dumps({"train": rows, "val": rows, "test": rows}))
        with pytest.raises(InputError, match="expected \\[path, label, class name\\]"):
            load_source("caltech101", tmp_path)


def test_links_of_a_table_are_followed(tmp_path):
    """As a hub's cache and data under version control lie: names here, contents elsewhere."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number in range(COUNT):
        blob = tmp_path / "blobs" / f"blob{number}"
        Image.new("RGB", (4, 4), (number, 0, 90)).save(blob, "PNG")
        (tmp_path / "snapshot" / f"{number}.png").symlink_to(f"../blobs/blob{number}")
    file = write(tmp_path / "snapshot", ant_or_bee)
    source = load(file)
    assert source.train.load(0).shape == (3, 4, 4)
    (tmp_path / "blobs" / "blob3").unlink()
    assert "1 of the 12 listed pictures are missing" in refusal(file)


def test_rows_that_are_only_tested(folder):
    file = write(folder, ant_or_bee)
    assert len(load(file, only_test=True).test) == COUNT
    file = write(folder, ant_or_bee, "path,label,split", lambda _: "test")
    assert len(load(file, only_test=True).test) == COUNT
    assert "evaluate RUN --data table" in refusal(file)
    file = write(folder, ant_or_bee, "path,label,split", third("train", "val", "val"))
    assert len(load(file, only_test=True).test) == 8


def parquet(folder, labels, names, kind="ClassLabel"):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    feature = {"names": names, "_type": kind}
    told = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    table = pyarrow.table({"path": [f"{n}.png" for n in range(len(labels))], "label": labels})
    files.write_table(table.replace_schema_metadata(told), folder / "table.parquet")
    return folder / "table.parquet"


def test_class_names_that_a_parquet_file_brings(folder):
    """In the order of their numbers, which the halves follow."""
    file = parquet(folder, [2, 0, 1] * 4, ["zebra", "big_cat", "ant", "unused"])
    assert load(file).classnames == ("zebra", "big cat", "ant")
    (folder / "classes.json").write_text('{"0": "striped horse"}')
    assert load(file).classnames == ("striped horse", "big cat", "ant")
    (folder / "classes.json").unlink()
    for number in (-1, 4):
        message = refusal(parquet(folder, [0, 1, number] * 4, list("abcd")))
        assert f"row 3: label '{number}', expected one of the file's own 4 classes" in message
    assert "classes are called 'a'" in refusal(parquet(folder, [0, 1] * 6, ["a", "a"]))


@pytest.mark.parametrize("names", [None, "ab", [1, 2], [], [" ", "b"], {"0": "a"}])
def test_damaged_names_of_a_parquet_file(folder, names):
    assert load(parquet(folder, [0, 1] * 6, names)).classnames == ("0", "1")


def test_labels_that_are_names_already(folder):
    assert load(parquet(folder, ["x", "y"] * 6, ["a", "b"])).classnames == ("x", "y")


@pytest.mark.parametrize("name", ["pipe.csv", "pipe.parquet", "endless.csv"])
def test_what_never_ends_is_no_table(folder, name):
    """Opening a pipe would wait for a writer, reading the device would fill the memory."""
    if name.startswith("pipe"):
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    assert refusal(folder / name) == (
        f"--table {folder / name}: cannot be read (not a regular file)"
    )


def test_other_files_that_never_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_json, read_lines):
        with pytest.raises(InputError, match="not a regular file"):
            read(tmp_path / "pipe")


def test_the_signature_before_utf8_is_no_text(folder):
    """As editors write it before classes.json, split files and lists of names."""
    file = folder / "classes.json"
    file.write_text('{"ant": "fourmi"}', encoding="utf-8-sig")
    assert load(write(folder, ant_or_bee)).classnames == ("fourmi", "bee")
    assert read_json(file) == {"ant": "fourmi"}
    names = folder / "classnames.txt"
    names.write_text("n01440764 tench\n", encoding="utf-8-sig")
    assert read_lines(names) == [(1, "n01440764 tench")]
