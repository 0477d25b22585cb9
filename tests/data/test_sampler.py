"""Which pictures an epoch holds, in which order, and what of it depends on nothing but the seed."""

import math

import numpy as np
import pytest
import torch

from lamp_fast.data.feature_batches import FeatureBatches
from lamp_fast.data.loading import class_shares, earlier_draws, epoch_order, training_batches
from lamp_fast.data.pictures import Pictures
from lamp_fast.runs.ranks import Ranks, batch_sizes

SAMPLERS = ("shuffle", "balanced", "sqrt")
COUNTS = (900, 90, 0, 9, 1)


def labels_of(counts, seed=3):
    """Labels with so many of each class, in random order."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def coloured(counts):
    """Pictures of one number each, their index."""
    labels = labels_of(counts)
    index = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    names = tuple(map(str, range(len(labels))))
    return Pictures(names, labels, arrays=np.broadcast_to(index, (len(labels), 2, 2, 3)))


def noisy(picture):
    """A transform that shows both the picture and what was drawn for it."""
    return picture[:1, :1, :1].double() + torch.rand(1, dtype=torch.float64)


def test_shares_of_classes():
    shares = {name: class_shares(np.array([16, 4, 0]), name).tolist() for name in SAMPLERS}
    assert shares == {
        "shuffle": [0.8, 0.2, 0.0],
        "balanced": [0.5, 0.5, 0.0],
        "sqrt": [4 / 6, 2 / 6, 0.0],
    }


def test_shuffle_is_the_order_of_earlier_versions():
    """The definition as 0.2.0 documents it: sort N words of PCG64 seeded by (seed, epoch, N)."""
    labels = labels_of(COUNTS)
    words = np.random.PCG64(np.random.SeedSequence((5, 2, len(labels)))).random_raw(len(labels))
    expected = sorted(range(len(labels)), key=lambda index: int(words[index]))
    order = epoch_order(labels, "shuffle", seed=5, epoch=2)
    assert order.tolist() == expected
    assert sorted(expected) == list(range(len(labels)))


@pytest.mark.parametrize("sampler", ["balanced", "sqrt"])
def test_draws_against_a_loop_over_the_definition(sampler):
    """Inverse of the distribution function by hand, from the same words, in exact integers."""
    labels = labels_of((6, 0, 3, 1))
    count = len(labels)
    words = np.random.PCG64(np.random.SeedSequence((7, 1, count))).random_raw(2 * count)
    weights = [math.sqrt(n) if sampler == "sqrt" else n > 0 for n in (6, 0, 3, 1)]
    expected = []
    for class_word, picture_word in zip(words[:count], words[count:], strict=True):
        at = (int(class_word) >> 11) / 2**53 * sum(weights)
        chosen = next(c for c in range(4) if at < sum(weights[: c + 1]))
        pictures = np.flatnonzero(labels == chosen)
        expected.append(pictures[(int(picture_word) >> 11) * len(pictures) >> 53])
    assert epoch_order(labels, sampler, seed=7, epoch=1).tolist() == expected


@pytest.mark.parametrize("sampler", ["balanced", "sqrt"])
def test_how_often_classes_and_pictures_are_drawn(sampler):
    """Over E epochs a count of D = E N draws of probability p is binomial. Hoeffding: it misses D p
    by more than sqrt(D ln(2 / delta) / 2) with probability delta at most; at delta = 1e-9 for the
    1,004 counts below, a right sampler fails once in a million seeds."""
    labels, epochs = labels_of(COUNTS), 40
    orders = [epoch_order(labels, sampler, seed=1, epoch=epoch) for epoch in range(epochs)]
    draws = epochs * len(labels)
    bound = math.sqrt(draws * math.log(2 / 1e-9) / 2)
    shares = class_shares(np.array(COUNTS), sampler)
    drawn = np.concatenate(orders)
    by_class = np.bincount(labels[drawn], minlength=len(COUNTS))
    assert by_class[2] == 0
    assert np.abs(by_class - draws * shares).max() < bound
    # The bound tells the three samplers apart.
    for other in set(SAMPLERS) - {sampler}:
        assert np.abs(draws * (shares - class_shares(np.array(COUNTS), other))).max() > 2 * bound
    by_picture = np.bincount(drawn, minlength=len(labels))
    expected = draws * (shares / np.maximum(COUNTS, 1))[labels]
    assert np.abs(by_picture - expected).max() < bound
    assert not np.array_equal(orders[0], orders[1])


@pytest.mark.parametrize("labels", [[], [0], [2, 2]])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_orders_of_next_to_nothing(sampler, labels):
    order = epoch_order(np.array(labels, dtype=np.int64), sampler, seed=1, epoch=0)
    assert order.dtype == np.int64
    assert len(order) == len(labels)
    assert set(order.tolist()) <= set(range(len(labels)))


def test_earlier_draws():
    order = np.array([3, 1, 3, 3, 0, 1])
    assert earlier_draws(order).tolist() == [0, 0, 1, 2, 0, 1]
    random = np.random.default_rng(2).integers(0, 9, 200)
    expected = [(random[:place] == each).sum() for place, each in enumerate(random)]
    assert earlier_draws(random).tolist() == expected
    assert earlier_draws(np.array([], dtype=np.int64)).tolist() == []


def test_every_draw_of_a_picture_has_its_own_augmentation():
    """First draws are augmented as without repeats: by (seed, epoch, index) alone."""
    pictures = coloured((20, 2))
    (first,) = training_batches(pictures, noisy, 22, seed=5).epoch(1)
    (again,) = training_batches(pictures, noisy, 22, seed=5, sampler="balanced").epoch(1)
    shown = dict(zip(first[2].tolist(), first[0].flatten().tolist(), strict=True))
    seen = {}
    for value, label, index in zip(again[0].flatten().tolist(), *again[1:], strict=True):
        assert label == pictures.labels[index]
        assert int(value) == index
        seen.setdefault(int(index), []).append(value)
    repeated = [values for values in seen.values() if len(values) > 1]
    # Two pictures stand for half of 22 draws.
    assert repeated
    for index, values in seen.items():
        assert values[0] == shown[index]
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("sampler", ["balanced", "sqrt"])
def test_workers_ranks_and_history_change_nothing(sampler):
    """Two loading processes, two ranks, and an epoch that is asked for first, as on resuming."""
    pictures = coloured((20, 3))

    def batches(workers=0):
        return training_batches(pictures, noisy, 5, seed=5, workers=workers, sampler=sampler)

    alone = batches()
    epochs = [list(alone.epoch(epoch)) for epoch in range(2)]
    for made in (batches(), batches(workers=2)):
        for epoch in (1, 0):
            for batch, expected in zip(made.epoch(epoch), epochs[epoch], strict=True):
                assert all(map(torch.equal, batch, expected))
    sizes = batch_sizes(len(pictures), 5)[: len(alone)]
    shares = [
        list(ranks.parts(ranks.share(batches()), sizes, epoch=1))
        for ranks in (Ranks(rank, 2) for rank in range(2))
    ]
    for number, expected in enumerate(epochs[1]):
        for place in range(3):
            rows = [share[number][0][place] for share in shares]
            assert torch.equal(torch.cat(rows), expected[place])


def test_features_are_drawn_in_the_same_order():
    labels = labels_of((8, 2))
    features = torch.arange(10.0)[:, None, None]
    (batch,) = FeatureBatches(
        features, torch.from_numpy(labels), 10, seed=4, sampler="balanced"
    ).epoch(3)
    order = epoch_order(labels, "balanced", seed=4, epoch=3)
    assert batch[2].tolist() == order.tolist() == batch[0].flatten().long().tolist()
    assert batch[1].tolist() == labels[order].tolist()
