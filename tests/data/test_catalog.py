"""The field's data sets, each read from a miniature of its real layout."""

import contextlib
import dataclasses
import io
import itertools
import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from miniatures import (
    CARS_TEST,
    CLASSNAMES,
    JPEG,
    MINIATURES,
    SPLIT_FILES,
    TEMPLATES,
    dtd,
    eurosat,
    fgvc_aircraft,
    flowers102,
    imagenet,
    imagenet_a,
    imagenet_r,
    imagenet_sketch,
    imagenetv2,
    put,
    refusal,
    stanford_cars,
    sun397,
    write,
    write_cars,
    write_split,
)
from scipy.io import savemat

from lamp_fast.data import catalog, sources
from lamp_fast.data.benchmark import build_benchmark, transfer_benchmark
from lamp_fast.data.catalog import CATALOG
from lamp_fast.data.sources import layouts, load_source, matlab

pytestmark = pytest.mark.filterwarnings("ignore:--data")


@pytest.fixture(autouse=True)
def reader_in_this_process(monkeypatch):
    """The same reader of .mat files without the half second that a process of its own takes."""

    def run(arguments):
        printed = io.StringIO()
        monkeypatch.setattr(sys, "argv", ["-c", *arguments])
        try:
            with contextlib.redirect_stdout(printed):
                exec(matlab.READER, {})
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return json.loads(printed.getvalue())

    monkeypatch.setattr(matlab, "_run", run)


def listed(pictures):
    return list(zip(pictures.names, pictures.labels.tolist(), strict=True))


# What has no validation part.
WITHOUT_VAL = ("inaturalist2018", "cifar100_lt")
TEST_ONLY = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
# Without a split file these are drawn: all three parts, or val alone.
DRAWN = dict.fromkeys(("caltech101", "flowers102", "food101", "dtd", "eurosat"), ("val", "test"))
DRAWN |= dict.fromkeys(("oxford_pets", "stanford_cars", "sun397", "ucf101"), ("val",))


def class_of(name, path):
    """Which class a picture of a miniature shows, by its path alone; None where that says nothing.

    An oracle of labels: what the annotation files say must agree with it.
    """
    if name in ("caltech101", "food101", "dtd", "eurosat", "ucf101"):
        return Path(path).parts[0].replace("_", " ")
    if name == "oxford_pets":
        return path.rpartition("_")[0].lower().replace("_", " ")
    if name == "sun397":
        return " ".join(Path(path).parent.parts[:0:-1]).replace("_", " ")
    return None


def test_the_catalog_is_complete():
    assert list(CATALOG) == list(TEMPLATES)
    for name, entry in CATALOG.items():
        assert entry.template == TEMPLATES[name]
        assert entry.test_only == (name in TEST_ONLY)
        assert (entry.folder, entry.images, entry.split_file) == SPLIT_FILES.get(
            name, (entry.folder, entry.images, None)
        )


def test_published_counts():
    """Totals as the data sets state them, where the parts are shares of them by rule."""
    totals = {"food101": 101_000, "eurosat": 27_000, "dtd": 5_640, "flowers102": 8_189}
    official = {"oxford_pets": 3_680, "stanford_cars": 8_144, "sun397": 19_850, "ucf101": 9_537}
    for name, total in totals.items():
        assert sum(CATALOG[name].counts) == total
    for name, trainval in official.items():
        assert sum(CATALOG[name].counts[:2]) == trainval
    for name, size in (("food101", 1000), ("dtd", 120)):
        shares = [CATALOG[name].classes * round(size * share) for share in (0.5, 0.2, 0.3)]
        assert list(CATALOG[name].counts) == shares


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_a_split_file(tmp_path, name):
    names = MINIATURES[name](tmp_path)
    source = load_source(name, tmp_path)
    assert source.classnames == tuple(names)
    assert (source.name, source.template) == (name, TEMPLATES[name])
    assert source.drawn == DRAWN.get(name, ())
    assert source.test_only == (name in TEST_ONLY)
    for part in ("train", "val", "test"):
        pictures = getattr(source, part)
        nothing = (source.test_only and part != "test") or (name in WITHOUT_VAL and part == "val")
        assert (len(pictures) == 0) == nothing
        for path, label in listed(pictures):
            assert (pictures.root / path).read_bytes() == JPEG
            shown = class_of(name, path)
            if shown is not None:
                assert names[label] == CATALOG[name].renamed.get(shown, shown)
    if name != "imagenet":  # whose val pictures are its test pictures
        everything = [
            each for part in (source.train, source.val, source.test) for each in part.names
        ]
        assert len(everything) == len(set(everything))
    again = load_source(name, tmp_path)
    assert listed(again.train) == listed(source.train)


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_parts_have_the_published_shares(tmp_path, name):
    """Python's round, half to even, of 50% and 20% of every class; or of 20% of trainval."""
    MINIATURES[name](tmp_path)
    source = load_source(name, tmp_path)
    counts = [
        np.bincount(part.labels, minlength=len(source.classnames)).tolist()
        for part in (source.train, source.val, source.test)
    ]
    for train, val, test in zip(*counts, strict=True):
        if "test" in DRAWN[name]:
            total = train + val + test
            assert (train, val) == (round(total * 0.5), round(total * 0.2))
        else:
            assert val == round((train + val) * 0.2) > 0


