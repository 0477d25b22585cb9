"""Losses for unequal classes, against their equations written out one number at a time."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.runs.optimisation import build_criterion, row_weights
from lamp_fast.runs.settings import OptimConfig

CPU = torch.device("cpu")
NAMES = ("dog", "cat", "cow")
COUNTS = (6, 3, 1)
N, C = 10, 3
WEIGHTS = '{"cow": 3, "dog": 0.25, "cat": 1.5}'
# Some thirty operations in float64 of numbers below 100: 30 eps relative, and as much around zero.
CLOSE = {"rtol": 1e-13, "atol": 1e-13}


def criterion(counts=COUNTS, scale=1.0, **settings):
    optim = OptimConfig(**settings)
    validate(optim)
    return build_criterion(optim, counts, CPU, scale=scale, names=NAMES)


def batch(rows=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, C, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(C, (rows,), generator=generator)


def cross_entropy(z, y):
    """-log(e^z_y / sum_j e^z_j) of one row, a list of scalars."""
    return torch.log(sum(torch.exp(each) for each in z)) - z[y]


def mean_of(term):
    return lambda logits, labels: (
        sum(
            term([row[c] for c in range(C)], int(y))
            for row, y in zip(logits, labels.tolist(), strict=True)
        )
        / len(logits)
    )


def adjusted(tau):
    return lambda z, y: cross_entropy(
        [x + tau * math.log(n / N) for x, n in zip(z, COUNTS, strict=True)], y
    )


def margin(max_margin, scale):
    # The smallest class has one picture, so n^(-1/4) is 1 there.
    def term(z, y):
        moved = list(z)
        moved[y] = z[y] - scale * max_margin / COUNTS[y] ** 0.25
        return cross_entropy(moved, y)

    return term


def focal(gamma):
    def term(z, y):
        p = torch.exp(z[y]) / sum(torch.exp(each) for each in z)
        return -((1 - p) ** gamma) * torch.log(p)

    return term


def weighed(term, weights):
    return lambda z, y: weights[y] * term(z, y)


def mean_one(weights):
    return [C * each / sum(weights) for each in weights]


def lade(remine, weight):
    prior = [n / N for n in COUNTS]

    def loss(logits, given):
        labels = given.tolist()
        rows = len(labels)
        regulariser = 0.0
        for c in range(C):
            own = [logits[b, c] for b in range(rows) if labels[b] == c]
            first = sum(own) / len(own) if own else 0.0
            ratio = [1 / C / prior[label] for label in labels]
            second = torch.log(sum(r * torch.exp(logits[b, c]) for b, r in enumerate(ratio)) / rows)
            regulariser = regulariser + prior[c] * (second + remine * second**2 - first)
        return mean_of(adjusted(1.0))(logits, given) + weight * regulariser

    return loss


EFFECTIVE = mean_one([(1 - 0.9) / (1 - 0.9**n) for n in COUNTS])
INVERSE = mean_one([N / n for n in COUNTS])
AUTO = [N / (C * n) for n in COUNTS]
GIVEN = [0.25, 1.5, 3.0]

LITERAL = {
    "ce": ({}, mean_of(cross_entropy)),
    "la": ({"loss": "la", "tau": 1.5}, mean_of(adjusted(1.5))),
    "+LA": ({"logit_adjustment": True, "tau": 0.5}, mean_of(adjusted(0.5))),
    "balanced": ({"loss": "balanced"}, mean_of(adjusted(1.0))),
    "ldam": ({"loss": "ldam"}, mean_of(margin(0.5, 20.0))),
    "ldam-wider": ({"loss": "ldam", "loss_max_margin": 2.0}, mean_of(margin(2.0, 20.0))),
    "cb": ({"loss": "cb", "loss_beta": 0.9}, mean_of(weighed(cross_entropy, EFFECTIVE))),
    "grw": ({"loss": "grw"}, mean_of(weighed(cross_entropy, INVERSE))),
    "focal": ({"loss": "focal"}, mean_of(focal(2.0))),
    "focal-0.5": ({"loss": "focal", "loss_gamma": 0.5}, mean_of(focal(0.5))),
    "lade": ({"loss": "lade"}, lade(0.1, 0.1)),
    "lade-more": ({"loss": "lade", "loss_remine": 0.7, "loss_lader": 2.0}, lade(0.7, 2.0)),
    "ce-auto": ({"class_weights": "auto"}, mean_of(weighed(cross_entropy, AUTO))),
    "ce-given": ({"class_weights": WEIGHTS}, mean_of(weighed(cross_entropy, GIVEN))),
    "la-auto": (
        {"loss": "la", "class_weights": "auto"},
        mean_of(weighed(adjusted(1.0), AUTO)),
    ),
    "ldam-given": (
        {"loss": "ldam", "class_weights": WEIGHTS},
        mean_of(weighed(margin(0.5, 20.0), GIVEN)),
    ),
    "focal-given": (
        {"loss": "focal", "class_weights": WEIGHTS},
        mean_of(weighed(focal(2.0), GIVEN)),
    ),
}
SPLITS = [name for name in LITERAL if not name.startswith("lade")]


@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("rows", [1, 8])
def test_values_and_gradients_are_the_equations(name, rows):
    settings, literal = LITERAL[name]
    logits, labels = batch(rows)
    results = []
    for loss in (criterion(scale=20.0, **settings), literal):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, labels)
        assert value.shape == ()
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*(value for value, _ in results), **CLOSE)
    torch.testing.assert_close(*(gradient for _, gradient in results), **CLOSE)


@pytest.mark.parametrize("name", LITERAL)
def test_single_precision_stays_single(name):
    """The error is float32's: some thirty roundings of numbers up to 60 (margins, squares)."""
    settings, literal = LITERAL[name]
    logits, labels = batch(dtype=torch.float32)
    got = criterion(scale=20.0, **settings)(logits, labels)
    assert got.dtype == torch.float32
    expected = literal(logits.double(), labels)
    assert got.double().item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", SPLITS)
