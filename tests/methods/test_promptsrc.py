"""PromptSRC against its equations, over open_clip's own blocks, in float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lamp_fast import train
from lamp_fast.clip.settings import Trimming
from lamp_fast.data.benchmark import Origin
from lamp_fast.data.templates import PROMPTSRC_60
from lamp_fast.errors import InputError
from lamp_fast.methods.promptsrc import gaussian_shares
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs import figures, parameters
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig, apply_preset, choosing_flags, default_config
from lamp_fast.runs.folder import LEARNED
from lamp_fast.runs.losses import logit_adjustment, mean_over_rows
from lamp_fast.runs.trainer import Trainer
from lamp_fast.tensors import load_tensors

# The same float64 numbers added up in another order: some hundred operations on values of order 1
# to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
NAMES = ("zero", "a very long name of some kind of bird", "cat", "cathedral")
COUNT = 3
SMALL = {"n_ctx": COUNT, "depth": 3}
TRIMMINGS = {
    "default": Trimming(),
    "as published": Trimming(as_published=True),
    "one switch each off": Trimming(share_tokens=False, last_row=False, prepare_text=False),
    "small sheets": Trimming(most_rows=12, block=3),
}


def build(clip, trimming=None, epochs=4, **own):
    config = default_config({"method": "promptsrc", "data": "digits"})
    config = replace(
        config,
        own=replace(config.own, **SMALL | own),
        optim=replace(config.optim, epochs=epochs),
        trim=trimming or Trimming(),
    )
    torch.manual_seed(3)
    return build_method(clip, config, RunClasses(NAMES))


def pictures(count=3):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator)


def read_text(model, x, ids):
    eot = x[torch.arange(len(ids)), ids.argmax(-1)]
    return model.ln_final(eot) @ model.text_projection


def text_tower(model, x, words=()):
    mask = torch.full((77, 77), float("-inf"), dtype=x.dtype).triu(1)
    for number, block in enumerate(model.transformer.resblocks):
        if 0 < number < len(words):
            new = words[number].expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], new, x[:, 1 + COUNT :]], dim=1)
        x = block(x, attn_mask=mask)
    return x


def prompted_text(method, names):
    model = method.clip.model
    ids = method.clip.tokenizer([f"a photo of a {name}." for name in names])
    x = model.token_embedding(ids)
    first = method.words[0].expand(len(ids), -1, -1)
    x = torch.cat([x[:, :1], first, x[:, 1 + COUNT :]], dim=1) + model.positional_embedding
    return F.normalize(read_text(model, text_tower(model, x, list(method.words)), ids), dim=-1)


def plain_text(clip, names):
    """A class after the other, a template after the other."""
    rows = []
    for name in names:
        ids = clip.tokenizer([template.replace("{}", name) for template in PROMPTSRC_60])
        x = clip.model.token_embedding(ids) + clip.model.positional_embedding
        rows.append(read_text(clip.model, text_tower(clip.model, x), ids).mean(0))
    return F.normalize(torch.stack(rows), dim=-1)


def image_tower(clip, images, prompts=()):
    visual = clip.model.visual
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    cls = visual.class_embedding.expand(len(images), 1, -1)
    x = torch.cat([cls, patches], dim=1) + visual.positional_embedding
    length = x.shape[1]
    if prompts:
        x = torch.cat([x, prompts[0].expand(len(x), -1, -1)], dim=1)
    x = visual.ln_pre(x)
    for number, block in enumerate(visual.transformer.resblocks):
        if 0 < number < len(prompts):
            x = torch.cat([x[:, :length], prompts[number].expand(len(x), -1, -1)], dim=1)
        x = block(x)
    return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)


def literal(method, images, labels, names, criterion=F.cross_entropy):
    scale = method.clip.logit_scale
    w, w0 = prompted_text(method, names), plain_text(method.clip, names)
    f, f0 = image_tower(method.clip, images, list(method.rows)), image_tower(method.clip, images)
    logits, plain = scale * f @ w.T, scale * f0 @ w0.T
    p0 = plain.softmax(-1)
    divergence = (p0 * (p0.log() - logits.softmax(-1).log())).sum() / logits.numel()
    distances = 25 * (w - w0).abs().mean() + 10 * (f - f0).abs().mean()
    return logits, criterion(logits, labels) + distances + divergence


def assert_equations_hold(method, criterion=F.cross_entropy):
    images, labels = pictures(), torch.tensor([0, len(NAMES) - 1, 1])
    classes = method.prepare(NAMES, "{} texture.")
    step = method.step(images, labels, classes, criterion)
    step.loss.backward()
    got = {name: each.grad for name, each in method.named_parameters()}
    method.zero_grad(set_to_none=True)
    logits, loss = literal(method, images, labels, NAMES, criterion)
    loss.backward()
    torch.testing.assert_close(step.logits, logits, **TOLERANCE)
    torch.testing.assert_close(step.loss, loss, **TOLERANCE)
    torch.testing.assert_close(sum(step.terms.values()), loss, **TOLERANCE)
    torch.testing.assert_close(method.logits(images, classes), logits, **TOLERANCE)
    for name, each in method.named_parameters():
        assert each.grad.abs().sum() > 0, name
        torch.testing.assert_close(
            got[name], each.grad, **TOLERANCE, msg=lambda text, p=name: f"{p}: {text}"
        )


@pytest.mark.parametrize("trimming", TRIMMINGS.values(), ids=TRIMMINGS)
def test_equations(small_clip, trimming):
    """Logits, loss and every gradient, for every kind of trimming."""
    assert_equations_hold(build(small_clip(), trimming))


@pytest.mark.parametrize("depth", [1, 4])
def test_other_depths(small_clip, depth):
    assert_equations_hold(build(small_clip(), depth=depth))


@pytest.mark.parametrize("depths", [(3, 4), (4, 3)])
def test_towers_of_unequal_depth(small_clip, depths):
    assert_equations_hold(build(small_clip(*depths)))


def test_another_loss_reaches_the_cross_entropy_alone(small_clip):
    counts = torch.tensor([9.0, 5.0, 2.0, 1.0], dtype=torch.float64)
    criterion = mean_over_rows(logit_adjustment(counts, 1.0))
    assert_equations_hold(build(small_clip()), criterion)


def test_sixty_templates_each_with_one_name():
    assert len(set(PROMPTSRC_60)) == len(PROMPTSRC_60) == 60
    assert all(each.count("{}") == 1 for each in PROMPTSRC_60)


def test_what_is_tokenised_and_when(small_clip):
    """Names of another data set need none of the sixty; nor has anything of them been computed
    before training asks."""
    clip, seen = small_clip(), []
    tokenizer = clip.tokenizer
    method = build(clip)

    def recording(texts, *arguments, **options):
        seen.extend(texts)
        return tokenizer(texts, *arguments, **options)

    clip.tokenizer = recording
    classes = method.prepare(["ox"], "{} texture.")
    assert seen == ["a photo of a ox."]
    method.logits(pictures(), classes)
    method.step(pictures(1), torch.tensor([0]), classes, F.cross_entropy)
    once = len(seen)
    assert {each.replace("{}", "ox") for each in method.templates("{} texture.")} == set(seen)
    method.step(pictures(1), torch.tensor([0]), classes, F.cross_entropy)
    assert len(seen) == once
    assert method.templates("{} texture.", Origin("dtd", target=True)) == ("a photo of a {}.",)
    long = " ".join(["ox"] * 100)
    with pytest.raises(InputError, match="tokens"):
        method.prepare([long], "{} texture.")


def test_new_classes_and_other_data_sets(small_clip):
    """The learned words take any name, wherever it is of."""
    method, images = build(small_clip()), pictures()
    names = ("zebra", NAMES[2])
    expected, _ = literal(method, images, torch.tensor([0, 1, 1]), names)
    for origin in (Origin(), Origin("imagenetv2", target=True)):
        got = method.logits(images, method.prepare(names, "{} texture.", origin))
        torch.testing.assert_close(got, expected, **TOLERANCE)
    assert not method.reads_features


def test_pieces_of_a_batch_give_the_whole_batchs_gradient(small_clip):
    method = build(small_clip())
    images, labels = pictures(5), torch.tensor([0, 1, 2, 3, 0])
    classes = method.prepare(NAMES, "{}")
    results = []
    for pieces in (1, 3):
        method.zero_grad(set_to_none=True)
        method.accumulate(images, labels, classes, F.cross_entropy, pieces, lambda loss: loss)
        results.append([each.grad for each in method.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def density(x, mean, std):
    return math.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


@pytest.mark.parametrize(("epochs", "mean", "std"), [(20, 15, 1), (20, 6, 10), (50, 45, 5)])
def test_shares_of_the_epochs(epochs, mean, std):
    """A normal density at 1..E over its sum."""
    weights = [density(epoch, mean, std) for epoch in range(1, epochs + 1)]
    expected = [each / sum(weights) for each in weights]
    assert gaussian_shares(epochs, mean, std) == pytest.approx(expected, rel=1e-12)


def test_shares_far_from_their_mean():
    """There every density is 0, and the nearest epoch has it all."""
    assert density(3, 1000, 1) == 0
    assert gaussian_shares(3, 1000.0, 1.0) == [0.0, 0.0, 1.0]
    assert gaussian_shares(1, -5.0, 0.1) == [1.0]


def test_the_average_over_epochs(small_clip):
    """Also where another process goes on after any epoch; weights move freely until the end."""
    mean, std, epochs = 2.0, 1.5, 4
    own = {"gpa_mean": mean, "gpa_std": std}
    weights = [density(epoch, mean, std) for epoch in range(1, epochs + 1)]
    for stop in (None, 1, 3, 4):
        generator = torch.Generator().manual_seed(0)
        method, behind = build(small_clip(), epochs=epochs, **own), []
        for epoch in range(1, epochs + 1):
            method.start_epoch()
            with torch.no_grad():
                for each in method.parameters():
                    each += torch.randn(each.shape, dtype=each.dtype, generator=generator)
            behind.append({name: each.clone() for name, each in method.named_parameters()})
            if epoch == stop:
                state = {name: each.clone() for name, each in method.state_dict().items()}
                method = build(small_clip(), epochs=epochs, **own)
                method.load_state_dict(state)
        classes = method.prepare(NAMES, "{}")
        before = method.logits(pictures(), classes)
        method.settle(None)
        for name, each in method.named_parameters():
            parts = (weight * old[name] for weight, old in zip(weights, behind, strict=True))
            torch.testing.assert_close(each, sum(parts) / sum(weights), **TOLERANCE)
        # The kept text is that of the average.
        after, _ = literal(method, pictures(), torch.tensor([0, 1, 2]), NAMES)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(method.logits(pictures(), classes), after, **TOLERANCE)


def test_a_run_ends_with_the_average(tmp_path, monkeypatch):
    """What is saved and scored, of a run over the carried CLIP."""
    flags = ["--method", "promptsrc", "--data", "digits", "--shots", "1", "--epochs", "3"]
    flags += ["--gpa-mean", "2", "--gpa-std", "1", "--out", str(tmp_path / "run"), "--threads", "1"]
    for name in ("plot_curves", "plot_per_class"):
        monkeypatch.setattr(figures, name, lambda *_: None)
    behind, epoch = [], Trainer._epoch

    def recorded(trainer, number):
        line = epoch(trainer, number)
        behind.append({n: each.detach().clone() for n, each in trainer.method.named_parameters()})
        return line

    monkeypatch.setattr(Trainer, "_epoch", recorded)
    assert train.main(train.read_flags(flags)) == 0
    saved, _ = load_tensors(tmp_path / "run" / LEARNED)
    weights = [density(epoch, 2, 1) for epoch in (1, 2, 3)]
    for name, last in behind[-1].items():
        parts = (weight * old[name] for weight, old in zip(weights, behind, strict=True))
        # Float32: three products and two sums, each rounded to 6e-8 of numbers of order 0.1.
        torch.testing.assert_close(saved[name], sum(parts) / sum(weights), rtol=1e-6, atol=1e-7)
        assert not torch.equal(saved[name], last)


def test_a_clip_in_bfloat16_leaves_parameters_and_gradients_in_float32(small_clip):
    method = build(small_clip().to(torch.bfloat16))
    classes = method.prepare(NAMES, "{}")
    labels = torch.tensor([0, 1, 2])
    step = method.step(pictures().bfloat16(), labels, classes, F.cross_entropy)
    step.loss.backward()
    assert step.loss.dtype == step.logits.dtype == torch.float32
    for parameter, each in method.named_parameters():
        assert each.dtype == torch.float32, parameter
        assert torch.isfinite(each.grad).all(), parameter


def test_trainable_parameters_on_vit_b_16():
    """As worked out in the public code, exactly, of shapes alone."""
    config = apply_preset(TrainConfig(), "promptsrc")
    config = replace(config, clip=replace(config.clip, clip="ViT-B-16"))
    first, *_ = parameters.parameter_lines(config)
    assert first == "trainable parameters: 46080"


@pytest.mark.parametrize(
    ("flags", "epochs", "own"),
    [
        ("--method promptsrc --data imagenet", 20, (9, 15, 1)),
        ("--method promptsrc --data dtd", 20, (9, 15, 1)),
        ("--method promptsrc --split all", 50, (9, 30, 30)),
        ("--method promptsrc --split all --data dtd --shots 4", 50, (9, 45, 5)),
        ("--method promptsrc --split all --data imagenet", 20, (3, 6, 10)),
        ("--method promptsrc --split all --data imagenet --shots 4", 50, (9, 30, 30)),
    ],
)
def test_published_settings(flags, epochs, own):
    config = default_config(choosing_flags(flags.split()))
    chosen = config.optim
    assert (chosen.optimiser, chosen.lr, chosen.batch) == ("sgd", 2.5e-3, 4)
    assert (chosen.epochs, chosen.warmup_epochs) == (epochs, 1)
    assert (config.own.depth, config.own.gpa_mean, config.own.gpa_std) == own
    assert (config.own.n_ctx, config.own.text_weight, config.own.image_weight) == (4, 25, 10)
