"""Lists of one's own, ``path label`` a line, and files of class names."""

import numpy as np
import pytest
from miniatures import places_lt, put, refusal, write

from lamp_fast.data.settings import DataConfig
from lamp_fast.data.sources import load_source
from lamp_fast.data.sources.lists import PictureLists
from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.runs.experiment import load_data


def listed(pictures):
    return list(zip(pictures.names, pictures.labels.tolist(), strict=True))


def load(train=None, test=None, val=None, names=None, root=None, **options):
    files = {"train": train, "val": val, "test": test}
    given = {part: file for part, file in files.items() if file is not None}
    return load_source("list", root, lists=PictureLists(given, names), **options)


@pytest.fixture
def folder(tmp_path):
    """Three classes in folders of their own, with a train and a test list."""
    names = ("airfield", "art_school", "abbey")
    for part, count in (("train", 3), ("test", 2)):
        paths = [f"{part}/{name}/{n}.jpg" for name in names for n in range(count)]
        put(*(tmp_path / path for path in paths))
        lines = [f"{path} {names.index(path.split('/')[1])}" for path in paths]
        write(tmp_path / f"{part}.txt", "\n".join(lines) + "\n")
    return tmp_path


def test_a_list_as_places_lt_has_it(tmp_path):
    """Of the form of the published one: its first line is ``train/airfield/00004851.jpg 0``."""
    names = places_lt(tmp_path)
    root = tmp_path / "places_lt"
    files = {part: root / f"Places_LT_{part}.txt" for part in ("train", "val", "test")}
    assert files["train"].read_text().startswith("train/airfield/00004851.jpg 0\n")
    source = load(**files, names=root / "classnames.txt", root=root / "images")
    assert source.classnames == tuple(names)
    for part, file in files.items():
        rows = [line.split(" ") for line in file.read_text().splitlines()]
        assert listed(getattr(source, part)) == [(path, int(label)) for path, label in rows]
        assert getattr(source, part).root == root / "images"
    assert (source.name, source.drawn, source.imb) == ("list", (), None)


def test_whatever_editors_make_of_a_line(tmp_path):
    """A signature, Windows' line ends, tabs, empty lines, spaces in paths and at ends of lines."""
    paths = ["a b/1 2.jpg", "c/3.jpg", "c/4 5.jpg", "a b/6.jpg"]
    put(*(tmp_path / path for path in paths))
    text = "\ufeffa b/1 2.jpg 0\r\n\r\nc/3.jpg\t1\r\n  c/4 5.jpg \t 1  \r\n"
    (tmp_path / "train.txt").write_bytes(text.encode())
    (tmp_path / "test.txt").write_bytes(b"./a b//6.jpg 00")
    source = load(tmp_path / "train.txt", tmp_path / "test.txt")
    assert listed(source.train) == [(paths[0], 0), (paths[1], 1), (paths[2], 1)]
    assert listed(source.test) == [(paths[3], 0)]
    assert source.classnames == ("a b", "c")


def test_paths_start_from_the_root_or_the_train_list(folder):
    lists = folder / "lists"
    for part in ("train", "test"):
        write(lists / f"{part}.txt", (folder / f"{part}.txt").read_text())
    files = (lists / "train.txt", lists / "test.txt")
    assert "9 of the 9 listed pictures are missing" in refusal(load, *files)
    source = load(*files, root=folder)
    assert listed(source.train) == listed(load(folder / "train.txt", files[1]).train)
    absolute = "".join(f"{folder / path} {label}\n" for path, label in listed(source.test))
    write(files[1], absolute)
    assert listed(load(*files, root=folder).test) == listed(source.test)