def test_pieces_of_a_batch_are_the_batch(name):
    """Uneven pieces, weighed by their rows, as pieces and ranks are: the same gradient."""
    loss = criterion(scale=20.0, **LITERAL[name][0])
    logits, labels = batch(9)
    whole, parts = (logits.clone().requires_grad_() for _ in range(2))
    loss(whole, labels).backward()
    for rows in (slice(0, 2), slice(2, 3), slice(3, 9)):
        share = len(labels[rows]) / len(labels)
        (share * loss(parts[rows], labels[rows])).backward()
    torch.testing.assert_close(parts.grad, whole.grad, **CLOSE)


def test_pieces_of_lade_are_not_the_batch():
    """Which is why it is refused with pieces and with several ranks."""
    loss = criterion(loss="lade")
    logits, labels = batch(8)
    parts = (loss(logits[:4], labels[:4]) + loss(logits[4:], labels[4:])) / 2
    assert abs(parts - loss(logits, labels)) > 1e-3
    assert not OptimConfig(loss="lade").splits_batches


def test_closed_forms_at_equal_logits():
    """z = 0: the softmax is 1/3, and each loss of the class with one picture of ten is a number."""
    logits, label = torch.zeros(1, C, dtype=torch.float64), torch.tensor([2])
    expected = {
        "ce": math.log(3),
        "la": -math.log(1 / 10),
        "balanced": -math.log(1 / 10),
        "ldam": math.log(1 + 2 * math.exp(0.5 * 8)),
        "grw": (30 / (10 + 10 / 6 + 10 / 3)) * math.log(3),
        "focal": (2 / 3) ** 2 * math.log(3),
    }
    for name, value in expected.items():
        got = criterion(scale=8.0, loss=name)(logits, label).item()
        assert got == pytest.approx(value, rel=1e-14), name
    auto = criterion(class_weights="auto")(logits, label).item()
    assert auto == pytest.approx(10 / 3 * math.log(3), rel=1e-14)
    # One row: f = 0, and l = log(1 / (3 pi_y)) for every class.
    bound = math.log(10 / 3)
    got = criterion(loss="lade")(logits, label).item()
    assert got == pytest.approx(math.log(10) + 0.1 * (bound + 0.1 * bound**2), rel=1e-14)


