"""LP++ against its public loop written out, with torch's optimiser and autograd, in float64."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_sets import training_set

from lamp_fast.data.benchmark import build_benchmark
from lamp_fast.data.sources import load_source
from lamp_fast.data.transforms import evaluation_transform
from lamp_fast.errors import InputError
from lamp_fast.methods.lp_plus_plus import LpPlusPlus, descend, start
from lamp_fast.methods.settings.lp_plus_plus import LpPlusPlusSettings
from lamp_fast.methods.surroundings import RunClasses

# Hundreds of steps over values of order 1 to 100 in float64, 1.1e-16 relative each; the descent
# contracts, so that errors add up and do not grow.
TOLERANCE = {"rtol": 1e-8, "atol": 1e-8}


@pytest.fixture(scope="module")
def digits():
    """Eight to one training pictures a class, and four a class to choose on."""
    source = load_source("digits", None, None, None)
    return build_benchmark(
        source, split="base-new", imb=8.0, cap=None, shots=8, seed=1, validation="all"
    )


def fitted(clip, benchmark, steps, seed=1):
    classes = RunClasses(benchmark.base_names, benchmark.new_names)
    method = LpPlusPlus(clip, LpPlusPlusSettings(lp_steps=steps), classes)
    training = training_set(benchmark, clip, 4, seed=seed)
    assert method.read_training_set(training) is None
    return method, training


def encoded(clip, pictures):
    """open_clip's own features of pictures in testing, normalised."""
    transform = evaluation_transform(clip.preprocessing)
    images = torch.stack([transform(pictures.load(row)) for row in range(len(pictures))])
    with torch.no_grad():
        return F.normalize(clip.model.encode_image(images.to(clip.dtype)), dim=-1)


def class_texts(clip, benchmark):
    prompts = [benchmark.template.format(name) for name in benchmark.base_names]
    with torch.no_grad():
        return F.normalize(clip.model.encode_text(clip.tokenizer(prompts)), dim=-1)


def literal(features, texts, labels, bias, steps, after):
    """The public loop; ``after`` sees the classifier and alpha behind every step."""
    count = len(texts)
    classifier = torch.nn.Linear(features.shape[1], count).double()
    of_class = [features[labels == label] for label in range(count)]
    means = [(each @ text).mean() for each, text in zip(of_class, texts, strict=True)]
    classifier.weight.data = torch.stack([each.sum(0) for each in of_class])
    classifier.bias.data = bias.clone()
    alpha = torch.full((count,), 250 * float(sum(means) / count), dtype=torch.float64)
    alpha.requires_grad_()
    n = len(features)
    rate = 4 * n / np.linalg.eigvalsh((features.T @ features).numpy()).max()
    alpha_rate = n / (4 * max((features @ text).square().sum() for text in texts))
    optimiser = torch.optim.SGD(classifier.parameters(), float(rate), momentum=0.9)
    for step in range(steps):
        loss = F.cross_entropy(classifier(features) + alpha * (features @ texts.T), labels)
        optimiser.zero_grad()  # of the classifier alone: alpha's gradient adds up
        loss.backward()
        optimiser.step()
        if (step + 1) % 10 == 0:
            alpha.data -= alpha_rate * alpha.grad
        with torch.no_grad():
            after(classifier, alpha)


@pytest.mark.parametrize("steps", [1, 34, 300])
def test_it_is_the_public_loop(small_clip, digits, steps, capsys):
    clip = small_clip()
    method, training = fitted(clip, digits, steps)
    texts, features = class_texts(clip, digits), encoded(clip, digits.train)
    labels = torch.from_numpy(digits.train.labels)
    val, val_labels = encoded(clip, digits.val), torch.from_numpy(digits.val.labels)
    bias = start(features, features @ texts.T, labels, training.seed).bias
    accuracies, states = [], []

    def after(classifier, alpha):
        logits = classifier(val) + alpha * (val @ texts.T)
        accuracies.append(int((logits.argmax(1) == val_labels).sum()))
        states.append([each.detach().clone() for each in (*classifier.parameters(), alpha)])

    literal(features, texts, labels, bias, steps, after)
    best = max(step for step, each in enumerate(accuracies) if each == max(accuracies))
    assert int(method.best_step) == best + 1
    for got, expected in zip(method.head, states[best], strict=True):
        torch.testing.assert_close(got, expected, **TOLERANCE)
    said = f"lp++    step {best + 1} of {steps}, by accuracy {5 * max(accuracies):.2f}% on 20"
    assert capsys.readouterr().out.startswith(said)

    test = encoded(clip, digits.test_base)
    weight, bias, alpha = states[best]
    expected = test @ weight.T + bias + alpha * (test @ texts.T)
    seen = training.reader.read(digits.test_base, training.centre)
    classes = method.prepare(digits.base_names, digits.template)
    torch.testing.assert_close(method.feature_logits(seen, classes), expected, **TOLERANCE)
    some = method.prepare(digits.base_names[3:0:-2], digits.template)
    torch.testing.assert_close(method.feature_logits(seen, some), expected[:, [3, 1]], **TOLERANCE)