def test_official_parts_stay_what_they_are(tmp_path):
    for name in ("oxford_pets", "stanford_cars", "fgvc_aircraft", "sun397", "ucf101"):
        MINIATURES[name](tmp_path)
    aircraft = load_source("fgvc_aircraft", tmp_path)
    assert listed(aircraft.train) == [("1025794.jpg", 2), ("1025795.jpg", 0), ("1025796.jpg", 1)]
    assert listed(aircraft.val)[0] == ("1025797.jpg", 2)
    assert listed(aircraft.test)[0] == ("1025800.jpg", 2)
    cars = load_source("stanford_cars", tmp_path)
    assert listed(cars.test) == [("cars_test/00001.jpg", 1), ("cars_test/00002.jpg", 0)]
    assert sorted(listed(cars.train) + listed(cars.val)) == [
        (f"cars_train/{number:05}.jpg", number % 2) for number in range(1, 11)
    ]
    pets = load_source("oxford_pets", tmp_path)
    assert listed(pets.test)[1:3] == [("Abyssinian_101.jpg", 0), ("Egyptian_Mau_100.jpg", 1)]
    sun = load_source("sun397", tmp_path)
    assert listed(sun.test)[:2] == [
        ("a/airplane_cabin/sun_Testing0.jpg", 3),
        ("c/church/indoor/sun_Testing0.jpg", 2),
    ]
    ucf = load_source("ucf101", tmp_path)
    assert listed(ucf.test)[2] == ("Yo_Yo/v_YoYo_test_0.jpg", 2)


def test_flowers_labels_are_those_of_their_numbers(tmp_path):
    flowers102(tmp_path)
    source = load_source("flowers102", tmp_path)
    labels = [2, 2, 1, 2, 1, 3, 3, 1, 2, 1, 3, 2]
    found = itertools.chain(*map(listed, (source.train, source.val, source.test)))
    assert sorted(found) == [
        (f"image_{at:05}.jpg", label - 1) for at, label in enumerate(labels, 1)
    ]


@pytest.mark.parametrize("name", SPLIT_FILES)
def test_with_a_split_file(tmp_path, name):
    rows = write_split(tmp_path, name)
    source = load_source(name, tmp_path)
    assert source.classnames == ("ant hill", "Bee")
    assert (source.template, source.drawn) == (TEMPLATES[name], ())
    for part in ("train", "val", "test"):
        assert listed(getattr(source, part)) == [(path, label) for path, label, _ in rows[part]]


@pytest.mark.parametrize("name", SPLIT_FILES)
def test_paths_of_a_split_file_stay_inside(tmp_path, name):
    folder, _, file = SPLIT_FILES[name]
    rows = write_split(tmp_path, name)
    put(tmp_path / "secret.jpg")
    rows["test"][0][0] = "../../secret.jpg"
    write(tmp_path / folder / file, json.dumps(rows))
    message = refusal(load_source, name, tmp_path)
    assert message.startswith(str(tmp_path / folder / file))
    assert "test[0] is '../../secret.jpg', expected a path inside the image folder" in message


def test_the_split_file_wins_over_official_files(tmp_path):
    MINIATURES["oxford_pets"](tmp_path)
    write_split(tmp_path, "oxford_pets")
    assert load_source("oxford_pets", tmp_path).classnames == ("ant hill", "Bee")


