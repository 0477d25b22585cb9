"""Theorem A.2: what is certified, what must fail by it, and what LAMP reaches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lamp_fast.reproduce import theorem
from lamp_fast.reproduce.theorem import ARMS, TOY, Lamp, Vanilla, certify, error_at_x_0, try_arm


def test_attention_splits_as_the_proof_says():
    prompts = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, x_0 = TOY.sequence(0), TOY.x_0[None]
    weights = (x_0 @ TOY.w_q.T) @ (torch.cat([prompts, x]) @ TOY.w_k.T).T
    share = weights.softmax(-1)[0, :3].sum()
    parts = share * TOY.attend(x_0, prompts) + (1 - share) * TOY.attend(x_0, x)
    whole = TOY.attend(x_0, torch.cat([prompts, x]))
    # A dozen float64 operations on values of size 1.
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14)


def test_every_answer_has_its_preimages_among_the_two():
    x = torch.tensor([[0.3, -1.0], [-0.3, 2.0]], dtype=torch.float64)  # gate open, gate closed
    for each, answer in zip(x, TOY.mlp(x), strict=True):
        distance = (TOY.preimages(answer) - each).norm(dim=1).min()
        assert distance < 1e-14


def test_the_certificate_separates_generators_that_are_computed_here():
    certificate = certify(TOY)
    w = certificate.normal
    assert np.linalg.norm(w) == pytest.approx(1)
    for which, sign in ((0, 1), (1, -1)):
        scores = [
            math.exp(float(TOY.w_q @ TOY.x_0 @ (TOY.w_k @ each))) for each in TOY.sequence(which)
        ]
        mean = sum(
            score * (TOY.w_v @ each)
            for score, each in zip(scores, TOY.sequence(which), strict=True)
        ) / sum(scores)
        y = TOY.y_0[which]
        inverse = torch.linalg.inv(TOY.w_2 @ TOY.w_1 + torch.eye(2, dtype=torch.float64))
        generators = [-mean, y - TOY.x_0, inverse @ y - TOY.x_0]
        products = [sign * float(w @ each.numpy() / each.norm()) for each in generators]
        assert min(products) >= certificate.margin - 1e-14 > 0.3


def test_no_prompt_for_both_gets_below_the_bound():
    bound = certify(TOY).bound
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 5.0, 30.0):
        for n in (1, 2, 7):
            for _ in range(40):
                prompts = scale * torch.randn(n, 2, dtype=torch.float64, generator=generator)
                assert error_at_x_0(TOY, lambda _, prompts=prompts: prompts) >= bound


def test_there_is_no_certificate_where_a_prompt_works():
    """The same toy, asked for what some prompt answers: the two cones meet in its p."""
    torch.manual_seed(0)
    for _ in range(20):
        prompts = torch.randn(2, 2, dtype=torch.float64)
        reached = torch.stack([TOY.answers(prompts, which)[1] for which in (0, 1)])
        toy = replace(TOY, y_0=reached)
        assert error_at_x_0(toy, lambda _, prompts=prompts: prompts) == 0
        assert certify(toy) is None


@pytest.mark.parametrize("arm", ARMS[:3])
def test_what_is_the_same_for_both_fails(arm):
    bound = certify(TOY).bound
    for seed in range(2):
        model, errors = try_arm(TOY, arm, seed)
        assert min(errors) >= bound
        torch.testing.assert_close(model(0), model(1), rtol=0, atol=0)


def test_lamp_reaches_both_answers():
    best = None
    for seed in range(8):
        model, errors = try_arm(TOY, ARMS[3], seed)
        if best is None or errors[-1] < best[1]:
            best = model, errors[-1]
        if errors[-1] < 1e-10:
            break
    model, error = best
    # Ten orders below the bound, and rounding of float64 above it.
    assert error < 1e-10
    assert model.chosen(0) != model.chosen(1)


def test_the_arms_are_what_they_say():
    shared = Lamp(TOY, None)
    assert not shared.pool.requires_grad
    assert shared(0).shape == (1, 2)
    assert Lamp(TOY, "x_i")(0).shape == (3, 2)
    assert Vanilla()(1).shape == (3, 2)


def test_the_command_draws(tmp_path, capsys):
    assert theorem.main(theorem.TheoremConfig(out=tmp_path, starts=1)) == 0
    assert (tmp_path / "theorem_a2.png").stat().st_size > 0
    assert "certificate" in capsys.readouterr().out
