"""ZS-LP and CLAP against their equations, a number at a time, in float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from training_sets import training_set

from lamp_fast.data.benchmark import Origin, build_benchmark
from lamp_fast.data.sources import load_source
from lamp_fast.methods.clap import EIGHT_TEMPLATES
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs import parameters
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import default_config
from lamp_fast.runs.optimisation import build_criterion
from lamp_fast.runs.settings import OptimConfig

# The same float64 numbers added up in another order: some hundred operations on values of order 1
# to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
VIEWS = 3
METHODS = ("zs-lp", "clap")
PLAIN = "a photo of a {}."


@pytest.fixture(scope="module")
def digits():
    """A long tail of 4 to 1 training pictures of digits, cropped as if that left them digits."""
    source = load_source("digits", None, None, None)
    drawn = build_benchmark(source, split="base-new", imb=4.0, cap=None, shots=4, seed=1)
    assert sorted(drawn.counts)[0] < sorted(drawn.counts)[-1]
    return replace(drawn, augment=True)


def build(name, clip, base=(), new=()):
    config = default_config({"method": name, "data": "digits"})
    config = replace(config, own=replace(config.own, feature_views=VIEWS))
    return build_method(clip, config, RunClasses(tuple(base), tuple(new)))


def ready(name, clip, digits, batch=5):
    """A method that has looked at the training set, what it trains on, and the set."""
    method = build(name, clip, digits.base_names, digits.new_names)
    training = training_set(digits, clip, batch)
    return method, method.read_training_set(training), training


def texts_of(clip, prompts):
    return clip.model.encode_text(clip.tokenizer(prompts)).detach()


def cosine(one, other):
    return (one * other).sum() / (one.square().sum().sqrt() * other.square().sum().sqrt())


def move(method):
    """Weights as after some steps."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(method.weight.shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        method.weight += 0.1 * noise


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("adjusted", [False, True])
def test_equations(small_clip, digits, name, adjusted):
    clip = small_clip()
    method, batches, training = ready(name, clip, digits)
    texts = texts_of(clip, [digits.template.format(each) for each in digits.base_names])
    torch.testing.assert_close(method.weight.data, texts, **TOLERANCE)
    lengths = texts.norm(dim=1)
    assert (lengths - 1).abs().min() > 0.05  # a normalised start would be another one

    # lambda_c, over every crop of the class's own pictures.
    every = training.views(VIEWS) @ clip.model.visual.proj
    assert every.shape[:2] == (len(digits.train), VIEWS)
    assert not torch.allclose(every[:, 0], every[:, 1])
    labels = digits.train.labels.tolist()
    strength = []
    for c in range(len(texts)):
        found = []
        for i, label in enumerate(labels):
            if label == c:
                for view in every[i]:
                    scores = torch.stack([clip.logit_scale * cosine(view, t) for t in texts])
                    found.append(scores.exp()[c] / scores.exp().sum())
        strength.append(sum(found) / len(found))
    if name == "clap":
        torch.testing.assert_close(method.strength, torch.stack(strength), **TOLERANCE)

    move(method)
    features, batch_labels, index = next(batches.epoch(0))
    classes = method.prepare(digits.base_names, digits.template)
    optim = OptimConfig(logit_adjustment=adjusted, tau=0.7)
    criterion = build_criterion(optim, digits.counts, torch.device("cpu"))
    step = method.step(features, batch_labels, classes, criterion)
    step.loss.backward()
    got = method.weight.grad
    method.zero_grad()

    total, prior = 0.0, torch.tensor(digits.counts / digits.counts.sum()).log()
    logits = []
    for feature, label in zip(features, batch_labels.tolist(), strict=True):
        row = torch.stack([clip.logit_scale * cosine(feature, w) for w in method.weight])
        logits.append(row)
        scores = row + (0.7 * prior if adjusted else 0)
        total = total - (scores[label] - scores.logsumexp(0)) / len(features)
    if name == "clap":
        pulls = [
            each * (w - t).square().sum()
            for each, w, t in zip(strength, method.weight, texts, strict=True)
        ]
        total = total + sum(pulls) / len(pulls)
    total.backward()
    torch.testing.assert_close(step.logits, torch.stack(logits), **TOLERANCE)
    torch.testing.assert_close(step.loss, total, **TOLERANCE)
    torch.testing.assert_close(got, method.weight.grad, **TOLERANCE)

    # A row is a crop of the picture that its index names.
    crops = F.normalize(every, dim=-1)
    assert batch_labels.tolist() == [labels[i] for i in index.tolist()]
    for feature, i in zip(features, index.tolist(), strict=True):
        assert any(torch.allclose(feature, each, atol=1e-12) for each in crops[i])


