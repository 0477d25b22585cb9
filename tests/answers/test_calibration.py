"""Temperature, calibration error and the scale of new names, against plain searches and loops."""

import math

import pytest
import torch

from lamp_fast.answers.calibration import (
    CannotFit,
    bin_confidences,
    cross_entropy,
    distance_aware_scale,
    fit_temperature,
    probabilities,
)
from lamp_fast.answers.rules import Rules


def drawn(count, classes, *, size, seed=0):
    """Logits, and labels that follow softmax(logits / size): the right temperature is ``size``."""
    generator = torch.Generator().manual_seed(seed)
    plain = 3 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(plain.softmax(1), 1, generator=generator).squeeze(1)
    return size * plain, labels


@pytest.mark.parametrize(("count", "classes", "size"), [(40, 2, 1.0), (300, 7, 4.0), (300, 7, 0.1)])
def test_no_point_of_a_dense_grid_has_a_smaller_loss(count, classes, size):
    logits, labels = drawn(count, classes, size=size)
    found = fit_temperature(logits, labels)
    steps = torch.linspace(math.log(0.01), math.log(100), 801).exp().tolist()
    losses = [cross_entropy(logits, labels, 1 / each) for each in steps]
    # The grid's own sums err by a few units of rounding.
    assert cross_entropy(logits, labels, 1 / found.value) <= min(losses) + 1e-13
    # Convex: the minimum lies between the neighbours of the best point.
    best = losses.index(min(losses))
    assert steps[best - 1] < found.value < steps[best + 1]
    # The labels were drawn at T = size, an estimate of which is normal around it: 4 of its errors.
    assert abs(found.value - size) < 4 * found.error


def test_the_error_is_that_of_estimates_on_other_pictures():
    fits = [fit_temperature(*drawn(200, 4, size=2.0, seed=seed)) for seed in range(200)]
    values = torch.tensor([each.value for each in fits])
    told = sum(each.error for each in fits) / len(fits)
    # A standard deviation of 200 draws errs by 1 / sqrt(2 * 199) = 5%; 4 of these, and 5% for what
    # second order adds to the first-order error at n = 200 (the relative error itself is 6%).
    assert values.std().item() == pytest.approx(told, rel=0.25)


@pytest.mark.parametrize(
    ("logits", "labels", "reason"),
    [
        ([[]], [], "no validation picture"),
        ([[2.0, 1.0], [0.0, 3.0]], [0, 1], "all 2 validation pictures are right"),
        ([[2.0, 1.0], [0.0, 3.0]], [1, 0], "no better than all classes alike"),
        ([[1.0, 1.0], [1.0, 1.0]], [0, 1], "right"),
        ([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]], [0, 1], "standard error"),
    ],
)
def test_what_determines_no_temperature_says_why(logits, labels, reason):
    with pytest.raises(CannotFit, match=reason):
        fit_temperature(torch.tensor(logits), torch.tensor(labels, dtype=torch.int64))


def test_large_logits_of_small_precision():
    """CLIP's are float32 around 25, and only differences matter."""
    logits, labels = drawn(200, 5, size=1.0)
    found = fit_temperature((logits + 4096).float(), labels)
    # A step of float32 at 4096 is 2^-11; the loss's minimum moves by about as much relatively.
    assert found.value == pytest.approx(fit_temperature(logits, labels).value, rel=2**-10)