SPELLINGS = {
    "caltech101": ("Caltech101", "caltech-101"),
    "oxford_pets": ("OxfordPets",),
    "stanford_cars": ("StanfordCars",),
    "flowers102": ("OxfordFlowers", "oxford_flowers"),
    "food101": ("Food101", "food-101"),
    "fgvc_aircraft": ("FGVCAircraft",),
    "sun397": ("SUN397",),
    "dtd": ("DescribableTextures", "DTD"),
    "eurosat": ("EuroSAT",),
    "ucf101": ("UCF101",),
    "imagenet": ("ImageNet",),
    "imagenetv2": ("ImageNetV2", "imagenet_v2"),
    "imagenet_sketch": ("ImageNetSketch", "imagenet-sketch"),
    "imagenet_a": ("ImageNetA", "imagenet-a"),
    "imagenet_r": ("ImageNetR", "imagenet-r"),
    "imagenet_lt": ("ImageNet_LT", "ImageNet-LT"),
    "places_lt": ("Places_LT", "Places-LT"),
    "inaturalist2018": ("iNaturalist2018",),
    "cifar100_lt": ("CIFAR100_LT", "CIFAR-100-LT"),
}


def test_spellings():
    for name in TEMPLATES:
        for spelling in (name, *SPELLINGS[name]):
            assert catalog.find(spelling) == name
    for unknown in ("", "folder", "digits", "table", "imagenet1k", "cars"):
        assert catalog.find(unknown) is None


def test_a_spelling_is_the_data_set(tmp_path):
    dtd(tmp_path)
    assert load_source("DescribableTextures", tmp_path).name == "dtd"


def test_counts_are_held_against_the_published_ones(tmp_path, monkeypatch):
    eurosat(tmp_path)
    write_split(tmp_path, "dtd")
    with pytest.warns(UserWarning, match="^--data eurosat: ") as caught:
        load_source("eurosat", tmp_path)
    lines = [str(each.message) for each in caught]
    assert lines == [
        "--data eurosat: split_zhou_EuroSAT.json is missing, so val and test are drawn here: alike"
        " in every run, but not the published draw",
        "--data eurosat: 10 classes, 20 + 10 + 20 pictures (train + val + test), published results"
        " have 10 classes, 13,500 + 5,400 + 8,100 pictures",
    ]
    right = dataclasses.replace(CATALOG["dtd"], classes=2, counts=(4, 4, 4))
    wrong = dataclasses.replace(CATALOG["dtd"], classes=3, counts=(4, 4, 4))
    for entry, expected in ((right, 0), (wrong, 1)):
        monkeypatch.setattr(sources, "CATALOG", {"dtd": entry})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_source("dtd", tmp_path)
        assert len(caught) == expected


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "sun397").mkdir()
    assert layouts.missing(CATALOG["sun397"], tmp_path) == [
        "sun397/SUN397/",
        "sun397/split_zhou_SUN397.json (or sun397/ClassName.txt, sun397/Training_01.txt,"
        " sun397/Testing_01.txt)",
    ]
    message = refusal(load_source, "sun397", tmp_path)
    assert "--data sun397 needs sun397/SUN397/ and 1 more in it;" in message
    assert f"--check {tmp_path} says more" in message
    sun397(tmp_path)
    assert layouts.missing(CATALOG["sun397"], tmp_path) == []
    (tmp_path / "sun397" / "Testing_01.txt").unlink()
    assert "(or sun397/Testing_01.txt)" in refusal(load_source, "sun397", tmp_path)


@pytest.mark.parametrize("name", ["oxford_pets", "stanford_cars", "flowers102", "ucf101"])
def test_missing_pictures_of_official_files(tmp_path, name):
    MINIATURES[name](tmp_path)
    source = load_source(name, tmp_path)
    gone = Path(source.test.name(0))
    gone.unlink()
    message = refusal(load_source, name, tmp_path)
    assert "listed pictures are missing, first" in message
    assert str(gone) in message
    file = "imagelabels.mat" if name == "flowers102" else CATALOG[name].lists["test"]
    assert message.startswith(str(tmp_path / CATALOG[name].folder / file))


MALFORMED_LINES = {
    "pets short": ("oxford_pets", "annotations/test.txt", "Abyssinian_100", "BREED_NUMBER"),
    "pets label": ("oxford_pets", "annotations/test.txt", "Abyssinian_100 one 1 1", "BREED_NUMBER"),
    "pets no breed": ("oxford_pets", "annotations/test.txt", "Abyssinian 1 1 1", "BREED_NUMBER"),
    "pets label 0": ("oxford_pets", "annotations/test.txt", "a_b_1 0 1 1", "[path, label, class"),
    "pets escape": ("oxford_pets", "annotations/test.txt", "../a_1 1 1 1", "inside the image"),
    "variant": ("fgvc_aircraft", "images_variant_val.txt", "1025797 Fokker 70", "variants.txt"),
    "plane escape": ("fgvc_aircraft", "images_variant_val.txt", "../../x 707-320", "inside the"),
    "scene": ("sun397", "Testing_01.txt", "/a/alley/sun_1.jpg", "ClassName.txt"),
    "no slash": ("sun397", "Testing_01.txt", "a/abbey/sun_1.jpg", "ClassName.txt"),
    "action": ("ucf101", "ucfTrainTestlist/testlist01.txt", "Nap/v_1.avi", "classInd.txt"),
    "deep": ("ucf101", "ucfTrainTestlist/testlist01.txt", "YoYo/../v.avi", "classInd.txt"),
    "class": ("ucf101", "ucfTrainTestlist/classInd.txt", "YoYo", "NUMBER ACTION"),
}


