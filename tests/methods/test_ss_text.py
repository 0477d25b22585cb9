"""SS-Text and SS-Text+ against their equations, a number at a time, in float64."""

from dataclasses import replace

import pytest
import torch
from training_sets import training_set

from lamp_fast.data.benchmark import Origin, build_benchmark
from lamp_fast.data.sources import load_source
from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.methods import METHODS
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import default_config

# The same float64 numbers added up in another order: some hundred operations on values of order 1
# to 1000 (the pictures' pull), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
BOTH = ("ss-text", "ss-text+")
PLAIN = "a photo of a {}."


@pytest.fixture(scope="module")
def digits():
    """A long tail of 4 to 1 training pictures, and behind it a class without any."""
    source = load_source("digits", None, None, None)
    drawn = build_benchmark(source, split="base-new", imb=4.0, cap=None, shots=4, seed=1)
    drawn = replace(drawn, base_names=(*drawn.base_names, "ox"))
    assert len(set(drawn.counts.tolist())) > 2
    assert drawn.counts[-1] == 0
    return drawn


def ready(name, clip, digits):
    method = build_method(
        clip,
        default_config({"method": name}),
        RunClasses(digits.base_names, digits.new_names),
    )
    training = training_set(digits, clip, 4)
    assert method.read_training_set(training) is None
    return method, training


def normalised(row):
    return row / row.square().sum().sqrt()


def texts_of(clip, prompts):
    return clip.model.encode_text(clip.tokenizer(prompts)).detach()


@pytest.mark.parametrize("name", BOTH)
def test_equations(small_clip, digits, name):
    clip = small_clip()
    method, training = ready(name, clip, digits)
    base, labels = digits.base_names, digits.train.labels.tolist()
    pictures = [normalised(row @ clip.model.visual.proj) for row in training.features()]
    texts = [
        normalised(row) for row in texts_of(clip, [digits.template.format(each) for each in base])
    ]
    weights = []
    for c, text in enumerate(texts):
        count, pull = labels.count(c), torch.zeros_like(text)
        for picture, label in zip(pictures, labels, strict=True):
            if label == c:
                pull = pull + clip.logit_scale * picture
        strength = max(1 / len(labels), 1e-3)
        if name == "ss-text+":
            strength = max(1 / count, 1e-3) if count else 1.0
        weights.append(text + pull / (len(labels) * strength))
    if name == "ss-text+":
        mean = sum(weights) / len(weights)
        weights = [each - normalised(2 * each - mean) for each in weights]
    else:
        # A class without pictures is its text.
        torch.testing.assert_close(method.weight[-1], texts[-1], **TOLERANCE)
    torch.testing.assert_close(method.weight, torch.stack(weights), **TOLERANCE)
    assert method.trainable_parameters() == len(base) * 12
    assert not list(method.parameters())

    new = digits.new_names
    features = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for names, origin in (
        (base, digits.origin),
        (new, digits.origin),
        ((new[0], base[1], "zebra", base[0]), Origin("caltech101", target=True)),
    ):
        expected = []
        for each in names:
            row = texts_of(clip, [PLAIN.format(each)])[0]
            row = normalised(weights[base.index(each)] if each in base else row)
            image = [normalised(x @ clip.model.visual.proj) for x in features]
            expected.append([clip.logit_scale * (one * row).sum() for one in image])
        got = method.feature_logits(features, method.prepare(names, PLAIN, origin))
        torch.testing.assert_close(got, torch.tensor(expected).T, **TOLERANCE)


def test_how_much_a_text_weighs(small_clip, digits):
    counts = torch.tensor([5000.0, 1000.0, 999.0, 7.0, 1.0, 0.0])
    plain, plus = (ready(name, small_clip(), digits)[0] for name in BOTH)
    assert plain.strength(counts[3:]).tolist() == pytest.approx([1 / 8] * 3)
    assert plain.strength(counts).tolist() == pytest.approx([1e-3] * 6)
    got = plus.strength(counts)
    assert got[:5].tolist() == pytest.approx([1e-3, 1e-3, 1 / 999, 1 / 7, 1.0])
    assert got[5].isfinite()


def test_a_text_that_weighs_everything_is_zero_shot(small_clip, digits, monkeypatch):
    clip = small_clip()
    kind = METHODS["ss-text"].load()
    monkeypatch.setattr(kind, "strength", lambda self, counts: torch.full_like(counts, 1e15))
    method, training = ready("ss-text", clip, digits)
    zero_shot = build_method(clip, default_config({"method": "zeroshot"}))
    features, base = training.features(), digits.base_names
    torch.testing.assert_close(
        method.feature_logits(features, method.prepare(base, digits.template)),
        zero_shot.feature_logits(features, zero_shot.prepare(base, digits.template)),
        **TOLERANCE,
    )


@pytest.mark.parametrize("name", BOTH)
def test_there_is_no_loss_to_adjust(name):
    config = default_config({"method": name})
    config = replace(config, optim=replace(config.optim, logit_adjustment=True))
    with pytest.raises(InputError, match="--logit-adjustment: SS-Text is a closed form"):
        validate(config)


@pytest.mark.parametrize("name", BOTH)
def test_a_clip_in_bfloat16_leaves_vectors_and_scores_in_float32(small_clip, digits, name):
    clip = small_clip().to(torch.bfloat16)
    method, training = ready(name, clip, digits)
    assert method.weight.dtype == torch.float32
    classes = method.prepare(digits.new_names, digits.template)
    logits = method.feature_logits(training.features(), classes)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