def test_an_epoch_is_as_many_rows_as_pictures_of_all_their_crops(small_clip, digits):
    _, batches, _ = ready("zs-lp", small_clip(), digits, batch=1)
    rows = [(int(index), features) for features, _, index in batches.epoch(0)]
    assert len(rows) == len(digits.train)
    # Of one crop of each picture every picture would come once.
    assert len({index for index, _ in rows}) < len(rows)
    again = [int(index) for _, _, index in batches.epoch(1)]
    assert again != [index for index, _ in rows]


@pytest.mark.parametrize("name", METHODS)
def test_published_settings(name):
    """An epoch at the warm-up rate, then the cosine's; momentum 0.9 is sgd's own."""
    config = default_config({"method": name})
    assert config.optim == OptimConfig(
        optimiser="sgd", lr=0.1, weight_decay=0.0, epochs=300, batch=256, warmup_epochs=1
    )
    assert config.optim.warmup_lr == 1e-5
    assert config.own.feature_views == 20


@pytest.mark.parametrize("name", METHODS)
def test_names(small_clip, digits, name):
    """Trained ones have their vector in any list and on any data set, others their text."""
    clip = small_clip()
    method, _, _ = ready(name, clip, digits)
    move(method)
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(4, 32, dtype=torch.float64, generator=generator)
    images = features @ clip.model.visual.proj
    base, new = digits.base_names, digits.new_names
    for names, origin in (
        (base, digits.origin),
        (new, digits.origin),
        ((new[1], base[3], "ox", base[0]), Origin()),
        ((base[2], "ox"), Origin("caltech101", target=True)),
    ):
        expected = []
        for each in names:
            row = texts_of(clip, [PLAIN.format(each)])[0]
            if each in base:
                row = method.weight.data[base.index(each)]
            expected.append([clip.logit_scale * cosine(image, row) for image in images])
        got = method.feature_logits(features, method.prepare(names, PLAIN, origin))
        torch.testing.assert_close(got, torch.tensor(expected).T, **TOLERANCE)


def test_classes_of_one_name(small_clip):
    """By their place; the new half as a whole is new, whatever its names."""
    clip = small_clip()
    base, new = ("missile", "ox", "missile"), ("hen", "missile")
    method = build("clap", clip, base, new)
    torch.nn.init.normal_(method.weight)
    features = torch.randn(4, 32, dtype=torch.float64)
    trained = method.feature_logits(features, method.prepare(base, PLAIN))
    assert not torch.allclose(trained[:, 0], trained[:, 2])
    got = method.feature_logits(features, method.prepare(("missile", "hen", "missile"), PLAIN))
    torch.testing.assert_close(got[:, [0, 2]], trained[:, [0, 2]], **TOLERANCE)
    untrained = build("clap", clip)
    torch.testing.assert_close(
        method.feature_logits(features, method.prepare(new, PLAIN)),
        untrained.feature_logits(features, untrained.prepare(new, PLAIN)),
        **TOLERANCE,
    )


@pytest.mark.parametrize("data", ["imagenet", "imagenet_sketch"])
def test_an_imagenet_text_is_the_mean_of_eight(small_clip, data):
    """Of features as they are, not normalised; one template for all else."""
    clip = small_clip()
    method = build("zs-lp", clip)
    assert len(set(EIGHT_TEMPLATES)) == 8
    every = [texts_of(clip, [each.format("ox")])[0] for each in EIGHT_TEMPLATES]
    got = method.prepare(["ox"], PLAIN, Origin(data)).texts
    torch.testing.assert_close(got[0], sum(every) / 8, **TOLERANCE)
    own = method.prepare(["ox"], "art of the {}.", Origin()).texts
    torch.testing.assert_close(own[0], texts_of(clip, ["art of the ox."])[0], **TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
def test_where_crops_spoil_pictures_there_is_one_view(small_clip, digits, name):
    clip = small_clip()
    _, batches, training = ready(name, clip, replace(digits, augment=False))
    assert batches.features.shape[:2] == (len(digits.train), 1)
    rows = F.normalize(training.features() @ clip.model.visual.proj, dim=-1)
    torch.testing.assert_close(batches.features[:, 0], rows, **TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
def test_parameters_on_vit_b_16(name):
    """Of shapes alone: a text's width for each trained class."""
    shapes = parameters.shapes_of("ViT-B-16")
    method = build(name, shapes, [f"class {number}" for number in range(50)])
    assert method.trainable_parameters() == 50 * 512
    assert all(math.prod(each.shape) for each in method.state_dict().values())
