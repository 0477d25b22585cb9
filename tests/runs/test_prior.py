"""Scores for other shares of classes: the closed form, and what a trained criterion implies."""

import math

import numpy as np
import pytest
import torch

from lamp_fast.data.loading import class_shares
from lamp_fast.errors import InputError
from lamp_fast.methods import METHODS
from lamp_fast.methods.base import Method
from lamp_fast.methods.settings import MethodEntry
from lamp_fast.runs.optimisation import build_criterion
from lamp_fast.runs.prior import Prior, log_implied_prior, read_prior
from lamp_fast.runs.settings import OptimConfig

NAMES = ("dog", "cat", "cow")
COUNTS = (6, 3, 1)
WEIGHTS = '{"dog": 0.25, "cat": 1.5, "cow": 3.0}'
CPU = torch.device("cpu")

# q of three classes, worked out by hand; in any unit.
BY_HAND = {
    "ce": ({}, [6, 3, 1]),
    "focal": ({"loss": "focal"}, [6, 3, 1]),
    "ldam": ({"loss": "ldam"}, [6, 3, 1]),
    "la": ({"loss": "la"}, [1, 1, 1]),
    "la-half": ({"loss": "la", "tau": 0.5}, [math.sqrt(6), math.sqrt(3), 1]),
    "la-2": ({"logit_adjustment": True, "tau": 2.0}, [1 / 6, 1 / 3, 1]),
    "balanced": ({"loss": "balanced"}, [1, 1, 1]),
    "lade": ({"loss": "lade"}, [1, 1, 1]),
    "grw": ({"loss": "grw"}, [1, 1, 1]),
    "cb": ({"loss": "cb", "loss_beta": 0.5}, [6 / (1 - 2**-6), 3 / (1 - 2**-3), 1 / (1 - 2**-1)]),
    "auto": ({"class_weights": "auto"}, [1, 1, 1]),
    "given": ({"class_weights": WEIGHTS}, [6 * 0.25, 3 * 1.5, 1 * 3]),
    "drawn-alike": ({"sampler": "balanced"}, [1, 1, 1]),
    "drawn-sqrt": ({"sampler": "sqrt"}, [math.sqrt(6), math.sqrt(3), 1]),
    "drawn-alike-la": ({"sampler": "balanced", "loss": "la"}, [1 / 6, 1 / 3, 1]),
    "drawn-sqrt-given": (
        {"sampler": "sqrt", "class_weights": WEIGHTS},
        [math.sqrt(6) * 0.25, math.sqrt(3) * 1.5, 3],
    ),
}
# Their minimisers are posteriors. LADE's is balanced softmax's: tests of the losses hold that.
POSTERIORS = [name for name in BY_HAND if name not in ("focal", "ldam", "lade")]


class Plain(Method):
    """A method whose logits the run's loss has made."""

    entry = MethodEntry("", "Plain")

    def __init__(self):
        torch.nn.Module.__init__(self)


def prior_of(wanted, settings=(), **changes):
    run = {"trained": NAMES, "counts": COUNTS, **changes}
    return Prior(wanted, OptimConfig(**dict(settings)), **run)


def shares(values):
    return np.array(values) / sum(values)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_implied_prior_by_hand(name):
    """A few operations of float64, so a few eps."""
    settings, expected = BY_HAND[name]
    got = np.exp(log_implied_prior(OptimConfig(**settings), COUNTS, NAMES))
    np.testing.assert_allclose(got, shares(expected), rtol=1e-14)


# p(x | c) of three kinds of pictures x.
GIVEN_CLASS = torch.tensor([[4, 2, 2], [1, 5, 2], [2, 1, 5]], dtype=torch.float64) / 8


@pytest.mark.parametrize("name", POSTERIORS)
def test_the_corrected_minimiser_is_the_wanted_posterior(name):
    """The criterion is convex in the logits of each x, so where its gradient is 0 is its minimum.
    There, logits + shift are the posterior under the wanted shares."""
    optim = OptimConfig(**BY_HAND[name][0])
    criterion = build_criterion(optim, COUNTS, CPU, names=NAMES)
    implied = torch.from_numpy(log_implied_prior(optim, COUNTS, NAMES))
    logits = (implied[:, None] + GIVEN_CLASS.log()).T.requires_grad_()  # [x, c]
    drawn = torch.from_numpy(class_shares(np.array(COUNTS), optim.sampler))
    risk = sum(
        drawn[c] * GIVEN_CLASS[c, x] * criterion(logits[x][None], torch.tensor([c]))
        for c in range(3)
        for x in range(3)
    )
    (gradient,) = torch.autograd.grad(risk, logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)
    for wanted, by_hand in (
        ("uniform", [1, 1, 1]),
        ("train", COUNTS),
        ({"cow": 7, "dog": 0.5, "cat": 2.5}, [0.5, 2.5, 7]),
    ):
        shift = prior_of(wanted, BY_HAND[name][0]).shift(Plain(), NAMES)
        joint = torch.tensor(by_hand, dtype=torch.float64)[:, None] * GIVEN_CLASS
        expected = (joint / joint.sum(0)).T
        got = (logits.detach() + shift).softmax(1)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("tau", [0.0, 1e6])
