"""Validation pictures of a benchmark: whence, how many, and never of the test part."""

from dataclasses import replace

import miniatures
import numpy as np
import pytest

from lamp_fast.data import protocol
from lamp_fast.data.benchmark import MAX_VAL_SHOTS, build_benchmark
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.sources import load_source
from lamp_fast.errors import InputError

COUNTS = {"train": (40, 9, 20, 5, 2, 12), "val": (60, 3, 30, 8, 7, 5), "test": (2,) * 6}
NO_DRAW = {"imb": 1, "cap": None, "shots": None, "seed": 1}


def drawn(part, counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    names = [f"{part} {number}" for number in range(len(labels))]
    return Pictures(names, labels, arrays=np.zeros((len(labels), 2, 2, 3), np.uint8))


@pytest.fixture(scope="module")
def source():
    digits = load_source("digits", None)
    parts = {part: drawn(part, counts) for part, counts in COUNTS.items()}
    return replace(digits, classnames=tuple("abcdef"), drawn=(), **parts)


def by_class(pictures, names):
    counts = np.bincount(pictures.labels, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


@pytest.mark.parametrize("validation", ["all", "some"])
def test_none_where_nobody_asks_and_all_of_the_trained_classes_where_somebody_does(
    source, validation
):
    assert not len(build_benchmark(source, **NO_DRAW).val)
    benchmark = build_benchmark(source, validation=validation, **NO_DRAW)
    counts = by_class(benchmark.val, benchmark.base_names)
    if validation == "all":
        assert counts == {"a": 60, "b": 3, "c": 30}
        return
    # 69 training pictures, so 34 at most: 15 + 3 + 15 = 33, and one more a class were 35.
    assert counts == {"a": 15, "b": 3, "c": 15}
    assert "of 93 validation pictures 33 are scored" in benchmark.describe()


@pytest.mark.parametrize("most", [0, 1, 7, 34, 70, 112, 113, 1000])
@pytest.mark.parametrize("least", [1, MAX_VAL_SHOTS, 9])
def test_as_many_of_every_class_as_there_is_room_for(most, least):
    labels = drawn("val", COUNTS["val"]).labels
    shots = protocol.bounded_shots(labels, most, least)
    fits = [n for n in range(1, 61) if np.minimum(COUNTS["val"], n).sum() <= most]
    expected = max(least, *fits, 1) if fits else least
    total = np.minimum(COUNTS["val"], 10**6 if shots is None else shots).sum()
    assert total == np.minimum(COUNTS["val"], expected).sum()


def test_a_fifth_of_training_where_there_is_none(source):
    without = replace(source, val=source.val.select([]))
    plain = build_benchmark(without, split="all", **NO_DRAW)
    benchmark = build_benchmark(without, split="all", validation="some", **NO_DRAW)
    # Rounded half to even, of 40, 9, 20, 5, 2 and 12 fifths.
    assert by_class(benchmark.val, "abcdef") == dict(zip("abcdef", (8, 2, 4, 1, 0, 2), strict=True))
    assert set(benchmark.train.names) | set(benchmark.val.names) == set(plain.train.names)
    assert not set(benchmark.train.names) & set(benchmark.val.names)
    lines = benchmark.describe()
    assert any("val drawn here from train" in line for line in lines)
    assert any(
        "1 of 6 classes have no validation picture" in line and "'e'" in line for line in lines
    )


def test_too_few_to_draw_any(source):
    tiny = replace(source, val=source.val.select([]), train=drawn("train", (2, 1, 2, 1, 2, 1)))
    benchmark = build_benchmark(tiny, split="all", validation="some", **NO_DRAW)
    assert not len(benchmark.val)
    assert len(benchmark.train) == 9
    assert any("no class has three training pictures" in line for line in benchmark.describe())


@pytest.mark.parametrize("validation", ["all", "some"])
def test_what_is_tested_on_chooses_nothing(tmp_path, validation):
    """ImageNet's val pictures are its test set."""
    miniatures.imagenet(tmp_path)
    source = load_source("imagenet", tmp_path)
    assert source.val.names == source.test.names
    benchmark = build_benchmark(source, split="all", validation=validation, **NO_DRAW)
    assert len(benchmark.val) == len(benchmark.base_names)  # of three training pictures one
    assert not set(benchmark.val.names) & set(source.test.names)
    assert set(benchmark.val.names) <= set(source.train.names)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_classes_that_are_held_out(source, seed):
    draw = {**NO_DRAW, "imb": 4, "seed": seed}
    wide = replace(
        source,
        classnames=tuple("abcdefghij"),
        **{part: drawn(part, (20, 9, 30, 5, 8, 12, 7, 6, 9, 8)) for part in COUNTS},
    )
    plain = build_benchmark(wide, validation="all", **draw)
    benchmark = build_benchmark(wide, validation="all", holdout=0.4, **draw)
    held = set(benchmark.stand_ins)
    assert len(held) == benchmark.held_out == 2
    assert held | set(benchmark.base_names) == set(plain.base_names)
    assert benchmark.new_names == (*benchmark.stand_ins, *plain.new_names)
    counts = by_class(plain.train, plain.base_names)
    assert by_class(benchmark.train, benchmark.base_names) == {
        name: counts[name] for name in benchmark.base_names
    }
    assert set(benchmark.train.names) < set(plain.train.names)
    both = set(benchmark.val.names) | set(benchmark.val_new.names)
    assert both == set(plain.val.names)
    assert any("2 classes of the base half are held out" in each for each in benchmark.describe())
    with pytest.raises(InputError, match="at least 2 are kept"):
        build_benchmark(wide, holdout=0.8, **draw)
