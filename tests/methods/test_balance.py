"""Load balancing: the rule, its integers, and that our sign balances where Eq. 9's does not."""

import math

import pytest
import torch

from lamp_fast.methods.lamp.balance import LoadBalance


def test_one_update_by_hand():
    """M=4, K=2, 3 rows: even share is 1.5; 3 is over, 1 is under, and 1.5 cannot happen."""
    balance = LoadBalance(1, 4, 2, gamma=0.1)
    balance.update(torch.tensor([[3, 1, 2, 0]]), rows=3, progress=0.0)
    expected = torch.tensor([[-0.1, 0.1, -0.1, 0.1]])
    torch.testing.assert_close(balance.bias, expected)
    assert balance.chosen.tolist() == [[3, 1, 2, 0]]
    assert int(balance.rows) == 3


def test_an_exact_tie_moves_nothing():
    balance = LoadBalance(1, 4, 2, gamma=0.1)
    balance.update(torch.tensor([[2, 2, 2, 2]]), rows=4, progress=0.0)
    assert not balance.bias.any()


def test_totals_accumulate_within_an_epoch_and_the_bias_survives_it():
    balance = LoadBalance(1, 2, 1, gamma=1.0)
    balance.update(torch.tensor([[3, 0]]), rows=3, progress=0.0)
    balance.update(torch.tensor([[1, 2]]), rows=3, progress=0.0)  # totals 4 : 2, still over
    torch.testing.assert_close(balance.bias, torch.tensor([[-2.0, 2.0]]))
    balance.start_epoch()
    assert not balance.chosen.any()
    assert int(balance.rows) == 0
    torch.testing.assert_close(balance.bias, torch.tensor([[-2.0, 2.0]]))


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 0.999])
def test_cosine_step(progress):
    balance = LoadBalance(1, 2, 1, gamma=0.2)
    balance.update(torch.tensor([[1, 0]]), rows=1, progress=progress)
    step = 0.1 * (1 + math.cos(math.pi * progress))
    torch.testing.assert_close(balance.bias, torch.tensor([[-step, step]]))


def test_the_bias_stays_float32():
    assert LoadBalance(2, 3, 1, gamma=0.1).double().bias.dtype == torch.float32
    assert LoadBalance(2, 3, 1, gamma=0.1).half().bias.dtype == torch.float32


def test_order_of_summing_selections_does_not_matter():
    """Any split of the same selections over ranks or pieces makes the same bias, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 9, (6, 5, 3, 8), generator=generator)  # [steps, pieces, layers, M]
    together, apart = (LoadBalance(3, 8, 2, gamma=5e-4) for _ in range(2))
    for step, pieces in enumerate(counts):
        together.update(pieces.sum(0), rows=40, progress=step / 6)
        apart.update(sum(pieces.flip(0)[1:], pieces[-1]), rows=40, progress=step / 6)
    assert torch.equal(together.bias, apart.bias)


@pytest.mark.parametrize("raise_overused", [False, True])
def test_simulation(raise_overused):
    """Rows with unequal tastes choose 2 of 20: our sign balances the load, Eq. 9's does not."""
    generator = torch.Generator().manual_seed(3)
    taste = torch.randn(20, generator=generator) * 0.05
    balance = LoadBalance(1, 20, 2, gamma=5e-3, raise_overused=raise_overused)
    steps = 1500
    for step in range(steps):
        if step % 100 == 0:
            balance.start_epoch()
        scores = taste + 0.1 * torch.randn(32, 20, generator=generator) + balance.bias
        chosen = scores.topk(2, dim=1).indices
        counts = torch.bincount(chosen.flatten(), minlength=20)[None]
        balance.update(counts, rows=32, progress=step / steps)
    spread = balance.load_std()[0]
    # The unbiased load of these tastes has a spread of about 0.07.
    assert spread > 0.15 if raise_overused else spread < 0.015
