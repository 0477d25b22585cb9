# ruff: noqa: NPY002 (the published draw is of NumPy's old generator)
"""ImageNet-LT, Places-LT, iNaturalist 2018 and CIFAR-100-LT in miniature, and LIFT's draw."""

import json
import shutil

import miniatures
import numpy as np
import pytest
from miniatures import MINIATURES, SPECIES, put, refusal, write

from lamp_fast.data.benchmark import build_benchmark
from lamp_fast.data.catalog import CATALOG
from lamp_fast.data.protocol import SIZE_GROUPS, label_order_tail, size_groups
from lamp_fast.data.settings import DataConfig
from lamp_fast.data.sources import layouts, load_source
from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.runs.experiment import load_data

pytestmark = pytest.mark.filterwarnings("ignore:--data")

LONG_TAILED = ("imagenet_lt", "places_lt", "inaturalist2018", "cifar100_lt")
COUNTS = {
    "imagenet_lt": [2, 2, 1, 1],
    "places_lt": [9, 4, 2, 1],
    "inaturalist2018": [5, 1, 3, 2, 4],
    # 20 a class: int(20 / 100^(k / 2)), at least 1.
    "cifar100_lt": [20, 2, 1],
}


def listed(pictures):
    return list(zip(pictures.names, pictures.labels.tolist(), strict=True))


@pytest.mark.parametrize("name", LONG_TAILED)
def test_all_classes_are_trained_as_they_are(tmp_path, name):
    MINIATURES[name](tmp_path)
    data = DataConfig(data=name, root=tmp_path)
    resolved = data.resolved()
    imb = 100.0 if name == "cifar100_lt" else 1.0
    assert (resolved.split, resolved.imb, resolved.cap) == ("all", imb, None)
    _, benchmark = load_data(data, seed=1)
    assert benchmark.counts.tolist() == COUNTS[name]
    assert (benchmark.new_names, benchmark.imb) == ((), imb)
    _, few = load_data(DataConfig(data=name, root=tmp_path, shots=2), seed=1)
    available = [20, 20, 20] if name == "cifar100_lt" else COUNTS[name]
    assert few.counts.tolist() == np.minimum(available, 2).tolist()
    assert few.imb == 1.0


def literal_lift_draw(labels, imb):
    """LIFT's sampling, spelled out: NumPy's global generator, its shuffle, classes in order."""
    labels = np.array(labels)
    kept = []
    np.random.seed(0)
    classes = np.unique(labels)
    img_max = len(labels) / len(classes)
    for place, each in enumerate(classes):
        number = int(img_max * ((1 / imb) ** (place / (len(classes) - 1.0))))
        indices = np.where(labels == each)[0]
        np.random.shuffle(indices)
        kept.append(indices[:number])
    return kept


@pytest.mark.parametrize(
    ("imb", "total", "smallest"), [(100, 10_847, 5), (50, 12_608, 10), (10, 19_573, 50)]
)
def test_cifar_is_drawn_as_lift_draws_it(imb, total, smallest):
    labels = np.random.default_rng(7).permutation(np.repeat(np.arange(100), 500))
    kept = label_order_tail(labels, imb)
    counts = np.bincount(labels[kept])
    assert (len(kept), counts[0], counts[99]) == (total, 500, smallest)
    if imb == 100:
        groups = size_groups(counts)
        assert [np.count_nonzero(groups == each) for each in SIZE_GROUPS] == [35, 35, 30]
    before = np.random.get_state()
    expected = literal_lift_draw(labels, imb)
    np.random.set_state(before)
    assert kept.tolist() == sorted(np.concatenate(expected).tolist())
    assert counts.tolist() == [len(each) for each in expected]


def test_the_draw_at_its_edges():
    labels = [1, 0] * 6
    assert label_order_tail(labels, 1).tolist() == list(range(12))
    assert label_order_tail([3, 3, 3], 100).tolist() == [0, 1, 2]
    assert label_order_tail([], 10).tolist() == []
    # The last class keeps a picture; one that has fewer than its share keeps them all.
    assert np.bincount(np.array(labels)[label_order_tail(labels, 1000)]).tolist() == [6, 1]
    assert np.bincount(np.array([0, 1, 1, 1])[label_order_tail([0, 1, 1, 1], 1)]).tolist() == [1, 2]
    state = np.random.get_state()[1].tolist()
    label_order_tail(labels, 10)
    assert np.random.get_state()[1].tolist() == state
    assert refusal(label_order_tail, labels, 0.5) == "--imb 0.5: expected at least 1"