def test_classes_are_called_as_their_folders(folder):
    source = load(folder / "train.txt", folder / "test.txt")
    assert source.classnames == ("airfield", "art school", "abbey")
    write(folder / "classes.json", '{"abbey": "old abbey"}')
    assert load(folder / "train.txt", folder / "test.txt").classnames[2] == "old abbey"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        # The name alone, also of two words that might be an id and a name.
        ("polar bear\nbrown bear\nblack cat\n", ("polar bear", "brown bear", "black cat")),
        ("4-wheel drive\nairfield\nabbey\n", ("4-wheel drive", "airfield", "abbey")),
        # Ids: WordNet's, the folders, the labels from 0 or 1, the name again, before a tab.
        (
            "n01440764 tench\nn01443537 white shark\nn01484850 ray\n",
            ("tench", "white shark", "ray"),
        ),
        ("airfield an airport\nart_school school\nabbey b\n", ("an airport", "school", "b")),
        ("0 air\n1 art school\n2 abbey\n", ("air", "art school", "abbey")),
        ("1 air\n2 art school\n3 abbey\n", ("air", "art school", "abbey")),
        ("\ufeffice_rink ice rink\r\n\r\nart_b art_b\r\npub pub\r\n", ("ice rink", "art b", "pub")),
        ("x\tair field\ny\tart\nz\tabbey\n", ("air field", "art", "abbey")),
        # Numbers that are not the labels are part of the names.
        ("2007 BMW\n2009 BMW\n2011 Audi\n", ("2007 BMW", "2009 BMW", "2011 Audi")),
    ],
)
def test_files_of_class_names(folder, text, names):
    write(folder / "names.txt", text)
    found = load(folder / "train.txt", folder / "test.txt", names=folder / "names.txt")
    assert found.classnames == names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tench\nshark\n", "train.txt: line 7: label 2, expected 0..1, a label for each of the 2"),
        ("a\nb\nb\n", "--data list: 2 classes are called 'b', expected distinct names"),
        ("a\nb\nc\nd\n", "--data list: 1 of 4 classes have no training picture, first 'd'"),
        ("n01440764 tench\nn01443537 shark\nray\n", "names.txt: line 3 is 'ray', expected an id"),
        ("n01440764 a\nn01443537 b\nn01443537 c\n", "line 3 has the id 'n01443537' again, after"),
        (
            "art_school a\nairfield b\nabbey c\n",
            "names.txt: line 1 names 'art_school', but the pictures of label 0 lie in 'airfield'",
        ),
        ("\n \n", "names.txt: is empty"),
    ],
)
def test_bad_names(folder, text, expected):
    write(folder / "names.txt", text)
    names = folder / "names.txt"
    message = refusal(load, folder / "train.txt", folder / "test.txt", names=names)
    assert expected in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("train/abbey/0.jpg -1", "train.txt: line 10: label '-1', expected an integer from 0"),
        ("train/abbey/0.jpg 1.0", "train.txt: line 10: label '1.0', expected an integer from 0"),
        ("train/abbey/0.jpg 1_0", "train.txt: line 10: label '1_0', expected an integer from 0"),
        ("train/abbey/0.jpg \u0663", "line 10: label '\u0663', expected an integer from 0"),
        ("train/abbey/0.jpg 9999999999", "label '9999999999', expected an integer from 0"),
        ("train/abbey/0.jpg abbey", "train.txt: line 10: label 'abbey', expected an integer"),
        ("train/abbey/0.jpg", "train.txt: line 10 is 'train/abbey/0.jpg', expected a path and its"),
        ("7", "train.txt: line 10 is '7', expected a path and its label"),
        ("train/abbey/0.jpg 2", "line 10 lists 'train/abbey/0.jpg' again, after line 7 of "),
        ("train//abbey/./0.jpg 1", "line 10 lists 'train//abbey/./0.jpg' again, after line 7 of "),
        ("test/abbey/0.jpg 2", "test.txt: line 5 lists 'test/abbey/0.jpg' again, after line 10 of"),
        ("../abbey/0.jpg 2", "train.txt: line 10: path '../abbey/0.jpg', expected a path below"),
        ("/etc/hostname 2", "train.txt: line 10: path '/etc/hostname', expected a path below"),
        ("train/abbey/9.jpg 2", "train.txt: 1 of the 10 listed pictures are missing, first "),
        ("train/abbey 2", "train.txt: 1 of the 10 listed pictures are missing, first "),
    ],
)
def test_bad_lines(folder, change, expected):
    with open(folder / "train.txt", "a") as stream:
        stream.write(change + "\n")
    assert expected in refusal(load, folder / "train.txt", folder / "test.txt")