@pytest.mark.parametrize("case", MALFORMED_LINES)
def test_malformed_lines(tmp_path, case):
    name, file, line, expected = MALFORMED_LINES[case]
    MINIATURES[name](tmp_path)
    file = tmp_path / CATALOG[name].folder / file
    lines = file.read_text().splitlines()
    write(file, "\n".join([lines[0], "", line, *lines[2:]]))
    message = refusal(load_source, name, tmp_path)
    assert message.startswith(f"{file}: line 3 is ")
    assert expected in message


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"\n \n"])
def test_lists_that_are_no_lists(tmp_path, content):
    fgvc_aircraft(tmp_path)
    file = tmp_path / "fgvc_aircraft" / "images_variant_test.txt"
    file.write_bytes(content)
    assert refusal(load_source, "fgvc_aircraft", tmp_path).startswith(str(file))


def test_matlab_files_that_are_none(tmp_path):
    stanford_cars(tmp_path)
    file = tmp_path / "stanford_cars" / CARS_TEST
    whole = file.read_bytes()
    for content in (b"", b"text", whole[:200], whole[: len(whole) // 2]):
        file.write_bytes(content)
        message = refusal(load_source, "stanford_cars", tmp_path)
        assert message.startswith(f"{file}: cannot be read as a .mat file (")
    savemat(file, {"other": [1]})
    message = refusal(load_source, "stanford_cars", tmp_path)
    assert message == f"{file}: has no variable 'annotations'"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (("../../secret.jpg", 1), "'cars_test/../../secret.jpg', expected a path inside"),
        (("00002.jpg", 3), "annotation 2 is "),
        (("00002.jpg", 0), "annotation 2 is "),
        ((7, 1), "annotation 2 is "),
        (("00002.jpg", "one"), "annotation 2 is "),
    ],
)
def test_annotations_that_make_no_sense(tmp_path, row, expected):
    stanford_cars(tmp_path)
    put(tmp_path / "secret.jpg")
    file = tmp_path / "stanford_cars" / CARS_TEST
    write_cars(file, [("00001.jpg", 2), row])
    message = refusal(load_source, "stanford_cars", tmp_path)
    assert message.startswith(str(file))
    assert expected in message


def test_a_single_annotation_is_a_list_of_one(tmp_path):
    stanford_cars(tmp_path)
    write_cars(tmp_path / "stanford_cars" / CARS_TEST, [("00001.jpg", 2)])
    assert listed(load_source("stanford_cars", tmp_path).test) == [("cars_test/00001.jpg", 1)]


def test_flowers_that_make_no_sense(tmp_path):
    flowers102(tmp_path)
    folder = tmp_path / "oxford_flowers"
    savemat(folder / "imagelabels.mat", {"labels": [[1, 4]]})
    assert "label 2 is 4, expected one of cat_to_name" in refusal(
        load_source, "flowers102", tmp_path
    )
    write(folder / "cat_to_name.json", "[]")
    assert "expected an object of label: class name" in refusal(load_source, "flowers102", tmp_path)


def test_imagenet_by_wnid(tmp_path):
    imagenet(tmp_path)
    source = load_source("imagenet", tmp_path)
    wnids = sorted(CLASSNAMES)
    assert [CLASSNAMES[wnid].replace("_", " ") for wnid in wnids] == list(source.classnames)
    for path, label in listed(source.train) + listed(source.test):
        assert Path(path).parts[1] == wnids[label]
    assert listed(source.val) == listed(source.test)
    assert [len(source.train), len(source.test)] == [12, 8]
    everything = build_benchmark(source, split="all", imb=3, cap=None, shots=None, seed=1)
    assert everything.base_names == source.classnames
    assert everything.counts.tolist() == [3, 2, 1, 1]


