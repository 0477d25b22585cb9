"""Batches of features: the order of pictures, and which view of each an epoch shows."""

from collections import Counter

import pytest
import torch

from lamp_fast.data.feature_batches import FeatureBatches
from lamp_fast.data.loading import epoch_order

COUNT, VIEWS = 7, 3
# Row i, view v holds 10 i + v.
FEATURES = (10 * torch.arange(COUNT)[:, None] + torch.arange(VIEWS)).double()[..., None]
LABELS = torch.tensor([0, 1, 0, 1, 2, 2, 0])


def batches(size, views="in turn", **options):
    return FeatureBatches(FEATURES, LABELS, size, seed=5, views=views, **options)


def drawn(batch_list):
    return torch.cat([each[0] for each in batch_list]).flatten().tolist()


def test_the_order_is_that_of_pictures_and_the_last_batch_is_dropped():
    got = list(batches(3).epoch(4))
    order = epoch_order(LABELS.numpy(), "shuffle", 5, 4)
    assert [each[2].tolist() for each in got] == [order[:3].tolist(), order[3:6].tolist()]
    for features, labels, index in got:
        assert labels.tolist() == LABELS[index].tolist()
        assert features[:, 0].tolist() == [10 * i + 4 % VIEWS for i in index.tolist()]
    assert len(batches(3)) == 2
    assert len(batches(100)) == len(list(batches(100))) == 1
    assert len(next(iter(batches(100)))[0]) == COUNT


def test_a_drawn_view_is_one_for_all_and_changes():
    shown = [{value % 10 for value in drawn(batches(7, "drawn").epoch(e))} for e in range(20)]
    assert all(len(each) == 1 for each in shown)
    assert set.union(*shown) == {0, 1, 2}


def test_mixed_views_take_rows_of_all_views_without_replacement():
    every = Counter()
    for epoch in range(50):
        values = drawn(batches(7, "mixed").epoch(epoch))
        assert len(set(values)) == COUNT
        every.update(values)
    assert every.keys() == set(FEATURES.flatten().tolist())
    # A picture may be seen twice in an epoch: seven of 21 rows are three pictures' at least.
    assert any(
        len({value // 10 for value in drawn(batches(7, "mixed").epoch(epoch))}) < COUNT
        for epoch in range(50)
    )


def test_labels_follow_mixed_rows():
    for features, labels, index in batches(4, "mixed", sampler="balanced").epoch(2):
        assert labels.tolist() == LABELS[index].tolist()
        assert (features[:, 0] // 10).long().tolist() == index.tolist()


@pytest.mark.parametrize("views", ["in turn", "drawn", "mixed"])
def test_an_epoch_is_the_same_whenever_it_is_asked_for(views):
    there = batches(3, views)
    first = [drawn(there.epoch(epoch)) for epoch in (0, 1, 2)]
    assert [drawn(batches(3, views).epoch(epoch)) for epoch in (2, 1, 0)] == first[::-1]
    assert drawn(iter(there)) == first[0]


def test_parts_of_batches_add_up_and_empty_ones_are_left_out():
    whole = list(batches(3).epoch(1))
    halves = [
        list(
            batches(3)
            .part(lambda size, rank=rank: slice(2 * rank, min(2 * rank + 2, size)))
            .epoch(1)
        )
        for rank in range(2)
    ]
    for expected, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(expected[0], torch.cat([first[0], second[0]]))
    assert list(batches(3).part(lambda size: slice(3, 3)).epoch(0)) == []
