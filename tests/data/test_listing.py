"""Every file below a folder of pictures is listed, or counted among what is left out."""

import json
import os

import pytest
from PIL import Image

from lamp_fast.data.benchmark import build_benchmark
from lamp_fast.data.names import odd_names
from lamp_fast.data.sources import load_source
from lamp_fast.data.sources.files import LeftOut, pictures_below
from lamp_fast.errors import InputError


def save(root, *names):
    for number, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, len(name), 90)).save(file, "PNG")
    return root


def classes(root, *names, count=2):
    return save(root, *(f"{name}/{number}.png" for name in names for number in range(count)))


def run_folder(folder):
    """What a run leaves: its record, and plots that look like training pictures."""
    save(folder, "curves.png", "on_other/per_class.png")
    record = {"settings": {}, "version": "0", "clip": {}, "data": {}}
    (folder / "config.json").write_text(json.dumps(record))


def listed(root):
    source = load_source("folder", root)
    parts = (source.train, source.val, source.test)
    return sorted(name for part in parts for name in part.names), source


def refusal(root, **options):
    with pytest.raises(InputError) as error:
        load_source("folder", root, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


PNG_NAMES = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]


def test_other_endings_of_the_same_formats_are_pictures(tmp_path):
    root = classes(tmp_path, "cat", "dog")
    Image.new("RGB", (4, 4)).save(root / "cat" / "a.jfif", "JPEG")
    Image.new("RGB", (4, 4)).save(root / "dog" / "b.JPE", "JPEG")
    names, source = listed(root)
    assert names == sorted([*PNG_NAMES, "cat/a.jfif", "dog/b.JPE"])
    assert source.notes == ()


def test_what_looks_like_a_picture_and_is_not_read_is_counted(tmp_path):
    root = classes(tmp_path, "cat", "dog")
    for name in ("cat/1.HEIC", "cat/2.heic", "dog/3.avif", "cat/4.CR2"):
        (root / name).write_bytes(b"\0\0\0\x18ftypheic")
    for name, content in (("jpeg", b"\xff\xd8\xff\xe0"), ("heif", b"\0\0\0\x18ftypheic")):
        (root / "cat" / name).write_bytes(content)
    (root / "cat" / "LICENSE").write_text("free")
    (root / "cat" / "list.txt").write_text("0.png")
    save(root, "loose.png", "also.png")
    os.mkfifo(root / "cat" / "pipe")  # looking into it would wait for a writer
    names, source = listed(root)
    assert names == PNG_NAMES
    assert source.notes == (
        "left out: .avif files, a format that is not read: 1 ('dog/3.avif')",
        "left out: .cr2 files, a format that is not read: 1 ('cat/4.CR2')",
        "left out: .heic files, a format that is not read: 2 (first 'cat/1.HEIC')",
        "left out: files that are no pictures: 3 (first 'cat/LICENSE')",
        "left out: pictures beside the class folders: 2 (first 'also.png')",
        "left out: pictures whose names have no ending, as .jpg: 2 (first 'cat/heif')",
    )
    benchmark = build_benchmark(source, split="all", imb=1, cap=None, shots=None, seed=1)
    assert set(source.notes) < set(benchmark.describe())


@pytest.mark.parametrize(
    "folder",
    ["@eaDir", "cat/@eaDir", "__MACOSX/cat", "dog/deep/#recycle", "$RECYCLE.BIN", "LOST+FOUND"],
)
def test_folders_that_systems_make_hold_no_pictures_of_ours(tmp_path, folder):
    root = classes(tmp_path, "cat", "dog")
    save(root, f"{folder}/0.png/thumbnail.png", f"{folder}/._0.png")
    names, source = listed(root)
    assert names == PNG_NAMES
    made = folder.removesuffix("/cat") if folder.startswith("__") else folder
    assert source.notes == (f"left out: folders that systems make: 1 ({made!r})",)


def test_hidden_folders_are_named(tmp_path):
    root = classes(tmp_path, "java", "ruby", ".NET")
    names, source = listed(root)
    assert {name.split("/")[0] for name in names} == {"java", "ruby"}
    assert source.notes == ("left out: hidden folders: 1 ('.NET')",)


@pytest.mark.parametrize("place", ["run", "runs/one", "runs/deep/er", "cat/run", "cat/a/b"])
def test_run_folders_are_no_pictures(tmp_path, place):
    root = classes(tmp_path, "cat", "dog")
    run_folder(root / place)
    names, source = listed(root)
    assert source.classnames == ("cat", "dog")
    assert names == PNG_NAMES
    assert source.notes == (f"left out: folders of runs: 1 ({place!r})",)


