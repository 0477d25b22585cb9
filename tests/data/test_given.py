"""What a command line's arguments mean: lists, tables, shards and Hugging Face datasets."""

import io
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamp_fast.data.sources.files import LeftOut
from lamp_fast.data.sources.given import Inputs, list_pictures
from lamp_fast.errors import InputError


def png(shade):
    stream = io.BytesIO()
    Image.new("RGB", (9, 9), (shade, 0, 0)).save(stream, format="PNG")
    return stream.getvalue()


def given(*arguments, column="path"):
    """Names and pictures, twice the same, and how many the check found."""
    inputs = Inputs([Path(each) for each in arguments], column, LeftOut())
    found = [(str(each.name), each.picture) for each in inputs]
    again = [(str(each.name), each.picture) for each in inputs]
    assert [name for name, _ in found] == [name for name, _ in again]
    return found, inputs.check()


def write_shard(file, members):
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file


def test_a_text_list_starts_from_its_own_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "list.txt"
    file.write_text("a b.png\n\n  ../c.png  \n/d.png\n", encoding="utf-8-sig")
    found, (count, digest) = given(file)
    expected = [tmp_path / "sub" / "a b.png", tmp_path / "sub" / ".." / "c.png", Path("/d.png")]
    assert [picture for _, picture in found] == expected
    assert count == 3
    file.write_text("a b.png\n../c.png\n/e.png\n")
    assert given(file)[1][1] != digest
    assert list_pictures(file, "path", LeftOut())[0] == expected[0]


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "has no rows"), (b"a\0b.png\n", "line 1 has no path"), (b"\xff\xfe\n", "not a UTF-8")],
)
def test_text_lists_that_are_none(content, told, tmp_path):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=told):
        given(tmp_path / "list.txt")


def test_a_parquet_table_of_paths_or_pictures(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pictures = [png(shade) for shade in range(70)]  # more than one block of rows
    table = pa.table(
        {
            "path": [f"{number}.png" for number in range(70)],
            "raw": pictures,
            "image": [
                {"bytes": each, "path": f"{number}.png" if number else None}
                for number, each in enumerate(pictures)
            ],
            "label": list(range(70)),
        }
    )
    file = tmp_path / "table.parquet"
    parquet.write_table(table, file)
    found, (count, _) = given(file)
    assert [picture for _, picture in found] == [tmp_path / f"{n}.png" for n in range(70)]
    assert count == 70
    for column in ("raw", "image"):
        found, (count, _) = given(file, column=column)
        assert [picture for _, picture in found] == pictures
        assert count == 70
        assert found[0][0] == f"{file}/row 1"
        assert found[1][0] == f"{file}/{'row 2' if column == 'raw' else '1.png'}"
    with pytest.raises(InputError, match="--path-column label: int64 in"):
        given(file, column="label")
    with pytest.raises(InputError, match="--path-column nothing: expected such a column"):
        given(file, column="nothing")
    with pytest.raises(InputError, match="holds the pictures themselves"):
        list_pictures(file, "raw", LeftOut())
    file.write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match=r"not a \.parquet file"):
        given(file)


class Trap:
    """Unpickling it ends the test."""

    def __reduce__(self):
        return (pytest.fail, ("a member was unpickled",))


@pytest.fixture
def shards(tmp_path):
    """Two shards of two samples, with members that a careless reader would unpickle."""
    pytest.importorskip("webdataset")
    trap = pickle.dumps(Trap())
    for shard in range(2):
        members = [("__meta__", b"x")]
        for sample in range(2):
            key = f"s/{2 * shard + sample:04}"
            members += [
                (f"{key}.cls", b"1"),
                (f"{key}.PNG", png(2 * shard + sample)),
                (f"{key}.pyd", trap),
                (f"{key}.pickle", trap),
            ]
        write_shard(tmp_path / f"train-{shard:02}.tar", members)
    return tmp_path


def test_shards(shards):
    """Under two processes too, where the library itself would refuse or split them."""
    expected = [png(shade) for shade in range(4)]
    found, (count, digest) = given(shards / "train-{00..01}.tar")
    assert [picture for _, picture in found] == expected
    assert found[3][0] == str(shards / "train-01.tar" / "s/0003.png")
    assert count is None
    alone, other = given(shards / "train-01.tar")
    assert [picture for _, picture in alone] == expected[2:]
    assert other[1] != digest


