"""Training from WebDataset's shards and Hugging Face datasets: the folder's pictures, or one line.

The oracle is the folder source over the same pictures.
"""

import io
import json
import os
import pickle
import tarfile
import tracemalloc
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lamp_fast.classifier import Classifier
from lamp_fast.data.disk_cache import FOLDER_VARIABLE, written_files
from lamp_fast.data.loading import training_batches
from lamp_fast.data.pictures import check_pictures
from lamp_fast.data.settings import DataConfig
from lamp_fast.data.sources import load_source, shard_index
from lamp_fast.data.sources.files import LeftOut
from lamp_fast.data.sources.given import Inputs
from lamp_fast.data.sources.lists import PictureLists
from lamp_fast.data.transforms import Preprocessing, training_transform
from lamp_fast.errors import InputError
from lamp_fast.features.computing import read_pictures
from lamp_fast.features.settings import FeaturesConfig
from lamp_fast.fields import validate
from lamp_fast.runs.experiment import check_target, load_data, load_run

CLASSES = ("red_ant", "bee", "cat")
COUNTS = {"train": 4, "test": 2}


def png(*colour):
    stream = io.BytesIO()
    Image.new("RGB", (9, 9), colour).save(stream, format="PNG")
    return stream.getvalue()


def samples(part):
    """Label, class name, key and bytes of each picture, in the order of a folder of classes."""
    for label, name in enumerate(CLASSES):
        for number in range(COUNTS[part]):
            shade = 60 * number + (30 if part == "test" else 0)
            yield label, name, f"{name}-{number}", png(shade, 80 * label, 99)


def write_shard(file, members):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file


def members(part, ending="cls"):
    labels = {"cls": lambda label, _: b"%d\n" % label, "txt": lambda _, name: name.encode()}
    labels["json"] = lambda _, name: json.dumps({"label": name, "caption": 1}).encode()
    for label, name, key, content in samples(part):
        yield f"./{part}/{key}.png", content
        yield f"./{part}/{key}.{ending}", labels[ending](label, name)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One data set as class folders, as CLIP_benchmark's shards, and as a parquet dataset."""
    root = tmp_path_factory.mktemp("data")
    for part in COUNTS:
        for _, name, key, content in samples(part):
            file = root / "folder" / part / name / f"{key}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        all_members = list(members(part))
        half = len(all_members) // 4 * 2
        shards = root / "shards" / part
        write_shard(shards / "0.tar", all_members[:half])
        write_shard(shards / "1.tar", all_members[half:])
        (shards / "nshards.txt").write_text("2")
    (root / "shards" / "classnames.txt").write_text("red ant\nbee\ncat\n")
    return root


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The library, which keeps what it makes in the test's own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "library")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def hub_rows(datasets, part, names=CLASSES, column="label"):
    found = list(samples(part))
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("string")
    columns = {
        "image": [{"bytes": content, "path": None} for *_, content in found],
        column: [label if names else name for label, name, _, _ in found],
    }
    features = {"image": datasets.Image(), column: kind}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def contents(source):
    """Class name, and digest of each picture, by part."""
    return {
        part: sorted(
            (source.classnames[label], digest.tobytes())
            for label, digest in zip(pictures.labels, pictures.content_digests(), strict=True)
        )
        for part in ("train", "val", "test")
        for pictures in [getattr(source, part)]
    }


def together(parts):
    """The same of all parts."""
    return sorted(chain.from_iterable(parts.values()))