NAMES = ["apple", "aquarium_fish", "worm"]


def test_cifars_binary_version(tmp_path):
    """A record is a coarse label, the fine one, then red, green and blue, row by row."""
    train, test = [2, 0, 1] * 8, [1, 2, 0, 0]
    folder = tmp_path / "cifar100"
    pixels = miniatures.cifar100_binary(folder, NAMES, train, test)
    whole = load_source("cifar100_lt", tmp_path, imb=1)
    assert whole.classnames == ("apple", "aquarium fish", "worm")
    assert whole.train.labels.tolist() == train
    assert (whole.train.arrays == pixels["train"]).all()
    assert whole.test.labels.tolist() == test
    assert (whole.test.arrays == pixels["test"]).all()
    red, green, blue = (whole.train.load(5)[channel].numpy() for channel in range(3))
    record = (folder / "train.bin").read_bytes()[5 * 3074 + 2 : 6 * 3074]
    assert red.tobytes() + green.tobytes() + blue.tobytes() == record
    drawn = load_source("cifar100_lt", tmp_path, imb=4)
    kept = label_order_tail(train, 4)
    assert np.bincount(drawn.train.labels).tolist() == [8, 4, 2]
    assert drawn.train.names == tuple(f"train/{index}" for index in kept)
    assert (drawn.train.arrays == pixels["train"][kept]).all()
    assert (drawn.imb, len(drawn.val)) == (4, 0)


def test_cifar_is_thinned_once_and_by_the_runs_ratio(tmp_path):
    miniatures.cifar100_lt(tmp_path)
    for imb, counts in ((4, [20, 10, 5]), (1, [20, 20, 20])):
        for seed in (1, 2):
            data = DataConfig(data="cifar100_lt", root=tmp_path, imb=imb)
            source, benchmark = load_data(data, seed)
            assert benchmark.counts.tolist() == counts
            assert (benchmark.imb, source.imb) == (imb, imb)
            assert benchmark.train.names == source.train.names
            # LIFT groups the classes of every ratio by their counts at 100.
            grouped = [20, 2, 1] if imb == 4 else counts
            assert benchmark.group_counts.tolist() == grouped
    capped = DataConfig(data="cifar100_lt", root=tmp_path, imb=4, cap=7)
    assert load_data(capped, 1)[1].counts.tolist() == [7, 7, 5]
    halved = DataConfig(data="cifar100_lt", root=tmp_path, split="base-new")
    message = refusal(load_data, halved, 1)
    assert message.startswith("--split base-new: the long tail of cifar100_lt follows the order")
    drawn = {"split": "all", "imb": 10, "cap": None, "shots": None, "seed": 1}
    message = refusal(build_benchmark, load_source("cifar100_lt", tmp_path), **drawn)
    assert message.startswith("--imb 10: the pictures of cifar100_lt were drawn with 100, expected")


def test_class_folders_give_the_draw_in_the_order_of_names(tmp_path):
    miniatures.cifar100_lt(tmp_path)
    source = load_source("cifar100_lt", tmp_path, imb=4)
    paths = [f"train/{name}/{name}_{number:04}.png" for name in NAMES for number in range(20)]
    kept = label_order_tail(np.repeat([0, 1, 2], 20), 4)
    assert source.train.names == tuple(paths[index] for index in kept)
    shutil.rmtree(tmp_path / "cifar100" / "test" / "worm")
    message = refusal(load_source, "cifar100_lt", tmp_path)
    assert "'worm' is in train/ alone (1 such); expected the same class folders" in message


@pytest.mark.parametrize("held", ["train", "meta", "cifar-100-python", "../cifar-100-python"])
def test_pickles_are_refused_with_the_reason(tmp_path, held):
    place = tmp_path / "cifar100" / held
    (tmp_path / "cifar100").mkdir()
    if "python" in held:
        place.mkdir()
    else:
        place.write_bytes(b"\x80\x02}.")
    [first, *_] = layouts.missing(CATALOG["cifar100_lt"], tmp_path)
    name = held.removeprefix("../")
    assert f"({name} is of the python version, pickles, which can run any code when" in first
    assert "get cifar-100-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html" in first
    assert first in refusal(load_source, "cifar100_lt", tmp_path)