def test_every_step_is_the_public_one():
    """All of them, where no choice hides any; two classes, one of them of a single picture."""
    generator = torch.Generator().manual_seed(0)
    features, texts = (
        F.normalize(torch.randn(rows, 6, generator=generator, dtype=torch.float64), dim=-1)
        for rows in (7, 2)
    )
    labels = torch.tensor([0, 0, 1, 0, 0, 0, 0])
    head = start(features, features @ texts.T, labels, 5)
    states = []

    def after(classifier, alpha):
        states.append([each.detach().clone() for each in (*classifier.parameters(), alpha)])

    literal(features, texts, labels, head.bias, 45, after)
    steps = descend(head, features, features @ texts.T, labels, 45)
    for now, expected in zip(steps, states, strict=True):
        for got, value in zip(now, expected, strict=True):
            torch.testing.assert_close(got, value, **TOLERANCE)


def test_the_first_bias_is_drawn_from_the_seed():
    """Uniform within 1 / sqrt(Ds), as torch's own linear layer."""
    features = F.normalize(torch.randn(4000, 16, dtype=torch.float64), dim=-1)
    cosines, labels = features @ torch.randn(16, 2000).double(), torch.arange(4000) % 2000
    first, again, other = (start(features, cosines, labels, seed).bias for seed in (1, 1, 2))
    assert torch.equal(first, again)
    bound = 1 / math.sqrt(16)
    for drawn in (first, other):
        assert drawn.abs().max() <= bound
        # Of 2,000 uniform draws the mean has a standard deviation of 0.013 bounds.
        assert abs(drawn.mean()) < 5 * 0.013 * bound
        assert drawn.max() > 0.9 * bound > -0.9 * bound > drawn.min()
    # Two independent vectors of 2,000 correlate by 0.022 at random.
    assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 5 * 0.022


def test_random_crops_are_learned_from_where_they_spoil_nothing(small_clip, digits):
    clip, cropped = small_clip(), replace(digits, augment=True)
    method, training = fitted(clip, cropped, steps=1)
    view = training.views(1)[:, 0]
    assert not torch.equal(view, training.features())
    features = F.normalize(clip.vision.project(view), dim=-1)
    texts, labels = class_texts(clip, digits), torch.from_numpy(digits.train.labels)
    head = start(features, features @ texts.T, labels, training.seed)
    expected = next(descend(head, features, features @ texts.T, labels, 1))
    torch.testing.assert_close(method.weight, expected.weight, **TOLERANCE)


def test_what_it_cannot_do_is_refused(small_clip, digits):
    clip = small_clip()
    empty = replace(digits, val=digits.val.select([]))
    with pytest.raises(InputError, match="--data digits: has no validation picture"):
        fitted(clip, empty, steps=1)
    method, _ = fitted(clip, digits, steps=1)
    with pytest.raises(InputError, match=re.escape(f"{digits.new_names[0]!r} was not trained")):
        method.prepare([digits.base_names[0], digits.new_names[0]], "{}")


def test_a_clip_in_bfloat16_leaves_it_in_float32(small_clip, digits):
    clip = small_clip().to(torch.bfloat16)
    method, _ = fitted(clip, digits, steps=12)
    assert {each.dtype for each in method.head} == {torch.float32}
    classes = method.prepare(digits.base_names, digits.template)
    logits = method.feature_logits(torch.randn(3, 32).bfloat16(), classes)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert method.trainable_parameters() == 5 * (12 + 1 + 1)
