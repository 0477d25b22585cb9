"""Token forests: every class's own path, shared beginnings once, nothing else."""

import pytest
import torch

from lamp_fast.clip.prompts import plant

BOT, EOT = 100, 101


def spelled(forest, node):
    """The tokens that a node sees, in order of position."""
    seen = forest.visible[node].nonzero().flatten().tolist()
    seen.sort(key=lambda each: int(forest.positions[each]))
    assert [int(forest.positions[each]) for each in seen] == list(range(1, len(seen) + 1))
    return [int(forest.token_ids[each]) for each in seen]


def random_sequences(seed, count=40):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    return [[BOT, 7, 8, *(draw(0, 3) for _ in range(draw(0, 6))), EOT] for _ in range(count)]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("most_rows", [None, 1, 9, 30])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_class_reads_its_own_sequence(seed, most_rows, share):
    sequences = random_sequences(seed)
    forests = plant(sequences, most_rows=most_rows, share=share)
    found = {}
    for forest in forests:
        for eot, index in zip(forest.eot, forest.classes, strict=True):
            found[int(index)] = [BOT, *spelled(forest, eot)]
        assert [int(forest.owner[eot]) for eot in forest.eot] == sorted(
            int(forest.owner[eot]) for eot in forest.eot
        )
    assert [found[index] for index in range(len(sequences))] == sequences


def test_shared_beginnings_are_one_node_each():
    sequences = random_sequences(3)
    (forest,) = plant(sequences)
    prefixes = {tuple(each[1:end]) for each in sequences for end in range(2, len(each) + 1)}
    assert len(forest) == len(prefixes)


def test_without_sharing_every_class_is_a_branch():
    sequences = random_sequences(4)
    (forest,) = plant(sequences, share=False)
    assert len(forest) == sum(len(each) - 1 for each in sequences)
    owners = torch.bincount(forest.owner)
    assert owners.tolist() == [len(sequences[index]) - 1 for index in forest.classes.tolist()]


def test_a_forest_keeps_its_limit_unless_one_class_exceeds_it():
    forests = plant(random_sequences(5), most_rows=20)
    assert len(forests) > 1
    assert all(len(forest) <= 20 for forest in forests)
    assert [len(each.classes) for each in plant(random_sequences(5), most_rows=1)] == [1] * 40


def test_equal_sequences_end_in_one_node():
    (forest,) = plant([[BOT, 1, EOT], [BOT, 1, EOT]])
    assert forest.eot.tolist() == [1, 1]
    assert forest.classes.tolist() == [0, 1]