def test_damaged_records(tmp_path):
    folder = tmp_path / "cifar100"
    miniatures.cifar100_binary(folder, NAMES, [0, 1, 2] * 4, [0, 1, 2])
    train = folder / "train.bin"
    content = train.read_bytes()
    train.write_bytes(content[:-1])
    message = refusal(load_source, "cifar100_lt", tmp_path)
    assert message == (f"{train}: 36,887 bytes, expected a multiple of 3,074, one record a picture")
    train.write_bytes(b"")
    assert "0 bytes, expected a multiple of 3,074" in refusal(load_source, "cifar100_lt", tmp_path)
    train.write_bytes(content[: 3074 + 1] + b"\x03" + content[3074 + 2 :])
    message = refusal(load_source, "cifar100_lt", tmp_path)
    assert message == f"{train}: record 1 has the label 3, expected 0..2"
    train.unlink()
    train.mkdir()
    assert "needs cifar100/train.bin (or class folders in train/ and test/) in it" in refusal(
        load_source, "cifar100_lt", tmp_path
    )


def test_counts_are_held_against_the_published_ones(tmp_path):
    miniatures.cifar100_lt(tmp_path)
    with pytest.warns(UserWarning, match="^--data cifar100_lt: ") as caught:
        load_source("cifar100_lt", tmp_path)
    [line] = [str(each.message) for each in caught]
    assert line == (
        "--data cifar100_lt: 3 classes, 23 + 0 + 6 pictures (train + val + test), published results"
        " have 100 classes, 10,847 + 0 + 10,000 pictures"
    )
    with pytest.warns(UserWarning, match=r"have 100 classes, \? \+ 0 \+ 10,000 pictures"):
        load_source("cifar100_lt", tmp_path, imb=10)


def test_an_unknown_count_warns_of_nothing(tmp_path, monkeypatch, recwarn):
    miniatures.imagenet_lt(tmp_path)
    entry = CATALOG["imagenet_lt"]
    assert entry.counts[0] is None
    alike = layouts.replace(entry, classes=4, counts=(None, 4, 8))
    monkeypatch.setattr("lamp_fast.data.sources.CATALOG", {**CATALOG, "imagenet_lt": alike})
    load_source("imagenet_lt", tmp_path)
    assert [each for each in recwarn if "--data" in str(each.message)] == []


@pytest.mark.parametrize("own", [False, True])
def test_imagenet_lt_has_imagenets_pictures_and_names_or_its_own(tmp_path, own):
    names = miniatures.imagenet_lt(tmp_path)
    place = "imagenet"
    if own:
        place = "imagenet_lt"
        (tmp_path / "imagenet" / "images").rename(tmp_path / place / "images")
        (tmp_path / "imagenet" / "classnames.txt").rename(tmp_path / place / "classnames.txt")
    assert layouts.missing(CATALOG["imagenet_lt"], tmp_path) == []
    source = load_source("imagenet_lt", tmp_path)
    assert source.train.root == tmp_path / place / "images"
    assert source.classnames == tuple(names)
    assert listed(source.test)[:3] == [
        ("val/n01440764/n01440764_0000.JPEG", 0),
        ("val/n01440764/n01440764_0001.JPEG", 0),
        ("val/n01443537/n01443537_0000.JPEG", 1),
    ]


def test_what_lists_lack(tmp_path):
    miniatures.imagenet_lt(tmp_path)
    folder = tmp_path / "imagenet_lt"
    (folder / "ImageNet_LT_val.txt").unlink()
    source = load_source("imagenet_lt", tmp_path)
    assert (len(source.train), len(source.val), source.drawn) == (6, 0, ())
    (folder / "ImageNet_LT_test.txt").unlink()
    shutil.rmtree(tmp_path / "imagenet")
    assert layouts.missing(CATALOG["imagenet_lt"], tmp_path) == [
        "imagenet_lt/images/ (or imagenet/images/)",
        "imagenet_lt/classnames.txt",
        "imagenet_lt/ImageNet_LT_test.txt",
    ]
    assert layouts.missing(CATALOG["inaturalist2018"], tmp_path) == [
        "inaturalist2018/train_val2018/",
        "inaturalist2018/categories.json",
        "inaturalist2018/iNaturalist18_train.txt",
        "inaturalist2018/iNaturalist18_val.txt",
    ]