def test_run_folders_beside_parts(tmp_path):
    root = classes(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog")
    run_folder(root / "runs" / "one")
    names, source = listed(root)
    assert source.classnames == ("cat", "dog")
    assert len(names) == 8


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": {}}', '{"model_type": "clip"}'])
def test_another_programs_settings_make_no_run(tmp_path, content):
    root = classes(tmp_path, "cat", "dog")
    (root / "cat" / "config.json").write_text(content)
    assert listed(root)[0] == PNG_NAMES


def test_links(tmp_path):
    root = classes(tmp_path / "data", "cat", "dog")
    classes(tmp_path / "elsewhere", "more")
    (root / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (root / "cat" / "again").symlink_to(root / "cat")
    (root / "cat" / "circle").symlink_to("circle")
    names, source = listed(root)
    assert names == sorted([*PNG_NAMES, "cat/more/0.png", "cat/more/1.png"])
    assert source.notes == (
        "left out: files that are no pictures: 1 ('cat/circle')",
        "left out: links to a folder that is listed already: 1 ('cat/again')",
    )


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    """Simulated, because the permissions of files do not stop root."""
    root = classes(tmp_path, "cat", "dog")
    scandir = os.scandir

    def refuse_dog(folder):
        if os.path.basename(folder) == "dog":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse_dog)
    assert "dog" in refusal(root)
    left_out = LeftOut(skip_unreadable=True)
    assert pictures_below(root, left_out) == ["cat/0.png", "cat/1.png"]
    assert left_out.lines() == ("left out: folders that cannot be read: 1 ('dog')",)


@pytest.mark.parametrize(
    "names",
    [
        ("train/cat", "train/dog", "test/cat", "test/dog", "unlabelled"),
        ("train/cat", "train/dog", "extra"),
        ("seg_train/seg_train/sea", "seg_test/seg_test/sea", "seg_pred/seg_pred"),
        ("TrainImages/cat", "TestImages/cat"),
        ("train2017/cat", "val2017/cat"),
        ("cat", "dog", "test"),
        ("cat", "validation/cat", "dog"),
        ("train", "test", "bus"),
    ],
)
def test_what_looks_like_parts_and_is_not_clear_is_refused(tmp_path, names):
    """As classes they would be trained on without a word."""
    message = refusal(classes(tmp_path, *names))
    assert "look like parts" in message or "looks like a part" in message


@pytest.mark.parametrize(
    "names",
    [
        ("bus", "train"),
        ("bullet_train", "steam_train", "test_tube"),
        ("valid", "invalid"),
        ("training shoes", "devil", "contest"),
    ],
)
def test_classes_may_be_called_like_parts(tmp_path, names):
    source = load_source("folder", classes(tmp_path, *names))
    assert source.classnames == tuple(sorted(name.replace("_", " ") for name in names))


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        (("training_set", "test_set"), (4, 0, 4)),
        (("Train", "dev"), (4, 0, 4)),
        (("trainval", "TEST"), (4, 0, 4)),
        (("train-set", "valset", "testset"), (4, 4, 4)),
    ],
)
def test_parts_by_the_names_that_data_sets_give_them(tmp_path, parts, sizes):
    root = classes(tmp_path, *(f"{part}/{name}" for part in parts for name in ("cat", "dog")))
    (root / "annotations").mkdir()
    (root / "annotations" / "list.txt").write_text("nothing to train on")
    source = load_source("folder", root)
    assert source.classnames == ("cat", "dog")
    assert (len(source.train), len(source.val), len(source.test)) == sizes
    assert source.drawn == ()
    assert source.notes[-1] == (
        "left out: folders without pictures beside the parts: 1 ('annotations')"
    )


def test_a_part_without_class_folders(tmp_path):
    root = save(classes(tmp_path, "train/cat", "train/dog"), "test/0.png", "test/1.png")
    assert "test holds pictures of no class" in refusal(root)


def test_test_pictures_alone_are_not_trained_on(tmp_path):
    root = classes(tmp_path, "val/cat", "val/dog", "test/cat", "test/dog")
    assert "evaluate RUN --data folder" in refusal(root)
    assert len(load_source("folder", root, only_test=True).test) == 4


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("cat", "dog"), 4),
        (("test/cat", "test/dog"), 4),
        (("train/cat", "train/dog"), 4),
        (("train/cat", "train/dog", "val/cat", "val/dog"), 4),
        (("train/cat", "train/dog", "val/cat", "test/dog"), 2),
    ],
)
def test_what_is_only_tested_needs_nothing_to_train_on(tmp_path, folders, expected):
    """Of pictures without parts all are scored, not a drawn share of them."""
    source = load_source("folder", classes(tmp_path, *folders), only_test=True)
    assert source.classnames == ("cat", "dog")
    assert len(source.test) == expected
    assert not {*source.train.names, *source.val.names} & set(source.test.names)
    assert source.drawn == ()


def test_one_picture_a_class_can_be_tested(tmp_path):
    root = classes(tmp_path, "cat", "dog", count=1)
    (root / "elk").mkdir()  # a name to choose among
    source = load_source("folder", root, only_test=True)
    assert source.classnames == ("cat", "dog", "elk")
    assert source.test.names == ("cat/0.png", "dog/0.png")


NUMBERED = [
    ("001.Black_footed_Albatross", "Black footed Albatross"),
    ("n02085620-Chihuahua", "Chihuahua"),
    ("n02085620", ""),
    ("007_crow", "crow"),
    ("12 - gull", "gull"),
]


@pytest.mark.parametrize(("folder", "name"), NUMBERED)
def test_numbers_in_front_of_names_are_pointed_out(tmp_path, folder, name):
    source = load_source("folder", classes(tmp_path, folder, "n99999999-tench", "elk"))
    benchmark = build_benchmark(source, split="all", imb=1, cap=None, shots=None, seed=1)
    [line] = [each for each in benchmark.describe() if "begin with a number" in each]
    assert line.startswith("2 class names")
    assert "classes.json" in line
    assert repr(folder.replace("_", " ")) in line
    assert not name or repr(name) in line
    reasons = [each.reason for each in odd_names(source.classnames, "{}")]
    assert sum("a number in front" in reason for reason in reasons) == 2


@pytest.mark.parametrize(
    "names",
    [
        ("2007 BMW X5 SUV", "2012 Audi A5", "1998 Nissan 240SX"),
        ("18-25 years", "26-40 years"),
        ("4-wheel drive", "tractor", "bus"),
        ("0", "1", "2"),
        ("7up", "3d printer"),
    ],
)
def test_numbers_that_are_part_of_a_name(tmp_path, names):
    source = load_source("folder", classes(tmp_path, *names))
    benchmark = build_benchmark(source, split="all", imb=1, cap=None, shots=None, seed=1)
    assert not [each for each in benchmark.describe() if "begin with a number" in each]