def test_lades_regulariser_is_least_at_the_ratio_that_it_is_derived_from():
    """Pictures of three kinds x, drawn as they are: at z_c(x) = log p(x | c) / p_u(x) the bound is
    the divergence, so the regulariser is -sum_c pi_c KL(p(x | c), p_u), and its gradient is 0. Both
    fail where the importance of a picture is not that of its own class."""
    given_class = torch.tensor([[4, 2, 2], [1, 5, 2], [2, 1, 5]], dtype=torch.float64) / 8
    uniform = given_class.mean(0)
    ratio = (given_class / uniform).log()  # [c, x]
    draws = (torch.tensor(COUNTS)[:, None] * 8 * given_class).long()  # [c, x]
    labels = torch.arange(C).repeat_interleave(draws.sum(1))
    kinds = torch.cat([torch.arange(3).repeat_interleave(each) for each in draws])
    prior = torch.tensor(COUNTS, dtype=torch.float64) / N
    divergence = (given_class * ratio).sum(1)
    logits = ratio.T[kinds].requires_grad_()
    only = criterion(loss="lade", loss_lader=1.0)(logits, labels) - criterion(loss="balanced")(
        logits, labels
    )
    assert only.item() == pytest.approx(-(prior * divergence).sum().item(), rel=1e-13)
    # Pictures of one kind move together: a network cannot tell them apart.
    gradient = torch.autograd.grad(only, logits)[0]
    by_kind = torch.zeros(3, C, dtype=torch.float64).index_add(0, kinds, gradient)
    torch.testing.assert_close(by_kind, torch.zeros_like(by_kind), rtol=0, atol=1e-14)


def test_balanced_is_la_at_tau_1_bit_for_bit():
    logits, labels = batch(dtype=torch.float32)
    results = [
        criterion(**settings)(logits, labels)
        for settings in ({"loss": "la"}, {"loss": "balanced"}, {"logit_adjustment": True})
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "settings",
    [
        *({"loss": name} for name in ("la", "balanced", "cb", "grw")),
        {"class_weights": "auto"},
        {"loss": "lade", "loss_lader": 0.0},
    ],
)
def test_equal_classes_are_cross_entropy(settings):
    logits, labels = batch()
    got = criterion(counts=(7, 7, 7), **settings)(logits, labels)
    torch.testing.assert_close(got, F.cross_entropy(logits, labels), **CLOSE)


def test_weights_of_equal_classes_are_one():
    for settings in ({"loss": "cb"}, {"loss": "grw"}, {"class_weights": "auto"}):
        weights = row_weights(OptimConfig(**settings), (7, 7, 7))
        torch.testing.assert_close(weights, torch.ones(3, dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "la", "tau": 0.0},
        {"loss": "ldam", "loss_max_margin": 0.0},
        {"loss": "cb", "loss_beta": 0.0},
        {"loss": "focal", "loss_gamma": 0.0},
        {"class_weights": '{"dog": 1, "cat": 1, "cow": 1}'},
    ],
)
def test_settings_that_take_a_loss_back_to_cross_entropy(settings):
    logits, labels = batch()
    got = criterion(scale=100.0, **settings)(logits, labels)
    torch.testing.assert_close(got, F.cross_entropy(logits, labels), **CLOSE)


def test_the_default_is_torchs_own():
    """Runs of earlier versions go on to the bit."""
    assert criterion() is F.cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 1000.0])