def test_a_tau_of_any_size_stays_finite(tau):
    shift = prior_of("uniform", {"loss": "la", "tau": tau}).shift(Plain(), NAMES)
    assert torch.isfinite(shift).all()


def test_some_trained_names_in_another_order():
    """A posterior among fewer classes is the same one, conditioned."""
    whole = prior_of("uniform").shift(Plain(), NAMES)
    some = prior_of("uniform").shift(Plain(), ("cow", "dog"))
    difference = some - whole[[2, 0]]
    assert difference[0].item() == pytest.approx(difference[1].item(), abs=1e-14)
    train = prior_of("train").shift(Plain(), ("cow", "dog"))
    assert train.tolist() == pytest.approx([0, 0], abs=1e-15)  # ce: what it is already


def test_classes_that_share_a_name():
    """The first of them is the first of training."""
    same = prior_of("uniform", trained=("dog", "cat", "dog"))
    got = same.shift(Plain(), ("dog", "dog"))
    assert (got[1] - got[0]).item() == pytest.approx(math.log(6))


def test_methods_that_the_loss_does_not_make():
    """Zero-shot CLIP and losses of their own imply equal shares; "train" adds the counts."""
    for name in ("zeroshot", "candle", "lfa"):
        kind = METHODS[name].load()
        method = kind.__new__(kind)
        assert prior_of("uniform").shift(method, NAMES).tolist() == pytest.approx(
            [0] * 3, abs=1e-15
        )
        got = prior_of("train").shift(method, NAMES).exp()
        np.testing.assert_allclose(got, 3 * shares(COUNTS), rtol=1e-14)
    for name, entry in METHODS.items():
        if entry.own_loss is None and name != "zeroshot":
            kind = entry.load()
            assert kind.__new__(kind).implied_prior(np.array(COUNTS)) is None


def test_a_method_may_say_what_its_logits_imply():
    class Own(Plain):
        def implied_prior(self, counts):
            return counts**2

    got = prior_of("uniform").shift(Own(), NAMES).exp()
    expected = (1 / 3) / shares([36, 9, 1])
    np.testing.assert_allclose(got, expected, rtol=1e-14)


def test_names_that_were_not_trained():
    """Among themselves they are alike; beside trained ones only where training made those alike."""
    new, mixed = ("yak", "emu"), ("dog", "yak", "cow")
    for settings in ({}, {"loss": "la"}):
        uniform = prior_of("uniform", settings)
        assert uniform.shift(Plain(), new).tolist() == pytest.approx([0, 0], abs=1e-15)
        given = prior_of({"yak": 3, "emu": 1}, settings)
        np.testing.assert_allclose(given.shift(Plain(), new).exp(), [1.5, 0.5], rtol=1e-14)
    alike = prior_of("uniform", {"loss": "la"}).shift(Plain(), mixed)
    assert alike.tolist() == pytest.approx([0] * 3, abs=1e-14)
    with pytest.raises(InputError, match="prior uniform: 'yak' was not trained, and training made"):
        prior_of("uniform").shift(Plain(), mixed)
    for names in (new, mixed):
        with pytest.raises(InputError, match="prior train: 'yak' was not trained and has no count"):
            prior_of("train").check(names)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: prior_of("test"), "prior 'test': expected uniform, train or a share"),
        (lambda: prior_of("uniform", counts=(6, 0, 1)), "no training picture of 'cat'"),
        (lambda: prior_of({"dog": 1, "cat": 1}).check(NAMES), "prior: lacks class 'cow'"),
        (
            lambda: prior_of({"dog": 1, "cat": 0, "cow": 1}).check(NAMES),
            "prior: class 'cat' has 0, expected more than 0",
        ),
        (lambda: read_prior("/no/where.json"), "--prior /no/where.json: cannot be read"),
    ],
)
def test_priors_that_are_none(call, expected):
    with pytest.raises(InputError, match=expected):
        call()


def test_what_the_flag_means(tmp_path):
    file = tmp_path / "prior.json"
    file.write_text('{"dog": 2, "cat": 1}')
    assert read_prior(None) is None
    assert [read_prior(word) for word in ("uniform", "train")] == ["uniform", "train"]
    assert read_prior(str(file)) == {"dog": 2, "cat": 1}