def test_imagenet_refusals(tmp_path):
    imagenet(tmp_path)
    images = tmp_path / "imagenet" / "images"
    shutil.move(images / "val" / "n01440764", tmp_path)
    message = refusal(load_source, "imagenet", tmp_path)
    assert "'n01440764' is in train/ alone (1 such)" in message
    for folder in list((images / "val").iterdir()):
        shutil.rmtree(folder)
    put(images / "val" / "ILSVRC2012_val_00000001.JPEG")  # as it comes out of the archive
    assert "in train/ alone (4 such)" in refusal(load_source, "imagenet", tmp_path)
    names = tmp_path / "imagenet" / "classnames.txt"
    write(names, names.read_text() + "n01440764 tench again\n")
    assert refusal(load_source, "imagenet", tmp_path).startswith(f"{names}: line 5 is ")


def test_folders_without_a_class_name(tmp_path):
    imagenet_a(tmp_path)
    put(tmp_path / "imagenet-adversarial" / "imagenet-a" / "n00000000" / "1.jpg")
    message = refusal(load_source, "imagenet_a", tmp_path)
    assert "folder 'n00000000' is no id of" in message


def test_imagenetv2_folders_are_lines(tmp_path):
    imagenetv2(tmp_path)
    source = load_source("imagenetv2", tmp_path)
    assert all(Path(path).parts[0] == str(label) for path, label in listed(source.test))
    images = tmp_path / "imagenetv2" / "imagenetv2-matched-frequency-format-val"
    (images / "4").mkdir()
    assert "folder '4' is one too many (1 such)" in refusal(load_source, "imagenetv2", tmp_path)
    shutil.rmtree(images / "1")
    assert "folder '1' is missing (2 such)" in refusal(load_source, "imagenetv2", tmp_path)


def test_a_variant_has_its_own_class_names_first(tmp_path):
    imagenet_sketch(tmp_path)
    assert layouts.missing(CATALOG["imagenet_sketch"], tmp_path) == []
    own = tmp_path / "imagenet-sketch" / "classnames.txt"
    write(own, "".join(f"{wnid} own {wnid}\n" for wnid in CLASSNAMES))
    expected = tuple(f"own {wnid}" for wnid in sorted(CLASSNAMES))
    assert load_source("imagenet_sketch", tmp_path).classnames == expected
    own.unlink()
    (tmp_path / "imagenet" / "classnames.txt").unlink()
    assert "imagenet-sketch/classnames.txt" in refusal(load_source, "imagenet_sketch", tmp_path)


@pytest.mark.parametrize("name", TEST_ONLY)
def test_what_has_no_training_pictures_is_not_trained_on(tmp_path, name):
    MINIATURES[name](tmp_path)
    source = load_source(name, tmp_path)
    message = refusal(build_benchmark, source, imb=1, cap=None, shots=None, seed=1)
    assert message.startswith(f"--data {name}: has no training pictures; ")
    benchmark = transfer_benchmark(source)
    assert benchmark.base_names == source.classnames
    assert listed(benchmark.test_base) == listed(source.test)
    assert benchmark.head is None
    assert benchmark.describe() == [
        f'{name}: {len(source.classnames)} classes, "a photo of a {{}}.", tested only',
        f"{len(source.test)} test pictures",
    ]


def test_a_class_of_a_test_set_without_pictures(tmp_path):
    imagenet_r(tmp_path)
    (tmp_path / "imagenet-rendition" / "imagenet-r" / "n03773504").mkdir()
    message = refusal(load_source, "imagenet_r", tmp_path)
    assert "1 of 4 classes have no test picture, first 'missile'" in message


def test_the_page_of_data_sets():
    """docs/data.md has a row a data set that says what the catalog says."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert [row[0].strip("|` ") for row in rows] == list(CATALOG)
    for row, entry in zip(rows, CATALOG.values(), strict=True):
        _, folder, split, files, template, classes, counts, home, licence = row
        assert folder == f"`{entry.folder}/{entry.images}`".replace("/`", "`")
        assert split == (f"`{entry.split_file}`" if entry.split_file else "none")
        assert re.findall("`(.*?)`", files) == list(entry.annotations)
        assert template == entry.template
        assert int(classes.replace(",", "")) == entry.classes
        shown = ["?" if each is None else f"{each:,}" for each in entry.counts]
        assert counts.split(" + ") == shown
        assert (home, licence.rstrip(" |")) == (f"<{entry.home}>", entry.licence)
    known = re.findall("`(.*?)`", page[page.index("It knows `") : page.index("brings no split")])
    assert known == [name for name, entry in CATALOG.items() if entry.download]
