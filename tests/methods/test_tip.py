"""Tip-Adapter and Tip-Adapter-F against their equations written out literally, in float64."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_sets import training_set

from lamp_fast import train
from lamp_fast.data.benchmark import Origin, build_benchmark
from lamp_fast.data.catalog import CATALOG
from lamp_fast.data.sources import load_source
from lamp_fast.data.transforms import evaluation_transform
from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.methods import METHODS
from lamp_fast.methods.settings.tip import TipSettings
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.methods.tip import ALPHAS, BETAS, PUBLISHED, Tip, grid, sums_by_class
from lamp_fast.runs import parameters
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig, default_config
from lamp_fast.runs.folder import LEARNED
from lamp_fast.tensors import load_tensors

# The same float64 numbers added up in another order: some hundred operations on values of order 1
# to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def few_digits():
    """A long tail of 4 to 1 training pictures, with validation pictures."""
    source = load_source("digits", None, None, None)
    return build_benchmark(
        source, split="base-new", imb=4.0, cap=None, shots=4, seed=1, validation="all"
    )


def build(name, clip, benchmark, epochs=3, **own):
    config = default_config({"method": name, "data": "digits"})
    optim = replace(config.optim, epochs=epochs)
    config = replace(config, own=replace(config.own, **own), optim=optim)
    counts = tuple(benchmark.counts.tolist())
    return build_method(clip, config, RunClasses(benchmark.base_names, benchmark.new_names, counts))


def pictures(count=4):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator)


def encoded(clip, images):
    return clip.model.encode_image(images).detach()


def texts(clip, names, templates):
    each = [
        F.normalize(clip.model.encode_text(clip.tokenizer([t.format(n) for n in names])), dim=-1)
        for t in templates
    ]
    return F.normalize(sum(each) / len(each), dim=-1).detach()


def shown(benchmark, clip):
    """Training pictures as a data set that is not cropped shows them."""
    transform = evaluation_transform(clip.preprocessing)
    count = len(benchmark.train)
    return torch.stack([transform(benchmark.train.load(i)) for i in range(count)]).double()


def literal(clip, keys, labels, f, t, alpha, beta, weights=None):
    """Logits one picture and one key at a time; ``labels`` are columns of ``t``, or None."""
    rows = []
    for feature in f:
        row = clip.logit_scale * t @ feature
        for i, key in enumerate(keys):
            if labels[i] is not None:
                weight = 1.0 if weights is None else weights[i]
                value = alpha * weight * torch.exp(-beta * (1 - feature @ key))
                row = row + value * F.one_hot(torch.tensor(labels[i]), len(t))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("balanced", [False, True])
def test_tips_equations(small_clip, few_digits, balanced):
    """For trained names in any order, among others, new ones alone, and of another data set."""
    clip = small_clip()
    own = {"tip_alpha": 2.5, "tip_beta": 3.5, "tip_balanced": balanced}
    method = build("tip", clip, few_digits, **own)
    assert method.read_training_set(training_set(few_digits, clip, 4)) is None
    keys = F.normalize(encoded(clip, shown(few_digits, clip)), dim=-1)
    torch.testing.assert_close(method.keys, keys, **TOLERANCE)
    train_labels, base = few_digits.train.labels.tolist(), few_digits.base_names
    sizes = np.bincount(train_labels)
    assert len(set(sizes)) > 1
    weights = [sizes.mean() / sizes[label] for label in train_labels] if balanced else None
    f = F.normalize(encoded(clip, pictures()), dim=-1)
    for names, origin in (
        (base, few_digits.origin),
        (base[::-1], few_digits.origin),
        (few_digits.new_names, few_digits.origin),
        (("ox", base[2], *few_digits.new_names, base[0]), Origin("dtd", target=True)),
    ):
        t = texts(clip, names, [few_digits.template])
        columns = [
            names.index(base[label]) if base[label] in names else None for label in train_labels
        ]
        got = method.logits(pictures(), method.prepare(names, few_digits.template, origin))
        torch.testing.assert_close(
            got, literal(clip, keys, columns, f, t, 2.5, 3.5, weights), **TOLERANCE
        )
    # A name that was not trained has zero-shot CLIP's logit.
    new = method.prepare(few_digits.new_names, few_digits.template)
    t = texts(clip, few_digits.new_names, [few_digits.template])
    torch.testing.assert_close(
        method.logits(pictures(), new), clip.logit_scale * f @ t.T, **TOLERANCE
    )


def test_keys_are_normalised_means_of_random_crops(small_clip, few_digits):
    clip = small_clip()
    training = training_set(replace(few_digits, augment=True), clip, 4)
    method = build("tip", clip, few_digits, tip_alpha=1.0, tip_beta=1.0, tip_passes=3)
    method.read_training_set(training)
    views = training.views(3)
    assert not torch.equal(views[:, 0], views[:, 1])
    projected = views @ clip.model.visual.proj
    expected = [sum(each) / 3 for each in projected]
    torch.testing.assert_close(method.keys, F.normalize(torch.stack(expected), dim=-1), **TOLERANCE)


def test_classes_of_one_name_have_keys_of_their_own(small_clip):
    """ImageNet has two "missile"."""
    clip = small_clip()
    base = ("missile", "ox", "missile")
    config = TipSettings()
    method = Tip(clip, config, RunClasses(base, (), (2, 1, 1)))
    method.labels.copy_(torch.tensor([0, 0, 1, 2]))
    method.keys.copy_(F.normalize(torch.randn(4, 12, dtype=torch.float64), dim=-1))
    method.alpha.fill_(1.0)
    method.beta.fill_(1.0)
    f = F.normalize(encoded(clip, pictures()), dim=-1)
    for names, columns in ((base, [0, 0, 1, 2]), (("ox", "missile"), [1, 1, 0, None])):
        t = texts(clip, names, ["a photo of a {}."])
        torch.testing.assert_close(
            method.logits(pictures(), method.prepare(names, "a photo of a {}.")),
            literal(clip, method.keys, columns, f, t, 1.0, 1.0),
            **TOLERANCE,
        )


def test_tip_fs_equations(small_clip, few_digits):
    """Logits, loss and the gradient of the keys."""
    clip = small_clip()
    method = build("tip-f", clip, few_digits)
    training = training_set(few_digits, clip, 4)
    features, labels, _ = next(method.read_training_set(training).epoch(0))
    classes = method.prepare(few_digits.base_names, few_digits.template)
    step = method.step(features, labels, classes, F.cross_entropy)
    step.loss.backward()
    keys = method.keys.detach().clone().requires_grad_()
    t = texts(clip, few_digits.base_names, [few_digits.template])
    train_labels = few_digits.train.labels.tolist()
    # The published first values of a data set that none were published for: ImageNet's.
    logits = literal(clip, keys, train_labels, features, t, 1.17, 1.0)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    torch.testing.assert_close(step.logits, logits, **TOLERANCE)
    torch.testing.assert_close(step.loss, loss, **TOLERANCE)
    torch.testing.assert_close(method.keys.grad, keys.grad, **TOLERANCE)
    assert keys.grad.abs().sum() > 0


def test_an_epoch_trains_on_a_view_of_its_own(small_clip, few_digits):
    clip = small_clip()
    training = training_set(replace(few_digits, augment=True), clip, len(few_digits.train))
    method = build("tip-f", clip, few_digits, epochs=3, tip_passes=2)
    views = F.normalize(training.views(3) @ clip.model.visual.proj, dim=-1)
    batches = method.read_training_set(training)
    torch.testing.assert_close(
        method.keys.data,
        F.normalize((training.views(2) @ clip.model.visual.proj).mean(1), dim=-1),
        **TOLERANCE,
    )
    for epoch in range(3):
        features, _, index = next(batches.epoch(epoch))
        torch.testing.assert_close(features, views[index, epoch], **TOLERANCE)
    bounded = build("tip-f", clip, few_digits, epochs=3, tip_views=2, tip_passes=5)
    batches = bounded.read_training_set(training)
    features, _, index = next(batches.epoch(2))
    torch.testing.assert_close(features, views[index, 0], **TOLERANCE)


@pytest.mark.parametrize("name", ["tip", "tip-f"])
def test_the_search_is_a_double_loop(small_clip, few_digits, name, monkeypatch):
    """In every size of piece; the first of equally good pairs wins, beta moving slowest."""
    clip = small_clip()
    benchmark = replace(few_digits, name="dtd")  # whose grid ends at 13 and 13
    method = build(name, clip, benchmark)
    training = training_set(benchmark, clip, 4)
    method.read_training_set(training)
    generator = torch.Generator().manual_seed(0)
    moved = method.keys + 0.5 * torch.randn(method.keys.shape, generator=generator).double()
    method.keys.data.copy_(F.normalize(moved, dim=-1))
    f = F.normalize(training.validation()[0] @ clip.model.visual.proj, dim=-1)
    labels = torch.from_numpy(benchmark.val.labels)
    t = texts(clip, benchmark.base_names, [benchmark.template])
    best, best_right, rights = None, -1, set()
    one_hot = F.one_hot(torch.from_numpy(benchmark.train.labels), 5).double()
    for i in range(BETAS):
        beta = i * (13 - 0.1) / BETAS + 0.1
        for j in range(ALPHAS):
            alpha = j * (13 - 0.1) / ALPHAS + 0.1
            cache = torch.exp(-beta * (1 - f @ method.keys.detach().T)) @ one_hot
            scores = clip.logit_scale * f @ t.T + alpha * cache
            right = int((scores.argmax(1) == labels).sum())
            rights.add(right)
            if right > best_right:
                best, best_right = (beta, alpha), right
    assert len(rights) > 2
    for at_once in (1 << 24, 1 << 8, 1):
        monkeypatch.setattr("lamp_fast.methods.tip._AT_ONCE", at_once)
        method.choose(training)
        assert (method.beta.item(), method.alpha.item()) == best
    assert method.beta.dtype == method.alpha.dtype == torch.float64


def test_what_is_given_is_not_searched(small_clip, few_digits):
    clip = small_clip()
    training = training_set(few_digits, clip, 4)
    for own in ({"tip_alpha": 0.7}, {"tip_beta": 2.2}):
        method = build("tip", clip, few_digits, **own)
        assert method.config.uses_validation
        method.read_training_set(training)
        if "tip_alpha" in own:
            assert method.alpha == 0.7
            assert method.beta in grid(7, BETAS)
        else:
            assert method.beta == 2.2
            assert method.alpha in grid(3, ALPHAS)
    both = build("tip", clip, few_digits, tip_alpha=0.7, tip_beta=2.2)
    assert not both.config.uses_validation
    nothing = few_digits.val.select([])
    both.read_training_set(training_set(replace(few_digits, val=nothing), clip, 4))
    assert (both.alpha, both.beta) == (0.7, 2.2)


def test_first_values_are_published_for_data_sets_that_there_are(small_clip, few_digits):
    """Of CoOp's eleven: the long-tail field's own sets came after Tip-Adapter's table."""
    assert PUBLISHED.keys() <= CATALOG.keys()
    assert len(PUBLISHED) == 11
    clip = small_clip()
    benchmark = replace(few_digits, name="flowers102")
    method = build("tip-f", clip, benchmark)
    method.read_training_set(training_set(benchmark, clip, 4))
    assert (method.alpha, method.beta) == (10, 1)
    values = grid(50, ALPHAS)
    assert len(values) == ALPHAS
    assert math.isclose(values[-1], 0.1 + 19 * 49.9 / 20)


