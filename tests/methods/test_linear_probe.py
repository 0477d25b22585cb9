"""The linear probe against scikit-learn's own on open_clip's own features, and its equations."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from training_sets import training_set

from lamp_fast.data.benchmark import build_benchmark
from lamp_fast.data.sources import load_source
from lamp_fast.data.transforms import evaluation_transform
from lamp_fast.errors import InputError
from lamp_fast.methods import linear_probe
from lamp_fast.methods.linear_probe import FITS, LinearProbe, search
from lamp_fast.methods.settings.linear_probe import LinearProbeSettings
from lamp_fast.methods.surroundings import RunClasses


@pytest.fixture(scope="module")
def digits():
    """Eight to one training pictures a class, and four a class to choose on."""
    source = load_source("digits", None, None, None)
    built = build_benchmark(
        source, split="base-new", imb=8.0, cap=None, shots=8, seed=1, validation="all"
    )
    assert built.counts.tolist() == [8, 4, 2, 1, 1]
    return built


def first_two(benchmark):
    parts = {part: getattr(benchmark, part) for part in ("train", "val", "test_base")}
    parts = {part: each.select(np.flatnonzero(each.labels < 2)) for part, each in parts.items()}
    return replace(benchmark, base_names=benchmark.base_names[:2], **parts)


def build(clip, benchmark, **settings):
    classes = RunClasses(benchmark.base_names, benchmark.new_names)
    return LinearProbe(clip, LinearProbeSettings(**settings), classes)


def fitted(clip, benchmark, **settings):
    method = build(clip, benchmark, **settings)
    assert method.read_training_set(training_set(benchmark, clip, 4)) is None
    return method


def encoded(clip, pictures, unprojected=False):
    """open_clip's own features of pictures in testing, as numpy has them."""
    model = copy.deepcopy(clip.model)
    if unprojected:
        model.visual.proj = None
    transform = evaluation_transform(clip.preprocessing)
    images = torch.stack([transform(pictures.load(row)) for row in range(len(pictures))])
    with torch.no_grad():
        return model.encode_image(images.to(clip.dtype)).numpy()


def coops_probe(train, labels, val, val_labels, score):
    """The model of the last step, and how many of the validation pictures count for it."""

    def fit(c):
        model = LogisticRegression(C=c, max_iter=1000).fit(train, labels)
        return model, score(model.predict(val), val_labels)

    candidates = [1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6]
    peak = candidates[np.argmax([fit(c)[1] for c in candidates])]
    left, right = 0.1 * peak, 10 * peak
    for _ in range(8):
        centre = 10 ** (0.5 * (np.log10(left) + np.log10(right)))
        (lower, below), (upper, above) = fit(left), fit(right)
        if below < above:
            chosen, c, left = upper, right, centre
        else:
            chosen, c, right = lower, left, centre
    return chosen, c


@pytest.mark.parametrize("features", ["projected", "unprojected"])
@pytest.mark.parametrize("count", [5, 2])
def test_it_is_scikit_learns_own_probe_by_coops_search(small_clip, digits, features, count):
    clip, benchmark = small_clip(), digits if count == 5 else first_two(digits)
    method = fitted(clip, benchmark, probe_features=features)
    raw = features == "unprojected"
    train, val, test = (
        encoded(clip, each, raw) for each in (benchmark.train, benchmark.val, benchmark.test_base)
    )
    expected, c = coops_probe(
        train,
        benchmark.train.labels,
        val,
        benchmark.val.labels,
        lambda predicted, labels: (predicted == labels).mean(),
    )
    # The same C, up to the rounding of powers and logarithms.
    assert float(method.c) == pytest.approx(c, rel=1e-12)
    rows, bias = expected.coef_, expected.intercept_
    if count == 2:
        rows, bias = np.stack([-rows[0], rows[0]]) / 2, np.array([-bias[0], bias[0]]) / 2
    # The same steps from features that differ by the rounding of another order of adding up, which
    # some hundred steps at most make a million times larger.
    np.testing.assert_allclose(method.weight, rows, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(method.bias, bias, rtol=1e-6, atol=1e-6)

    reader = training_set(benchmark, clip, 4)
    seen = reader.reader.read(benchmark.test_base, reader.centre)
    logits = method.feature_logits(seen, method.prepare(benchmark.base_names, "{}"))
    np.testing.assert_allclose(logits.softmax(1), expected.predict_proba(test), atol=1e-6)
    assert logits.argmax(1).tolist() == expected.predict(test).tolist()


@pytest.mark.parametrize("class_weight", ["none", "balanced"])
@pytest.mark.parametrize("count", [5, 2])
def test_the_fit_is_a_minimum_of_its_equation(small_clip, digits, class_weight, count):
    """Its gradient, written out, is as small as scikit-learn's default tolerance asks for."""
    clip, benchmark = small_clip(), digits if count == 5 else first_two(digits)
    c = 0.05
    method = fitted(clip, benchmark, probe_c=c, probe_class_weight=class_weight)
    assert float(method.c) == c
    features = torch.from_numpy(encoded(clip, benchmark.train))
    labels = torch.from_numpy(benchmark.train.labels)
    counts = torch.bincount(labels)
    weights = torch.ones(len(labels), dtype=torch.float64)
    if class_weight == "balanced":
        weights = len(labels) / (len(counts) * counts[labels].double())
    weight, bias = method.weight.clone(), method.bias.clone()
    if count == 2:
        # One vector is learned, and scores 0 against it.
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    weight.requires_grad_(), bias.requires_grad_()
    logits = features @ weight.T + bias
    if count == 2:
        logits = F.pad(logits, (1, 0))
    losses = F.cross_entropy(logits, labels, reduction="none")
    loss = (weights * losses).sum() + weight.square().sum() / (2 * c)
    (loss / weights.sum()).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) <= 1e-4
    # Which says something of this weight: the regularisation alone pulls a hundred times harder.
    assert weight.abs().max() / (c * weights.sum()) > 1e-2