def test_shards_are_not_split_by_what_the_machine_says(shards, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(given(shards / "train-{00..01}.tar")[0]) == 4


def test_a_folder_of_counted_shards(shards):
    for shard in range(2):
        (shards / f"train-{shard:02}.tar").rename(shards / f"{shard}.tar")
    (shards / "nshards.txt").write_text("2\n")
    assert [picture for _, picture in given(shards)[0]] == [png(shade) for shade in range(4)]
    (shards / "nshards.txt").write_text("3")
    with pytest.raises(InputError, match=r"2\.tar does not exist, expected a shard"):
        given(shards)
    (shards / "nshards.txt").write_text("many")
    with pytest.raises(InputError, match=r"nshards\.txt: expected the number of shards"):
        given(shards)


@pytest.mark.parametrize("argument", ["train-{00..02}.tar", "pipe:echo {1..2}.tar", "x.tar"])
def test_shards_that_are_missing(argument, shards, monkeypatch):
    monkeypatch.chdir(shards)
    with pytest.raises(InputError, match="does not exist, expected a shard"):
        given(argument)


def test_samples_without_one_picture(shards):
    file = write_shard(
        shards / "odd.tar",
        [("a.jpg", b"1"), ("a.png", b"2"), ("b.cls", b"3"), ("c.jpg", b"4"), ("c.left.jpg", b"5")],
    )
    (first, second), _ = given(file)
    assert isinstance(first[1], InputError)
    assert "expected one picture a sample, it has jpg and png" in str(first[1])
    assert second[1] == b"4"


def test_members_that_lead_out_of_a_shard(shards):
    names = ("../a.jpg", "/etc/b.jpg", "./c.jpg")
    file = write_shard(shards / "odd.tar", [(name, b"1") for name in names])
    (first, second, third), _ = given(file)
    for (name, picture), member in ((first, names[0]), (second, names[1])):
        assert name.startswith(f"{file}/")
        assert f"{member!r} leads out of the shard" in str(picture)
    assert third == (f"{file}/c.jpg", b"1")


def test_damaged_shards(shards):
    file = shards / "train-00.tar"
    content = file.read_bytes()
    with tarfile.open(file) as archive:
        between = archive.getmembers()[3].offset  # where tarfile sees no damage
    for damaged in (b"no tar at all" * 100, content[: len(content) // 4], content[:between]):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"train-00\.tar: not a whole \.tar file"):
            given(file)
    write_shard(file, [("a.jpg", b"1"), ("a.jpg", b"2")])
    with pytest.raises(InputError, match=r"train-00\.tar: not a whole"):
        given(file)


def test_a_dataset_in_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "pictures" / "test").mkdir(parents=True)
    for shade in range(3):
        (tmp_path / "pictures" / "test" / f"{shade}.png").write_bytes(png(shade))
    found, (count, _) = given(f"hf:{tmp_path / 'pictures'}")
    assert [picture for _, picture in found] == [
        tmp_path / "pictures" / "test" / f"{shade}.png" for shade in range(3)
    ]
    assert count is None
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    rows = {
        "image": [{"bytes": png(0), "path": None}, {"bytes": None, "path": "/etc/hostname"}],
        "label": [0, 1],
    }
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    (tmp_path / "table").mkdir()
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(table.data.table, tmp_path / "table" / "train-00000-of-00001.parquet")
    (first, second), _ = given(f"hf:{tmp_path / 'table'}:train")
    assert first == (f"hf:{tmp_path / 'table'}/train/0", png(0))
    # A path in a table could lead anywhere.
    assert isinstance(second[1], InputError)


def test_datasets_that_are_none(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.png").write_bytes(png(0))
    with pytest.raises(InputError, match="expected hf:NAME:SPLIT, splits are test"):
        given(f"hf:{tmp_path}:train")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("words")
    with pytest.raises(InputError, match="is text, expected imagefolder or"):
        given(f"hf:{tmp_path / 'words'}")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hf:nobody/nothing: cannot be read") as refused:
        given("hf:nobody/nothing")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("library", "argument"),
    [("webdataset", "a.tar"), ("datasets", "hf:owner/name"), ("pyarrow", "a.parquet")],
)
def test_without_the_library(library, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not argument.startswith("hf:"):
        Path(argument).touch()
    monkeypatch.setitem(sys.modules, library, None)
    extra = {"pyarrow": "parquet"}.get(library, library)
    with pytest.raises(InputError) as refused:
        given(argument)
    assert f"needs {library} (pip install 'lamp_fast[{extra}]')" in str(refused.value)


def test_what_becomes_of_a_picture_in_a_shard(shards):
    """The same as of the file, through the Python object."""
    from lamp_fast.data.handed_over import read_taken

    for shade, (_, picture) in enumerate(given(shards / "train-{00..01}.tar")[0]):
        expected = np.zeros((3, 9, 9), np.uint8)
        expected[0] = shade
        assert np.array_equal(read_taken(0, picture).numpy(), expected)