@pytest.mark.parametrize("data", ["imagenet", "imagenet_sketch"])
def test_imagenets_texts_are_means_over_seven_templates(small_clip, few_digits, data):
    clip, names, template = small_clip(), ("ox", "hen"), "a photo of a {}."
    method = build("tip", clip, few_digits)
    templates = method.templates(template, Origin(data))
    assert len(set(templates)) == 7
    assert template not in templates
    got = method.prepare(names, template, Origin(data)).texts
    torch.testing.assert_close(got, texts(clip, names, templates), **TOLERANCE)
    for origin in (Origin(), Origin("dtd")):
        got = method.prepare(names, template, origin).texts
        torch.testing.assert_close(got, texts(clip, names, [template]), **TOLERANCE)


def test_sums_by_class():
    rows = torch.arange(12, dtype=torch.float64).view(4, 3)
    labels = torch.tensor([2, 0, 2, 3])
    expected = F.one_hot(labels, 5).double().T @ rows
    assert torch.equal(sums_by_class(rows, labels, 5), expected)


@pytest.mark.parametrize(("name", "learned"), [("tip", 0), ("tip-f", 16 * 3 * 512)])
def test_numbers_kept_and_learned_on_vit_b_16(name, learned):
    """A key is 512 numbers a training picture, also where a method is built of shapes alone."""
    clip = parameters.shapes_of("ViT-B-16")
    classes = RunClasses(("ox", "hen", "fox"), (), (16, 16, 16))
    config = default_config({"method": name, "data": "caltech101"})
    method = build_method(clip, config, classes)
    assert method.keys.shape == (48, 512)
    assert method.labels.shape == (48,)
    assert method.trainable_parameters() == learned