def test_bad_lists_of_a_data_set(tmp_path):
    miniatures.places_lt(tmp_path)
    folder = tmp_path / "places_lt"
    train = folder / "Places_LT_train.txt"
    text = train.read_text()
    put(folder / "images" / "train" / "zoo" / "1.jpg")
    for line, expected in (
        ("train/zoo/1.jpg 4", "folder 'zoo' is no id of the file of class names"),
        ("train/zoo/1.jpg 5", f"{train}: labels go up to 5 but 4 is missing; expected 0..C-1"),
        ("train/zoo/1.jpg 3", f"{train}: the pictures of label 3 lie in no folder of their own"),
        ("train/zoo/1.jpg -3", f"{train}: line 17: label '-3', expected an integer from 0"),
        ("val/airfield/00004871.jpg 0", f"{folder / 'Places_LT_test.txt'}: line 1 lists 'val/air"),
    ):
        write(train, f"{text}{line}\n")
        assert expected in refusal(load_source, "places_lt", tmp_path)


# Of the miniature's species, by hand.
LEVELS = {
    "genus": (
        ["Corvus", "Prunella (Lamiaceae)", "Prunella (Prunellidae)", "Salvia"],
        [1, 3, 2, 0, 3],
    ),
    "family": (["Corvidae", "Lamiaceae", "Prunellidae"], [1, 1, 2, 0, 1]),
    "order": (["Lamiales", "Passeriformes"], [0, 0, 1, 1, 0]),
    "class": (["Aves", "Magnoliopsida"], [1, 1, 0, 0, 1]),
    "phylum": (["Chordata", "Tracheophyta"], [1, 1, 0, 0, 1]),
    "kingdom": (["Animalia", "Plantae"], [1, 1, 0, 0, 1]),
}


@pytest.mark.parametrize("level", LEVELS)
def test_levels_of_inaturalist(tmp_path, level):
    miniatures.inaturalist2018(tmp_path)
    data = DataConfig(data="inaturalist2018", root=tmp_path)
    assert data.resolved().level == "species"
    species, _ = load_data(data, 1)
    assert species.classnames == tuple(line.split(",")[0] for line in SPECIES)
    data = DataConfig(data="inaturalist2018", root=tmp_path, level=level)
    validate(data)
    coarse, benchmark = load_data(data, 1)
    names, labels = LEVELS[level]
    assert benchmark.base_names == coarse.classnames == tuple(names)
    for part in ("train", "test"):
        fine, found = getattr(species, part), getattr(coarse, part)
        assert found.names == fine.names
        assert found.labels.tolist() == [labels[label] for label in fine.labels]
    counts = np.zeros(len(names), int)
    np.add.at(counts, labels, [5, 1, 3, 2, 4])
    assert benchmark.counts.tolist() == counts.tolist()


@pytest.mark.filterwarnings("error:--data")
def test_a_coarser_level_is_held_against_nothing(tmp_path):
    miniatures.inaturalist2018(tmp_path)
    load_source("inaturalist2018", tmp_path, level="class")


def change_category(place, **values):
    def change(categories):
        categories[place].update(values)

    return change


@pytest.mark.parametrize(
    ("change", "level", "expected"),
    [
        (change_category(0, id=9), None, "entry 0 has the id 9, expected a list of objects with"),
        (change_category(1, id=4), None, "entry 1 has the id 4, expected a list of objects with"),
        (change_category(0, id="0"), None, "entry 0 has no id, expected"),
        (change_category(2, name=" "), None, "entry 2 has no name, expected"),
        (change_category(0, order=""), "order", "category 4 has no order, expected its name"),
        (lambda categories: categories.clear(), None, "expected a list of objects with an id"),
        (
            lambda categories: categories.pop(0),
            None,
            "line 12: label 4, expected 0..3, a label for",
        ),
        (
            lambda categories: categories.append({"id": 5, "name": "Corvus corone"}),
            None,
            "1 of 6 classes have no training picture, first 'Corvus corone'",
        ),
    ],
)
def test_bad_categories(tmp_path, change, level, expected):
    miniatures.inaturalist2018(tmp_path)
    file = tmp_path / "inaturalist2018" / "categories.json"
    categories = json.loads(file.read_text())
    change(categories)
    write(file, json.dumps(categories))
    assert expected in refusal(load_source, "inaturalist2018", tmp_path, level=level)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data": "inaturalist2018", "level": "tribe"}, "--level tribe: expected one of species, "),
        (
            {"data": "places_lt", "level": "genus"},
            "--level genus: expected --data inaturalist2018 with it, not places_lt",
        ),
        ({"level": "genus"}, "--level genus: expected --data inaturalist2018 with it, not digits"),
    ],
)
def test_levels_there_are_none_of(settings, expected):
    with pytest.raises(InputError) as error:
        validate(DataConfig(**settings))
    assert str(error.value).startswith(expected)
