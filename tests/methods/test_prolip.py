"""ProLIP against its equations, a number at a time, in float64."""

from dataclasses import replace

import pytest
import torch
from training_sets import training_set

from lamp_fast.data.benchmark import Origin, build_benchmark
from lamp_fast.data.sources import load_source
from lamp_fast.data.templates import IMAGENET_7
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs import parameters
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import default_config
from lamp_fast.runs.optimisation import build_criterion, build_optimiser
from lamp_fast.runs.settings import OptimConfig

# The same float64 numbers added up in another order: some hundred operations on values of order 1
# to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
VIEWS = 3
MAPS = ("projection", "residual")
PLAIN = "a photo of a {}."


@pytest.fixture(scope="module")
def digits():
    """A long tail of 4 to 1 training pictures of digits, cropped as if that left them digits."""
    source = load_source("digits", None, None, None)
    drawn = build_benchmark(source, split="base-new", imb=4.0, cap=None, shots=4, seed=1)
    assert len(set(drawn.counts.tolist())) > 1
    return replace(drawn, augment=True)


def build(clip, **own):
    config = default_config({"method": "prolip", "data": "digits"})
    config = replace(config, own=replace(config.own, **{"prolip_views": VIEWS, **own}))
    return build_method(clip, config, RunClasses())


def ready(clip, digits, **own):
    method, training = build(clip, **own), training_set(digits, clip, 1 << 20)
    return method, method.read_training_set(training), training