def test_focal_of_certain_rows(gamma, dtype):
    """Right beyond rounding: nothing to learn. Wrong beyond rounding: cross-entropy."""
    logits = torch.tensor([[0.0, -1e4, -1e4], [1e4, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = criterion(loss="focal", loss_gamma=gamma)(logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(1e4 / 2, rel=1e-6)
    loss.backward()
    expected = torch.tensor([[0.0, 0, 0], [0.5, -0.5, 0]], dtype=dtype)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-6, atol=1e-12)


def test_effective_numbers_of_large_classes():
    """1 - beta^n loses every digit in the obvious form where beta is near 1: then w is 1 / n."""
    weights = row_weights(OptimConfig(loss="cb", loss_beta=1 - 2**-50), (1, 1000))
    assert (weights[0] / weights[1]).item() == pytest.approx(1000, rel=1e-9)
    assert weights.mean().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss": "focal", "logit_adjustment": True}, "--loss focal --logit-adjustment: expected"),
        ({"loss": "balanced", "tau": 2.0}, "--tau 2.0: --loss balanced is la at 1"),
        ({"loss": "cb", "class_weights": "auto"}, "--class-weights: --loss cb weighs classes"),
        ({"loss": "grw", "class_weights": "x.json"}, "--class-weights: --loss grw weighs"),
        ({"loss": "lade", "accumulate": 2}, "--accumulate 2: --loss lade compares"),
        ({"loss": "lade", "sampler": "sqrt"}, "--sampler sqrt: --loss lade compares"),
        ({"loss_gamma": -1.0}, "--loss-gamma -1.0: expected at least 0"),
        ({"loss_beta": 1.0}, "--loss-beta 1.0: expected less than 1"),
        ({"loss_max_margin": float("nan")}, "--loss-max-margin nan: expected at least 0"),
    ],
)
def test_settings_that_do_not_go_together(settings, expected):
    with pytest.raises(InputError, match=expected):
        validate(OptimConfig(**settings))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"dog": 1, "cat": 1}', "lacks class 'cow'"),
        ('{"dog": 1, "cat": 1, "cow": 1, "yak": 1}', "'yak' is none of the 3 classes"),
        ('{"dog": 1, "cat": 1, "cow": 0}', "class 'cow' has 0, expected more than 0"),
        ('{"dog": 1, "cat": -2.5, "cow": 1}', "class 'cat' has -2.5, expected more than 0"),
        ('{"dog": NaN, "cat": 1, "cow": 1}', "class 'dog' has nan, expected more than 0"),
        ('{"dog": Infinity, "cat": 1, "cow": 1}', "class 'dog' has inf, expected at most"),
        ('{"dog": 1e31, "cat": 1, "cow": 1}', "class 'dog' has 1e"),
        ('{"dog": true, "cat": 1, "cow": 1}', "class 'dog' has True, expected a number"),
        ('{"dog": "1", "cat": 1, "cow": 1}', "class 'dog' has 1, expected a number"),
        ('{"dog": [1], "cat": 1, "cow": 1}', r"class 'dog' has \[1\], expected a number"),
        ('{"dog": 1, "dog": 2, "cat": 1, "cow": 1}', "'dog' is there twice"),
        ("[1, 2, 3]", "expected an object such as"),
        ("dog: 1", "not JSON"),
        ("", "not JSON"),
        ('{"dog": ' + "[" * 100_000, "not JSON"),
        (b"\xff\xfe", "cannot be read"),
    ],
    ids=range(16),
)
def test_files_of_class_weights_that_are_none(tmp_path, text, expected):
    file = tmp_path / "weights.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=expected) as error:
        OptimConfig(class_weights=str(file)).resolved(NAMES)
    assert str(error.value).startswith(f"--class-weights {file}: ")
    assert "\n" not in str(error.value)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match=f"--class-weights {missing}: cannot be read"):
            OptimConfig(class_weights=str(missing)).resolved(NAMES)


def test_a_file_of_class_weights_becomes_its_content(tmp_path):
    file = tmp_path / "weights.json"
    file.write_text(WEIGHTS)
    optim = OptimConfig(class_weights=str(file)).resolved(NAMES)
    file.unlink()
    assert optim.class_weights == '{"dog": 0.25, "cat": 1.5, "cow": 3.0}'
    assert optim.resolved(NAMES) == optim
    assert row_weights(optim, COUNTS, NAMES).tolist() == GIVEN
    # Classes may share a name; they share the weight.
    shared = ("dog", "cat", "cow", "cat")
    assert row_weights(optim.resolved(shared), (1, 1, 1, 1), shared).tolist() == [0.25, 1.5, 3, 1.5]
    assert replace(optim, class_weights="auto").resolved(NAMES).class_weights == "auto"