def test_logit_adjustment_of_what_trains_nothing_is_refused():
    config = TrainConfig(method="tip")
    config = replace(config, optim=replace(config.optim, logit_adjustment=True))
    with pytest.raises(InputError, match="--logit-adjustment: Tip-Adapter trains nothing"):
        validate(config)
    other = replace(config, method="tip-f", own=METHODS["tip-f"].Settings())
    validate(other)


def test_the_last_epochs_keys_are_kept_with_the_pair_that_suits_them(tmp_path):
    """No picture of the test set chooses an epoch."""
    out = tmp_path / "run"
    words = ["--method", "tip-f", "--shots", "4", "--epochs", "2", "--batch", "8"]
    assert train.main(train.read_flags([*words, "--out", str(out), "--threads", "1"])) == 0
    state, facts = load_tensors(out / LEARNED)
    assert facts["epochs"] == 2
    assert state["beta"].item() in grid(PUBLISHED["imagenet"].most_beta, BETAS)
    assert state["alpha"].item() in grid(PUBLISHED["imagenet"].most_alpha, ALPHAS)
    counts = json.loads((out / "config.json").read_text())["data"]["counts"]
    assert state["keys"].shape[0] == state["labels"].shape[0] == sum(counts)
    assert state["labels"].bincount().tolist() == counts