def test_the_order_of_classes_never_changes():
    """Also where float32 probabilities round to one number."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, 6, generator=generator)
    logits[:50, 1] = torch.nextafter(logits[:50, 0], torch.tensor(9.0))
    logits[50:60, 2] = logits[50:60, 4]
    before = Rules().answer(logits)
    assert torch.equal(before.order[:, 0], torch.stack([row.argmax() for row in logits]))
    for temperature in (1e-3, 0.3, 7.0, 1e4):
        scale = torch.full((6,), 1 / temperature, dtype=torch.float64)
        scale[3] = math.nan
        after = Rules(scale=scale * torch.linspace(0.5, 2, 6)).answer(logits)
        assert torch.equal(after.order, before.order)
        likely = after.probabilities
        assert (likely.gather(1, after.order[:, :1]).squeeze(1) == likely.amax(1)).all()
        assert torch.equal(after.calibrated, before.order[:, 0] != 3)
        alone = ~after.calibrated
        assert torch.equal(likely[alone], before.raw[alone])


def test_parents_have_calibrated_sums_in_an_order_that_stays():
    """The likeliest class may lose to two others together, and at another temperature win."""
    logits = torch.tensor([[1.0, 0.7, 0.6], [4.0, 0.0, 0.0]]).double()
    sums = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).double()
    rules = Rules(scale=torch.full((3,), 9.0).double(), roll_up=lambda likely: likely @ sums)
    answered = rules.answer(logits)
    raw, calibrated = ((scale * logits).softmax(1) @ sums for scale in (1, 9))
    torch.testing.assert_close(answered.raw, raw, rtol=1e-15, atol=0)
    torch.testing.assert_close(answered.probabilities, calibrated, rtol=1e-15, atol=0)
    assert calibrated[0].argmax() == 0
    assert answered.order.tolist() == [[1, 0], [0, 1]]


def test_calibration_error_by_a_plain_loop():
    generator = torch.Generator().manual_seed(1)
    confidence = torch.rand(500, generator=generator, dtype=torch.float64)
    # Edges belong to the bin below them, 0 to the first.
    confidence[:4] = torch.tensor([0.0, 1.0, 0.2, 1 / 3], dtype=torch.float64)
    right = torch.rand(500, generator=generator) < confidence
    found, error = bin_confidences(confidence, right, 15), 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        some = [
            index
            for index, value in enumerate(confidence.tolist())
            if low < value <= high or (number == 0 and value == 0)
        ]
        assert found.counts[number] == len(some)
        sure = sum(confidence[some].tolist()) / len(some)
        true = sum(right[some].tolist()) / len(some)
        error += len(some) / 500 * abs(true - sure)
    assert found.error == pytest.approx(error, rel=1e-12)  # sums of 500 numbers in another order


def test_a_sure_classifier_that_is_always_right_has_no_error():
    ones = torch.ones(7, dtype=torch.float64)
    assert bin_confidences(ones, ones.bool()).error == 0
    assert bin_confidences(ones, ~ones.bool()).error == 1


def test_the_right_temperature_mends_the_error():
    logits, labels = drawn(3000, 5, size=4.0)
    likely = {each: probabilities(logits, each) for each in (1.0, 1 / 4)}
    errors = [
        bin_confidences(each.amax(1), each.argmax(1) == labels).error for each in likely.values()
    ]
    # At the true T each bin's gap has a standard deviation below 0.5 / sqrt(n_b), so the error's
    # mean is below 0.5 sqrt(15 / 3000) = 0.035.
    assert errors[1] < 0.035 < errors[0]


def test_distance_aware_scale_by_a_plain_loop():
    generator = torch.Generator().manual_seed(2)
    trained = [torch.randn(8, 6, generator=generator) for _ in range(2)]
    names = [torch.randn(3, 6, generator=generator) for _ in range(2)]
    names[0][2] = 3 * trained[0][4]  # a trained class, whatever its length

    def nearness(which, name):
        one = names[which][name].double()
        others = trained[which].double()
        gaps = sorted(
            math.dist((one / one.norm()).tolist(), (other / other.norm()).tolist())
            for other in others
        )
        return math.exp(-sum(gaps[:5]) / 5)

    expected = [nearness(0, name) / nearness(1, name) for name in range(2)] + [1.0]
    found = distance_aware_scale(names[0], names[1], trained[0], trained[1])
    assert found.tolist() == pytest.approx(expected, rel=1e-12)  # a few roundings


def test_distances_to_fewer_classes_than_five():
    names, trained = torch.eye(3)[:1], torch.eye(3)[1:]
    assert distance_aware_scale(names, names, trained, trained).tolist() == [1.0]
