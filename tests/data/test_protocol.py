"""Long tail, few-shot, base/new: the check vectors of the protocol and the properties of a draw."""

import math

import numpy as np
import pytest

from lamp_fast.data import protocol
from lamp_fast.errors import InputError


def labels_of(counts, seed=0):
    """Labels with these counts, in an arbitrary order."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


@pytest.mark.parametrize(
    ("classes", "base"),
    # Caltech, Pets, Cars, Flowers, Food, SUN, DTD, EuroSAT, ImageNet: counts of the peers' code
    [(100, 50), (37, 19), (196, 98), (102, 51), (101, 51), (397, 199), (47, 24), (10, 5), (1, 1)],
)
def test_base_classes_are_the_first_half_rounded_up(classes, base):
    labels = labels_of([3] * classes) * 2 + 1  # neither sorted nor contiguous
    halves = protocol.base_new(labels)
    assert [len(half) for half in halves] == [base, classes - base]
    assert np.concatenate(halves).tolist() == [2 * label + 1 for label in range(classes)]


@pytest.mark.parametrize(
    ("classes", "imb", "expected"),
    [(5, 10, [100, 56, 31, 17, 10]), (5, 50, [100, 37, 14, 5, 2])],
)
def test_long_tail_check_vectors(classes, imb, expected):
    assert protocol.long_tail_targets([100] * classes, imb).tolist() == expected
    assert protocol.long_tail_targets([150] * classes, imb, n_max=100).tolist() == expected
    # The tail is as long for counts in any order: rank decides, not the label.
    counts = [101, 105, 102, 104, 103]
    shuffled = protocol.long_tail_targets(counts, imb, n_max=100)
    assert sorted(shuffled.tolist(), reverse=True) == expected
    assert np.argsort(-shuffled).tolist() == [1, 3, 4, 2, 0]


@pytest.mark.parametrize(
    ("classes", "imb", "total"),
    [(5, 10, 214), (5, 50, 158), (50, 10, 1945), (50, 50, 1254), (500, 100, 10536)],
)
def test_long_tail_totals_of_the_peers(classes, imb, total):
    assert protocol.long_tail_targets([100] * classes, imb).sum() == total
    assert len(protocol.long_tail(labels_of([100] * classes), imb, seed=1)) == total


def literal_long_tail(counts, imb, n_max):
    """The protocol's sentence, spelled out."""
    ranking = sorted(range(len(counts)), key=lambda label: (-counts[label], label))
    kept = [0] * len(counts)
    for rank, label in enumerate(ranking):
        target = int(max(n_max * (1 / imb) ** (rank / (len(counts) - 1)), 1))
        kept[label] = min(counts[label], target)
    return kept


@pytest.mark.parametrize("imb", [1, 1.5, 10, 50, 1000])
@pytest.mark.parametrize("n_max", [None, 40])
def test_long_tail_on_uneven_classes(imb, n_max):
    counts = np.random.default_rng(3).integers(1, 60, 23).tolist()
    labels = labels_of(counts)
    expected = literal_long_tail(counts, imb, max(counts) if n_max is None else n_max)
    assert protocol.long_tail_targets(counts, imb, n_max).tolist() == expected
    kept = protocol.long_tail(labels, imb, seed=5, n_max=n_max)
    assert np.bincount(labels[kept], minlength=len(counts)).tolist() == expected
    assert (np.diff(kept) > 0).all()  # ascending, so nothing was drawn twice


def test_imbalance_1_and_a_single_class_keep_everything():
    labels = labels_of([7, 3, 5])
    assert protocol.long_tail(labels, 1, seed=1).tolist() == list(range(15))
    assert protocol.long_tail([4] * 6, 100, seed=1).tolist() == list(range(6))
    assert protocol.long_tail([], 10, seed=1).tolist() == []


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_few_shot_takes_all_of_a_small_class(shots):
    counts = [20, 3, 16, 1]
    labels = labels_of(counts)
    kept = protocol.few_shot(labels, shots, seed=2)
    assert np.bincount(labels[kept]).tolist() == [min(count, shots) for count in counts]
    assert set(kept) <= set(protocol.few_shot(labels, shots + 1, seed=2))