@pytest.mark.parametrize("class_weight", ["none", "balanced"])
def test_it_says_its_c_and_how_it_was_chosen(small_clip, digits, capsys, class_weight):
    clip = small_clip()
    uneven = digits.val.select([row for row in range(len(digits.val)) if row % 4 or row < 4])
    benchmark = replace(digits, val=uneven)
    method = fitted(clip, benchmark, probe_class_weight=class_weight)
    classes = method.prepare(benchmark.base_names, "{}")
    seen, labels = training_set(benchmark, clip, 4).validation()
    right = method.feature_logits(seen, classes).argmax(1) == labels
    counts = torch.bincount(labels)
    assert len(counts.unique()) > 1
    each = torch.bincount(labels[right], minlength=5) / counts
    by, score = ("accuracy", right.double().mean())
    if class_weight == "balanced":
        by, score = ("mean class accuracy", each.mean())
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == (
        f"probe   C = {float(method.c):.6g}, by {by} {100 * float(score):.2f}% on"
        f" {len(labels)} validation pictures"
    )


def test_the_search_is_coops():
    """On accuracies with many ties, against its loop over powers of ten."""
    generator = np.random.default_rng(0)
    for number in range(50):
        table = generator.integers(0, 4, 1000)
        asked = []

        def score(exponent, table=table, asked=asked):
            asked.append(exponent)
            return int(table[round((exponent + 8) * 60)])

        candidates = [1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6]
        values = [score(np.log10(c)) for c in candidates]
        left, right = (candidates[int(np.argmax(values))] * by for by in (0.1, 10))
        for _ in range(8):
            centre = np.sqrt(left * right)
            if score(np.log10(left)) < score(np.log10(right)):
                last, left = right, centre
            else:
                last, right = left, centre
        asked.clear()
        exponent, best = search(score)
        assert exponent == pytest.approx(np.log10(last), abs=1e-9), number
        assert best == score(exponent)
        assert len(set(asked)) == FITS


def test_a_list_of_trained_names_has_their_rows(small_clip, digits):
    clip = small_clip()
    method = fitted(clip, digits, probe_c=1.0)
    features = torch.randn(4, 32, dtype=torch.float64)
    every = method.feature_logits(features, method.prepare(digits.base_names, "{}"))
    some = method.feature_logits(features, method.prepare(digits.base_names[3:0:-2], "{}"))
    torch.testing.assert_close(some, every[:, [3, 1]])
    with pytest.raises(InputError, match=re.escape(f"{digits.new_names[0]!r} was not trained")):
        method.prepare([digits.base_names[0], digits.new_names[0]], "{}")


def test_what_cannot_be_fitted_is_refused(small_clip, digits):
    clip = small_clip()
    empty = replace(digits, val=digits.val.select([]))
    with pytest.raises(InputError, match="--probe-c none: --data digits has no validation picture"):
        fitted(clip, empty)
    assert float(fitted(clip, empty, probe_c=2.0).c) == 2.0
    with pytest.raises(InputError, match=r"'0' is the only trained class, expected at least 2"):
        LinearProbe(clip, LinearProbeSettings(), RunClasses(("0",)))
    assert LinearProbeSettings().uses_validation
    assert not LinearProbeSettings(probe_c=2.0).uses_validation


def test_fits_that_did_not_converge_are_told_in_one_line(small_clip, digits, monkeypatch):
    monkeypatch.setattr(linear_probe, "MAX_ITERATIONS", 1)
    with pytest.warns(UserWarning, match=f"{FITS} of {FITS} fits had not converged") as told:
        fitted(small_clip(), digits)
    assert len(told) == 1


def test_a_clip_in_bfloat16_leaves_it_in_float32(small_clip, digits):
    clip = small_clip().to(torch.bfloat16)
    method = fitted(clip, digits)
    assert method.weight.dtype == method.bias.dtype == torch.float32
    classes = method.prepare(digits.base_names, "{}")
    logits = method.feature_logits(torch.randn(3, 32).bfloat16(), classes)
    assert logits.dtype == torch.float32
    assert method.trainable_parameters() == 5 * (12 + 1)


@pytest.mark.parametrize(("weights", "expected"), [("none", [3, 1]), ("balanced", [1, 1])])
def test_the_shares_that_it_implies_are_trainings_unless_classes_weigh_alike(
    small_clip, digits, weights, expected
):
    method = build(small_clip(), digits, probe_class_weight=weights)
    assert method.implied_prior(np.array([3, 1])).tolist() == expected