def test_gaps_and_folders_that_tell_nothing(folder):
    train, test = folder / "train.txt", folder / "test.txt"
    put(
        folder / "train" / "zoo" / "0.jpg", folder / "loose.jpg", folder / "old" / "abbey" / "1.jpg"
    )
    text = train.read_text()
    write(train, text + "train/zoo/0.jpg 4\n")
    assert f"{train}: labels go up to 4 but 3 is missing; expected 0..C-1" in refusal(
        load, train, test
    )
    for line, why in (
        ("train/zoo/0.jpg 2", "label 2 in {} lie in no folder of their own"),
        ("loose.jpg 3", "label 3 in {} lie in no folder of their own"),
        ("old/abbey/1.jpg 3", "label 3 in {} lie in 'abbey' as those of label 2"),
    ):
        write(train, f"{text}{line}\n")
        message = refusal(load, train, test)
        assert message.startswith("--names: missing; ")
        assert why.format(train) in message
    # Said by name, all of this is fine.
    write(folder / "names.txt", "a\nb\nc\nd\n")
    assert load(train, test, names=folder / "names.txt").classnames == ("a", "b", "c", "d")


def test_files_that_are_not_there(folder):
    train, test, none = folder / "train.txt", folder / "test.txt", folder / "none.txt"
    assert refusal(load).startswith("--train: missing; --data list needs")
    assert refusal(load, train).startswith("--test: missing; --data list needs")
    assert refusal(load, none, test) == f"--train {none}: does not exist, expected a text file"
    assert refusal(load, train, test, names=folder).startswith(f"--names {folder}: is a folder")
    assert refusal(load, train, test, val=none).startswith(f"--val {none}: does not exist")
    assert refusal(load, train, test, root=none).startswith(f"--root {none}: does not exist")
    write(none, "")
    assert refusal(load, train, none) == f"{none}: is empty"
    none.write_bytes(b"\xff\xfe\0")
    assert refusal(load, train, none).startswith(f"{none}: not a text file")


def test_a_test_list_alone_is_enough_to_be_tested_on(folder):
    source = load(test=folder / "test.txt", only_test=True)
    assert len(source.train) == len(source.val) == 0
    assert source.classnames == ("airfield", "art school", "abbey")
    write(folder / "some.txt", "test/abbey/0.jpg 2\n")
    message = refusal(load, test=folder / "some.txt", only_test=True)
    assert message.endswith("expected 0..C-1, or a file of --names for classes without pictures")
    write(folder / "names.txt", "airfield\nart school\nabbey\nzoo\n")
    source = load(test=folder / "some.txt", names=folder / "names.txt", only_test=True)
    assert source.classnames == ("airfield", "art school", "abbey", "zoo")


def test_links_may_lead_out_of_the_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "train").rename(elsewhere / "train")
    (folder / "train").symlink_to(elsewhere / "train")
    assert len(load(folder / "train.txt", folder / "test.txt").train) == 9


def test_the_protocol_leaves_lists_as_they_are(folder):
    data = DataConfig(data="list", train=folder / "train.txt", test=folder / "test.txt")
    validate(data)
    resolved = data.resolved()
    assert (resolved.split, resolved.imb, resolved.cap) == ("all", 1.0, None)
    _, benchmark = load_data(data, seed=1)
    assert benchmark.counts.tolist() == [3, 3, 3]
    assert np.bincount(benchmark.test_base.labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", ["train", "val", "test", "names"])
def test_flags_of_lists_are_of_lists(name):
    with pytest.raises(InputError, match=f"--{name} x.txt: expected --data list or .*, not dtd"):
        validate(DataConfig(data="dtd", **{name: "x.txt"}))