def refusal(name, root, **options):
    with pytest.raises(InputError) as refused:
        load_source(name, root, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_shards_hold_what_folders_hold(place):
    pytest.importorskip("webdataset")
    expected = load_source("folder", place / "folder")
    found = load_source("webdataset", place / "shards")
    assert found.classnames == ("red ant", "bee", "cat")
    assert set(found.classnames) == set(expected.classnames)
    assert contents(found) == contents(expected)
    assert found.drawn == ()
    # Names are the same wherever the folder lies.
    assert found.train.names[0] == "train/0.tar/train/red_ant-0.png"
    assert found.train.name(0) == str(place / "shards" / found.train.names[0])
    # What a worker process is sent.
    again = pickle.loads(pickle.dumps(found.train.select([5, 2])))
    assert [again.content(index) for index in (0, 1)] == [
        found.train.content(5),
        found.train.content(2),
    ]
    checked, unreadable, _ = check_pictures(found.train, progress=False)
    assert not unreadable
    assert np.array_equal(checked.digests, found.train.content_digests())


@pytest.mark.parametrize(
    ("ending", "column"), [("json", "label"), ("txt", "txt"), ("cls", "cls"), ("json", "LABEL")]
)
def test_where_labels_stand(ending, column, place, tmp_path):
    pytest.importorskip("webdataset")
    shard = write_shard(tmp_path / "a{b}.tar", members("train", ending))
    names = place / "shards" / "classnames.txt"
    lists = PictureLists({}, names if ending == "cls" else None)
    if column == "LABEL":
        told = refusal("webdataset", shard, lists=lists, label_column=column)
        assert "expected KEY.label or 'LABEL' in KEY.json" in told
        return
    source = load_source("webdataset", shard, lists=lists, label_column=column)
    assert set(source.classnames) == {"red ant", "bee", "cat"}
    assert source.drawn == ("val", "test")
    whole = load_source("folder", place / "folder" / "train")
    assert contents(source).keys() == contents(whole).keys()
    assert together(contents(source)) == together(contents(whole))


def test_patterns_of_parts(place):
    pytest.importorskip("webdataset")
    root = place / "shards"
    files = {part: root / part / "{0..1}.tar" for part in COUNTS}
    names = root / "classnames.txt"
    source = load_source("webdataset", None, lists=PictureLists(files, names))
    assert contents(source) == contents(load_source("folder", place / "folder"))
    data = DataConfig(data="webdataset", test=files["test"], names=names)
    assert len(check_target(data)[0].test_base) == len(CLASSES) * COUNTS["test"]
    assert "--train: missing beside --test" in refusal(
        "webdataset", None, lists=PictureLists({"test": files["test"]}, names)
    )
    told = refusal("webdataset", root, lists=PictureLists(files))
    assert told == f"--root {root}: expected it or --train, --test, not both"
    told = refusal("webdataset", None, lists=PictureLists({"train": files["train"]}))
    assert told.endswith(f"the first of label 0, or {root}/train/classnames.txt")
    same = {"train": files["train"], "test": root / "train" / "1.tar"}
    assert "1.tar: is listed twice" in refusal("webdataset", None, lists=PictureLists(same, names))
    gone = {"train": root / "train" / "{0..9}.tar"}
    told = refusal("webdataset", None, lists=PictureLists(gone, names))
    assert told.startswith(f"--train {gone['train']}: ")
    assert told.endswith("2.tar does not exist, expected a shard")


GOOD = (("a.png", png(1, 2, 3)), ("a.cls", b"0"), ("b.png", png(3, 2, 1)), ("b.cls", b"1"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ([*GOOD, ("c.png", b""), ("c.cls", b"7")], "c.png: label '7', expected 0..2, a label for"),
        ([*GOOD, ("c.png", b""), ("c.cls", b"-1")], "label '-1', expected 0..2"),
        ([*GOOD, ("c.png", b""), ("c.cls", b"")], "c.png: label '', expected a class name or int"),
        ([*GOOD, ("c.png", b""), ("c.cls", b"\xff")], "its cls cannot be read as UTF-8"),
        ([*GOOD, ("c.png", b""), ("c.json", b"{")], "c.png: its json is no JSON"),
        (
            [*GOOD, ("c.png", b"")],
            "c.png: has no label beside it, expected KEY.label or KEY.cls",
        ),
        ([*GOOD, ("c.cls", b"1")], "expected one picture a sample, it has none"),
        ([*GOOD, ("b.jpg", b""), ("c.cls", b"1")], "it has png and jpg"),
        ([*GOOD, *GOOD], "'a.png' is there twice, expected every picture once"),
        ([*GOOD, ("../c.png", b""), ("../c.cls", b"1")], "'../c.png' leads out of the shard"),
        ([*GOOD, ("/etc/c.png", b""), ("/etc/c.cls", b"1")], "'/etc/c.png' leads out of the"),
        ([("readme.md", b"words")], "the shards of whole hold no samples"),
        (GOOD, "1 of 3 classes have no training picture, first 'cat'"),
    ],
)
def test_samples_that_cannot_be_trained_on(changed, told, place, tmp_path):
    pytest.importorskip("webdataset")
    shard = write_shard(tmp_path / "a.tar", changed)
    names = place / "shards" / "classnames.txt"
    found = refusal("webdataset", shard, lists=PictureLists({}, names))
    assert told in found
    assert str(shard) in found


def test_folders_that_are_no_shards(place, tmp_path):
    pytest.importorskip("webdataset")
    assert "needs NAME-{0000..0099}.tar" in refusal("webdataset", None)
    for root, there in (("gone", "does not exist"), (".", "has no shards")):
        told = refusal("webdataset", tmp_path / root)
        assert told.startswith(f"--root {tmp_path / root}: {there}, expected NAME")
    (tmp_path / "text").write_text("words")
    assert "is no shard, expected NAME" in refusal("webdataset", tmp_path / "text")
    for name, why in (
        ("other", "other is no part"),
        ("training", "training is one more folder"),
    ):
        root = tmp_path / f"parts-{name}"
        for part in ("train", name):
            write_shard(root / part / "0.tar", GOOD)
            (root / part / "nshards.txt").write_text("1")
        assert why in refusal("webdataset", root)


@pytest.mark.parametrize("cut", ["between members", "within a picture", "within a header"])
def test_a_shard_that_is_cut_short(cut, place, tmp_path):
    """Also where it is cut between two members, which tarfile takes for the end."""
    pytest.importorskip("webdataset")
    shard = write_shard(tmp_path / "a.tar", GOOD)
    with tarfile.open(shard) as archive:
        last = archive.getmember("b.png")
    size = {"between members": last.offset, "within a picture": last.offset_data + 5}
    os.truncate(shard, size.get(cut, last.offset + 100))
    names = PictureLists({}, place / "shards" / "classnames.txt")
    assert "a.tar: not a whole .tar file of samples" in refusal("webdataset", shard, lists=names)


def test_an_index_is_made_once(place, tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    shard = write_shard(tmp_path / "a.tar", members("train", "txt"))
    made = []
    monkeypatch.setattr(shard_index, "read_samples", lambda *each: made.append(each) or read(*each))

    def load():
        before = len(made)
        found = contents(load_source("webdataset", shard, label_column="txt"))
        return found, len(made) - before

    expected, count = load()
    assert count == 1
    assert load() == (expected, 0)
    (entry,) = written_files(tmp_path / "cache" / "shards")
    content = bytearray(Path(entry.path).read_bytes())
    content[-9] ^= 1
    Path(entry.path).write_bytes(content)
    assert load() == (expected, 1)
    # The same bytes in another order are another shard.
    turned = list(members("train", "txt"))
    os.utime(write_shard(shard, [*turned[2:], *turned[:2]]), ns=(0, 0))
    found, count = load()
    assert count == 1
    assert together(found) == together(expected)


read = shard_index.read_samples


def test_pictures_are_not_held(tmp_path):
    """Listing and labels take less than one of the pictures."""
    pytest.importorskip("webdataset")
    size = 2_000_000
    names = [f"{number:04}" for number in range(4)]
    picture = os.urandom(size)
    shard = write_shard(
        tmp_path / "a.tar",
        [each for key in names for each in ((f"{key}.png", picture), (f"{key}.txt", b"cat dog"))],
    )
    store = shard_index.ShardStore((shard,))
    tracemalloc.start()
    try:
        shard_index.index_shards(store, tmp_path, {"train": [shard]}, "txt")
        assert tracemalloc.get_traced_memory()[1] < size / 2
    finally:
        tracemalloc.stop()


@pytest.fixture
def ordered(tmp_path):
    """Shards in the order in which folders are listed."""
    for part in COUNTS:
        found = sorted(members(part, "txt"), key=lambda each: each[0])
        write_shard(tmp_path / "ordered" / part / "0.tar", found)
        (tmp_path / "ordered" / part / "nshards.txt").write_text("1")
    return tmp_path / "ordered"


def test_training_sees_of_shards_what_it_sees_of_folders(place, ordered):
    """Every batch of every part of the protocol, with a long tail, to the bit."""
    pytest.importorskip("webdataset")
    benchmarks = [
        load_data(DataConfig(data=name, root=root, imb=2, label_column="txt"), seed=1)[1]
        for name, root in (("folder", place / "folder"), ("webdataset", ordered))
    ]
    assert [each.counts.tolist() for each in benchmarks] == [[4, 2, 2]] * 2
    transform = training_transform(Preprocessing(size=8))
    for part in ("train", "test_base"):
        batches = [
            list(training_batches(getattr(each, part), transform, 3, seed=1).epoch(2))
            for each in benchmarks
        ]
        assert len(batches[0]) == len(batches[1]) > 0
        for one, other in zip(*batches, strict=True):
            assert all(map(torch.equal, one, other))
    data = DataConfig(data="webdataset", root=ordered, label_column="txt")
    listed = read_pictures(FeaturesConfig(out=Path("unused"), data=data))
    expected = [each.content_digests() for each in (benchmarks[0].train, benchmarks[0].test_base)]
    assert {*map(bytes, np.concatenate(expected))} <= {*map(bytes, listed.pictures.digests)}
    assert listed.known["class"].count("cat") == sum(COUNTS.values())


def test_a_run_finds_its_shards_where_they_lie_now(ordered, tmp_path):
    pytest.importorskip("webdataset")
    out = tmp_path / "run"
    flags = {"data": "webdataset", "root": ordered, "label_column": "txt"}
    Classifier.train(method="zeroshot", out=out, clip="tiny", cache_size=0, **flags)
    moved = ordered.rename(tmp_path / "moved")
    assert len(load_run(out, root=moved)[0].benchmark.test_base) == 6
    write_shard(moved / "test" / "0.tar", members("train", "txt"))
    with pytest.raises(InputError, match="the data are not those of the run"):
        load_run(out, root=moved)
    # The run itself goes on to predict from shards as it was trained on them.
    given = Inputs([moved / "train" / "0.tar"], "path", LeftOut())
    answers = Classifier.load(out).classify([each.picture for each in given], top=1)
    assert {answer.names[0] for answer in answers} <= {"red ant", "bee", "cat"}
    assert len(answers) == 12


def test_datasets_hold_what_folders_hold(place, tmp_path, hub):
    pytest.importorskip("pyarrow.parquet")
    (tmp_path / "parquet").mkdir()
    for part in COUNTS:
        rows = hub_rows(hub, part)
        rows.to_parquet(tmp_path / "parquet" / f"{part}-00000-of-00001.parquet")
    hub.DatasetDict({part: hub_rows(hub, part) for part in COUNTS}).save_to_disk(tmp_path / "saved")
    expected = load_source("folder", place / "folder")
    found = []
    for root in (tmp_path / "parquet", tmp_path / "saved", place / "folder"):
        source = load_source("hf", root)
        assert contents(source) == contents(expected)
        found.append(source)
    assert found[0].classnames == ("red ant", "bee", "cat")
    assert found[0].train.names[3] == "train/3"
    again = pickle.loads(pickle.dumps(found[0].test.select([1])))
    assert again.content(0) == found[0].test.content(1)
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\nthree\n")
    renamed = load_source("hf", tmp_path / "saved", lists=PictureLists({}, names))
    assert renamed.classnames == ("one", "two", "three")
    names.write_text("one\ntwo\n")
    told = refusal("hf", tmp_path / "saved", lists=PictureLists({}, names))
    assert told == f"--names {names}: has 2 names, expected the 3 of column label"


def test_splits_and_labels_of_datasets(tmp_path, hub):
    """Splits are parts by their names; without parts everything is split here."""

    def saved(**splits):
        folder = tmp_path / f"saved-{len(list(tmp_path.iterdir()))}"
        hub.DatasetDict(splits).save_to_disk(folder)
        return folder

    train, test = hub_rows(hub, "train"), hub_rows(hub, "test")
    hidden = test.map(lambda row: {"label": -1}, features=test.features)
    source = load_source("hf", saved(train=train, validation=test, test=hidden))
    assert "left out: split test, which has no labels" in source.notes
    assert len(source.test) == len(test)
    source = load_source("hf", saved(everything=train))
    assert source.drawn == ("val", "test")
    source = load_source("hf", saved(train=train, test=test, extra=test))
    assert source.notes == ("left out: split extra, which is no part",)
    told = refusal("hf", saved(val=test, validation=test, train=train))
    assert told.endswith("splits val and validation are both the part val")
    told = refusal("hf", saved(one=train, two=test))
    assert told.endswith("labels are one, two, expected train, validation or test")
    # Another name is found where it is the only one of its kind.
    other = hub_rows(hub, "train", column="fine")
    assert load_source("hf", saved(train=other)).classnames == ("red ant", "bee", "cat")
    words = hub_rows(hub, "train", names=None)
    assert load_source("hf", saved(train=words)).classnames == ("bee", "cat", "red ant")
    words = words.rename_column("label", "kind")
    told = refusal("hf", saved(train=words))
    assert told.startswith("--label-column label: expected a column of --root")
    assert told.endswith("which has 'image', 'kind'")
    numbers = train.cast_column("label", hub.Value("int64"))
    told = refusal("hf", saved(train=numbers))
    assert "--names: missing; labels are numbers, as '0' of hf:" in told
    gaps = train.map(lambda row, at: {"label": -1 if at == 3 else 0}, with_indices=True)
    assert "train/3: label '-1', expected 0..2" in refusal("hf", saved(train=gaps))
    told = refusal("hf", "nobody/nothing")
    assert told.startswith("--root nobody/nothing: cannot be read (")


def test_a_name_on_the_hub_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert DataConfig(data="hf", root=Path("owner/name")).resolved().root == Path("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    there = DataConfig(data="hf", root=Path("owner/name")).resolved().root
    assert there == tmp_path / "owner" / "name"
    for name in ("train", "table"):
        with pytest.raises(InputError, match=f"--{name} x: expected --data"):
            validate(DataConfig(data="hf", **{name: Path("x")}))
    with pytest.raises(InputError, match="--root: missing; --data hf needs a name"):
        load_source("hf", None)


@pytest.mark.parametrize(("name", "extra"), [("webdataset", "webdataset"), ("hf", "datasets")])
def test_without_the_library(name, extra, place, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, extra, None)
    told = refusal(name, place / "shards")
    assert f"needs {extra} (pip install 'lamp_fast[{extra}]')" in told