@pytest.mark.parametrize(
    "draw",
    [
        lambda labels, seed: protocol.few_shot(labels, 4, seed),
        lambda labels, seed: protocol.long_tail(labels, 10, seed, n_max=12),
        lambda labels, seed: protocol.stratified_split(labels, (0.3,), seed)[1],
    ],
    ids=["few_shot", "long_tail", "split"],
)
def test_a_draw_depends_on_seed_and_class_alone(draw):
    labels = np.repeat([0, 1, 2], [30, 20, 10])

    def names(labels, seed):
        """Drawn pictures as (class, position within the class)."""
        kept = draw(labels, seed)
        place = [int((labels[:index] == labels[index]).sum()) for index in kept]
        return set(zip(labels[kept].tolist(), place, strict=True))

    first = names(labels, 1)
    assert names(labels, 1) == first
    assert names(labels, 2) != first
    interleaved = labels_of([30, 20, 10], seed=9)
    assert names(interleaved, 1) == first
    more = np.concatenate([labels, [0] * 25])
    assert {each for each in names(more, 1) if each[0]} == {each for each in first if each[0]}


def test_classes_do_not_share_one_permutation():
    kept = protocol.few_shot(np.repeat([0, 1, 2], 30), 6, seed=1)
    places = {tuple(kept[6 * label : 6 * label + 6] - 30 * label) for label in range(3)}
    assert len(places) == 3


def test_every_picture_is_as_likely_to_be_drawn():
    """3 of 12, 4,000 seeds: a count is binomial with mean 1,000 and sd 27.4; 5 sd bound it."""
    labels = [7] * 12
    drawn = np.concatenate([protocol.few_shot(labels, 3, seed) for seed in range(4000)])
    assert np.abs(np.bincount(drawn, minlength=12) - 1000).max() < 5 * math.sqrt(4000 * 0.25 * 0.75)


def test_cap_and_long_tail_draw_independently():
    """The tail of a capped class is a fair draw: with one stream for both, low ranks would win."""
    survivors = np.zeros(20)
    for seed in range(3000):
        capped = protocol.few_shot([1] * 20, 10, seed)
        # Two classes: label 0 with more pictures takes rank 0, so label 1 keeps 10 / 5 = 2.
        tail = protocol.long_tail([0] * 11 + [1] * 10, 5.5, seed)
        survivors[capped[tail[tail >= 11] - 11]] += 1
    mean = 3000 * 2 / 20
    assert survivors.sum() == 6000
    assert np.abs(survivors - mean).max() < 5 * math.sqrt(mean)


@pytest.mark.parametrize("count", range(1, 12))
def test_split_shares(count):
    labels = np.repeat([0, 1], [count, 10])
    train, val, test = protocol.stratified_split(labels, (0.2, 0.3), seed=0)
    assert sorted(np.concatenate([train, val, test])) == list(range(count + 10))
    sizes = [int((labels[part] == 0).sum()) for part in (train, val, test)]
    assert sizes[1:] == [round(count * share) for share in (0.2, 0.3)]
    assert sizes[0] >= 1
    assert [int((labels[part] == 1).sum()) for part in (train, val, test)] == [5, 2, 3]


def test_head_classes():
    assert protocol.head_classes([5, 9, 9, 1, 9]).tolist() == [False, True, False, False, False]
    assert protocol.head_classes([5, 9, 9, 1, 9, 2]).tolist() == [False, True, True, *[False] * 3]
    assert protocol.head_classes([4, 4, 4]) is None
    assert protocol.head_classes([]) is None
    for classes in range(2, 60):
        head = protocol.head_classes(np.arange(1, classes + 1))
        assert head.sum() == math.ceil(classes / 5)
        assert head[-head.sum() :].all()


def test_size_groups():
    many, medium, few = protocol.SIZE_GROUPS
    got = protocol.size_groups([5, 19, 20, 21, 99, 100, 101, 1280])
    assert got.tolist() == [few, few, medium, medium, medium, medium, many, many]
    assert protocol.size_groups([7, 8]).tolist() == [few, few]
    for equal in ([500, 500, 500], [4], []):
        assert protocol.size_groups(equal) is None


def test_size_groups_of_cifar_100_lt():
    """LIFT draws int(500 * 0.01^(k / 99)) of class k and reports 35, 35 and 30 classes."""
    got = protocol.size_groups([int(500 * 0.01 ** (k / 99)) for k in range(100)]).tolist()
    assert got == ["many"] * 35 + ["medium"] * 35 + ["few"] * 30


def test_realised_imbalance():
    assert protocol.realised_imbalance([40, 8, 16]) == 5.0


@pytest.mark.parametrize("imb", [0.99, 0, -1, math.nan, math.inf])
def test_imbalance_below_1_is_refused(imb):
    with pytest.raises(InputError, match=f"^--imb {imb}: expected at least 1$"):
        protocol.long_tail([0, 1], imb, seed=1)


@pytest.mark.parametrize("shots", [0, -3])
def test_fewer_than_one_shot_is_refused(shots):
    with pytest.raises(InputError, match=f"^--shots {shots}: expected at least 1$"):
        protocol.few_shot([0, 1], shots, seed=1)