def move(method):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(method.weight.shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        method.weight += 0.1 * noise


def normalised(row):
    return row / row.square().sum().sqrt()


def texts_of(clip, prompts):
    return [normalised(each) for each in clip.model.encode_text(clip.tokenizer(prompts)).detach()]


def image(clip, method, x):
    """A picture's feature, of what stands before the projection."""
    if method.config.prolip_map == "residual":
        x = x @ clip.model.visual.proj
    return normalised(x @ method.weight)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("given", [None, 0.25])
def test_equations(small_clip, digits, kind, given):
    clip = small_clip()
    method, batches, _ = ready(clip, digits, prolip_map=kind, prolip_lambda=given)
    start = clip.model.visual.proj.detach().clone()
    if kind == "residual":
        start = torch.eye(12, dtype=torch.float64)
    assert torch.equal(method.weight.data, start)
    move(method)
    features, labels, _ = next(batches.epoch(0))
    classes = method.prepare(digits.base_names, digits.template)
    optim = OptimConfig(logit_adjustment=True, tau=0.7)
    criterion = build_criterion(optim, digits.counts, torch.device("cpu"))
    step = method.step(features, labels, classes, criterion)
    step.loss.backward()
    got = method.weight.grad
    method.zero_grad()

    texts = texts_of(clip, [digits.template.format(each) for each in digits.base_names])
    prior = torch.tensor(digits.counts / digits.counts.sum()).log()
    total, logits = 0.0, []
    for x, label in zip(features, labels.tolist(), strict=True):
        feature = image(clip, method, x)
        row = torch.stack([clip.logit_scale * (feature * text).sum() for text in texts])
        logits.append(row)
        row = row + 0.7 * prior
        total = total - (row[label] - row.logsumexp(0)) / len(features)
    # The pictures a class that shots would be, were they alike.
    strength = 1 / (digits.counts.sum() / len(digits.counts)) if given is None else given
    distance = 0.0
    for row, held in zip(method.weight, start, strict=True):
        distance = distance + (row - held).square().sum()
    total = total + strength * distance
    total.backward()
    torch.testing.assert_close(step.logits, torch.stack(logits), **TOLERANCE)
    torch.testing.assert_close(step.loss, total, **TOLERANCE)
    torch.testing.assert_close(got, method.weight.grad, **TOLERANCE)
    assert got.abs().sum() > 0


@pytest.mark.parametrize("kind", MAPS)
def test_untrained_it_is_zero_shot_and_names_make_no_difference(small_clip, digits, kind):
    """Trained, new, of another data set: all are scored by the one map."""
    clip = small_clip()
    method, _, training = ready(clip, digits, prolip_map=kind)
    zero_shot = build_method(clip, default_config({"method": "zeroshot"}))
    features = training.features()
    for moved in (False, True):
        if moved:
            move(method)
        for names, origin in (
            (digits.base_names, digits.origin),
            ((*digits.new_names, "ox"), Origin("caltech101", target=True)),
        ):
            got = method.feature_logits(features, method.prepare(names, PLAIN, origin))
            expected = zero_shot.feature_logits(features, zero_shot.prepare(names, PLAIN))
            if moved:
                assert not torch.allclose(got, expected, atol=0.1)
                texts = texts_of(clip, [PLAIN.format(each) for each in names])
                images = torch.stack([image(clip, method, x) for x in features])
                expected = clip.logit_scale * images @ torch.stack(texts).T
            torch.testing.assert_close(got, expected, **TOLERANCE)


def test_a_step_is_one_view_of_every_picture_and_holds_no_other(small_clip, digits, monkeypatch):
    clip = small_clip()
    _, batches, training = ready(clip, digits)
    every = training.views(VIEWS)
    assert not torch.allclose(every[:, 0], every[:, 1])
    read, view = [], type(training).view

    def counted(self, number):
        read.append(number)
        return view(self, number)

    monkeypatch.setattr(type(training), "view", counted)
    assert len(batches) == 1
    assert read == []
    for epoch in range(VIEWS + 2):
        [(features, labels, index)] = batches.epoch(epoch)
        assert sorted(index.tolist()) == list(range(len(digits.train)))
        assert labels.tolist() == digits.train.labels[index.numpy()].tolist()
        torch.testing.assert_close(features, every[index, epoch % VIEWS], **TOLERANCE)
        assert read == [number % VIEWS for number in range(epoch + 1)]


def test_ranks_share_a_batch(small_clip, digits):
    _, batches, _ = ready(small_clip(), digits)
    [whole] = batches.epoch(1)
    half = len(digits.train) // 2
    parts = [
        batches.part(lambda size: slice(0, half)),
        batches.part(lambda size: slice(half, size)),
    ]
    for number, each in enumerate(whole):
        shared = torch.cat([next(part.epoch(1))[number] for part in parts])
        assert torch.equal(shared, each)


def test_where_crops_spoil_pictures_every_step_is_the_one_view_read_once(
    small_clip, digits, monkeypatch
):
    _, batches, training = ready(small_clip(), replace(digits, augment=False))
    expected, reads = training.features(), []
    features = type(training).features
    monkeypatch.setattr(type(training), "features", lambda self: reads.append(1) or features(self))
    for epoch in (0, 1, 7):
        [(rows, _, index)] = batches.epoch(epoch)
        torch.testing.assert_close(rows, expected[index], **TOLERANCE)
    assert len(reads) == 1


def test_published_settings_move_as_adam_would(small_clip, digits):
    """Two full-batch steps at their rates, with Adam written out."""
    config = default_config({"method": "prolip"})
    optim = config.optim
    assert (config.own.prolip_views, optim.epochs, optim.lr, optim.eps) == (300, 300, 1e-5, 1e-4)
    assert (optim.weight_decay, optim.warmup_epochs) == (0.0, 0)
    assert optim.batch > 1_000_000
    method, batches, _ = ready(small_clip(), digits)
    classes = method.prepare(digits.base_names, digits.template)
    criterion = build_criterion(optim, digits.counts, torch.device("cpu"))
    optimiser = build_optimiser(optim, [method.weight], torch.device("cpu"))
    weight = method.weight.data.clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for number in (1, 2):
        features, labels, _ = next(batches.epoch(number - 1))
        method.zero_grad()
        method.step(features, labels, classes, criterion).loss.backward()
        gradient = method.weight.grad.clone()
        optimiser.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        root = (second / (1 - 0.999**number)).sqrt()
        weight = weight - 1e-5 * first / (1 - 0.9**number) / (root + 1e-4)
        torch.testing.assert_close(method.weight.data, weight, **TOLERANCE)


@pytest.mark.parametrize("data", ["imagenet", "imagenet_a"])
def test_an_imagenet_text_is_the_mean_of_seven(small_clip, data):
    """Of normalised features, normalised again; one template for all else."""
    clip = small_clip()
    method = build(clip)
    assert len(set(IMAGENET_7)) == 7
    every = texts_of(clip, [each.format("ox") for each in IMAGENET_7])
    got = method.prepare(["ox"], PLAIN, Origin(data))
    torch.testing.assert_close(got[0], normalised(sum(every)), **TOLERANCE)
    own = method.prepare(["ox"], PLAIN, Origin())
    torch.testing.assert_close(own[0], texts_of(clip, ["a photo of a ox."])[0], **TOLERANCE)


@pytest.mark.parametrize(("kind", "count"), [("projection", 768 * 512), ("residual", 512 * 512)])
def test_parameters_on_vit_b_16(kind, count):
    assert build(parameters.shapes_of("ViT-B-16"), prolip_map=kind).trainable_parameters() == count
