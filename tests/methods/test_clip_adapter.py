"""CLIP-Adapter against its equations written out literally, in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from training_sets import training_set

from lamp_fast.data.benchmark import Origin, build_benchmark
from lamp_fast.data.sources import load_source
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs import parameters
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig, default_config

# The same float64 numbers added up in another order: some hundred operations on values of order 1
# to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def few_digits():
    source = load_source("digits", None, None, None)
    return build_benchmark(source, split="base-new", imb=4.0, cap=None, shots=4, seed=1)


def build(clip, benchmark, **own):
    torch.manual_seed(3)
    config = default_config({"method": "clip-adapter", "data": "digits"})
    config = replace(config, own=replace(config.own, **own))
    return build_method(clip, config, RunClasses(benchmark.base_names, benchmark.new_names))


def literal(clip, narrow, widen, ratio, features, names, template):
    t = clip.model.encode_text(clip.tokenizer([template.format(name) for name in names])).detach()
    rows = []
    for f in features:
        adapted = ratio * torch.relu(widen @ torch.relu(narrow @ f)) + (1 - ratio) * f
        cosines = [adapted @ each / adapted.norm() / each.norm() for each in t]
        rows.append(clip.logit_scale * torch.stack(cosines))
    return torch.stack(rows)


@pytest.mark.parametrize("ratio", [0.2, 0.7])
def test_equations(small_clip, few_digits, ratio):
    """Logits, loss and both gradients; new names, and those of another data set, too."""
    clip = small_clip()
    method = build(clip, few_digits, adapter_ratio=ratio)
    features, labels, _ = next(method.read_training_set(training_set(few_digits, clip, 6)).epoch(0))
    assert (features.norm(dim=-1) - 1).abs().min() > 0.1  # not normalised
    classes = method.prepare(few_digits.base_names, few_digits.template)
    step = method.step(features, labels, classes, F.cross_entropy)
    step.loss.backward()
    weights = [
        each.weight.detach().clone().requires_grad_() for each in (method.narrow, method.widen)
    ]
    logits = literal(clip, *weights, ratio, features, few_digits.base_names, few_digits.template)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    torch.testing.assert_close(step.logits, logits, **TOLERANCE)
    torch.testing.assert_close(step.loss, loss, **TOLERANCE)
    for layer, weight in zip((method.narrow, method.widen), weights, strict=True):
        assert weight.grad.abs().sum() > 0
        torch.testing.assert_close(layer.weight.grad, weight.grad, **TOLERANCE)

    images = torch.randn(
        3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    f = clip.model.encode_image(images).detach()
    for names, origin in (
        (few_digits.new_names, few_digits.origin),
        (("ox", few_digits.base_names[1]), Origin("dtd", target=True)),
    ):
        got = method.logits(images, method.prepare(names, few_digits.template, origin))
        expected = literal(clip, *weights, ratio, f, names, few_digits.template)
        torch.testing.assert_close(got, expected.detach(), **TOLERANCE)


def test_no_share_of_the_adapter_is_zero_shot_clip(small_clip, few_digits):
    clip = small_clip()
    method = build(clip, few_digits, adapter_ratio=0.0)
    plain = build_method(clip, TrainConfig(method="zeroshot"))
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    names, template = few_digits.new_names, few_digits.template
    torch.testing.assert_close(
        method.logits(images, method.prepare(names, template)),
        plain.logits(images, plain.prepare(names, template)),
        **TOLERANCE,
    )


def test_epochs_show_the_views_in_turn(small_clip, few_digits):
    clip = small_clip()
    training = training_set(replace(few_digits, augment=True), clip, len(few_digits.train))
    batches = build(clip, few_digits, adapter_views=2).read_training_set(training)
    views = training.views(2) @ clip.model.visual.proj
    assert not torch.equal(views[:, 0], views[:, 1])
    for epoch, view in enumerate((0, 1, 0)):
        features, _, index = next(batches.epoch(epoch))
        torch.testing.assert_close(features, views[index, view], **TOLERANCE)


def test_trainable_parameters_on_vit_b_16():
    method = build_method(parameters.shapes_of("ViT-B-16"), TrainConfig(method="clip-adapter"))
    assert method.trainable_parameters() == 2 * 512 * 128
