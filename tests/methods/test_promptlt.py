"""PromptLT: its equations in training and in prediction, and what its settings make."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lamp_fast.clip.settings import Trimming
from lamp_fast.errors import InputError
from lamp_fast.methods.fixed import without_parameters
from lamp_fast.methods.settings.promptlt import PromptLtSettings
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs import parameters
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig, apply_preset, default_config

# The same float64 numbers added up in another order: some hundred operations on values of order 1
# to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
NAMES = ("zero", "a very long name of some kind of bird", "cat", "cathedral")
TEMPLATE = "a photo of a {}, a type of pet."
TRIMMINGS = {
    "default": Trimming(),
    "as published": Trimming(as_published=True),
    "one switch each off": Trimming(share_tokens=False, last_row=False, prepare_text=False),
    "small sheets": Trimming(most_rows=12),
}


def build(clip, trimming=None, *, layers=(2, 3, 4), **own):
    config = apply_preset(TrainConfig(), "promptlt")
    own = {"d": 5, "layers": layers, **own}
    config = replace(config, own=replace(config.own, **own), trim=trimming or Trimming())
    torch.manual_seed(3)
    method = build_method(clip, config, RunClasses(NAMES, ("ox",)))
    with torch.no_grad():
        for each in method.parameters():  # so that pictures and layers choose differently
            each.add_(0.4 * torch.randn_like(each))
    return method


def pictures(count=5):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator)


def literal_phi(phi, prompts):
    first, _, last = phi
    hidden = torch.relu(prompts @ first.weight.T + first.bias)
    return hidden @ last.weight.T + last.bias


def literal_tower(method, blocks, x, side, training, chosen, causal):
    """[first, prompts, others] through every layer that has some, one sequence after the other."""
    for number, block in enumerate(blocks, 1):
        inserted = []
        if str(number) in method.prompts:
            own = method.prompts[str(number)]
            phi, pool = {
                "vision": (own.phi_v, own.visual_pool),
                "text": (own.phi_t, own.text_pool),
            }[side]
            shared, extra = literal_phi(phi, own.shared), literal_phi(phi, pool)
            for sequence in x:
                scores = torch.stack([(prompt * sequence[0]).sum() for prompt in extra])
                best = int(scores.argmax())
                chosen.append((number, best))
                weights = scores.exp() / scores.exp().sum()
                one = extra[best] if training else (weights[:, None] * extra).sum(0)
                inserted.append(torch.cat([shared, one[None]]))
            x = torch.cat([x[:, :1], torch.stack(inserted), x[:, 1:]], dim=1)
        mask = None
        if causal:
            mask = torch.full((x.shape[1],) * 2, float("-inf"), dtype=x.dtype).triu(1)
        x = block(x, attn_mask=mask)
        if inserted:
            x = torch.cat([x[:, :1], x[:, 1 + len(inserted[0]) :]], dim=1)
    return x


def literal_logits(method, images, training, names=NAMES):
    """77 tokens, prompts as tokens; the logits, and which extra prompts each side chose."""
    model, chosen = method.clip.model, {"vision": [], "text": []}
    ids = method.clip.tokenizer([TEMPLATE.replace("{}", name) for name in names])
    x = model.token_embedding(ids) + model.positional_embedding
    blocks = model.transformer.resblocks
    x = literal_tower(method, blocks, x, "text", training, chosen["text"], causal=True)
    eot = x[torch.arange(len(ids)), ids.argmax(-1)]
    text = F.normalize(model.ln_final(eot) @ model.text_projection, dim=-1)
    visual = model.visual
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    cls = visual.class_embedding.expand(len(images), 1, -1)
    x = visual.ln_pre(torch.cat([cls, patches], dim=1) + visual.positional_embedding)
    blocks = visual.transformer.resblocks
    x = literal_tower(method, blocks, x, "vision", training, chosen["vision"], causal=False)
    features = F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)
    return method.clip.logit_scale * features @ text.T, chosen


@pytest.mark.parametrize("trimming", TRIMMINGS.values(), ids=TRIMMINGS)
@pytest.mark.parametrize("layers", [(2, 3, 4), (1, 3)])
def test_equations(small_clip, trimming, layers):
    """A step's logits, loss and every gradient with the one that is chosen; prediction's logits
    with the mean. A class's text chooses as every other's does: bot sees nothing but itself."""
    method = build(small_clip(), trimming, layers=layers)
    images, labels = pictures(), torch.tensor([0, 3, 1, 2, 2])
    classes = method.prepare(NAMES, TEMPLATE)
    step = method.step(images, labels, classes, F.cross_entropy)
    step.loss.backward()
    got = {name: each.grad for name, each in method.named_parameters()}
    method.zero_grad(set_to_none=True)
    logits, chosen = literal_logits(method, images, training=True)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    torch.testing.assert_close(step.logits, logits, **TOLERANCE)
    torch.testing.assert_close(step.loss, loss, **TOLERANCE)
    for name, each in method.named_parameters():
        assert each.grad.abs().sum() > 0, name
        torch.testing.assert_close(got[name], each.grad, **TOLERANCE)
    # What enters the first layer as cls is the same of every picture, behind it no more.
    assert len(set(chosen["vision"])) > len(layers) or layers[0] == 1
    assert len(set(chosen["text"])) == len(layers)
    expected, _ = literal_logits(method, images, training=False)
    assert (expected - logits).abs().max() > 0.01
    torch.testing.assert_close(method.logits(images, classes), expected.detach(), **TOLERANCE)


def test_a_prompt_that_nobody_chose_has_no_gradient(small_clip):
    method = build(small_clip())
    images, labels = pictures(2), torch.tensor([0, 1])
    method.step(images, labels, method.prepare(NAMES, TEMPLATE), F.cross_entropy).loss.backward()
    _, chosen = literal_logits(method, images, training=True)
    for layer, prompts in method.prompts.items():
        for side, pool in (("vision", prompts.visual_pool), ("text", prompts.text_pool)):
            used = {best for number, best in chosen[side] if number == int(layer)}
            felt = set(pool.grad.abs().sum(1).nonzero()[:, 0].tolist())
            assert felt == used, (layer, side)


def test_new_names_and_an_exporter_have_the_mean(small_clip):
    method, images = build(small_clip()), pictures()
    names = ("gnu", "cat", "zebra")
    classes = method.prepare(names, TEMPLATE)
    expected = literal_logits(method, images, training=False, names=names)[0].detach()
    torch.testing.assert_close(method.logits(images, classes), expected, **TOLERANCE)
    sides = method.fixed_sides(without_parameters(method.clip), classes)
    got = method.clip.logit_scale * sides.pictures(images) @ sides.classes.T
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_start(small_clip):
    """Prompts from N(0, 0.02^2); the projectors of all layers alike, a tower its own."""
    config = replace(
        apply_preset(TrainConfig(), "promptlt"), own=PromptLtSettings(groups=500, layers=(2, 3, 4))
    )
    method = build_method(small_clip(), config, RunClasses(NAMES))
    first, *others = method.prompts.values()
    for each in others:
        for name in ("phi_v", "phi_t"):
            one, other = getattr(first, name).state_dict(), getattr(each, name).state_dict()
            assert all(torch.equal(one[key], other[key]) for key in one)
        assert not torch.equal(first.visual_pool, each.visual_pool)
    assert not torch.equal(first.phi_v[0].weight, first.phi_t[0].weight)
    # Of 48,000 numbers the mean square is within 6 sqrt(2 / 48000) = 4% of the variance.
    drawn = torch.cat([each.visual_pool.flatten() for each in method.prompts.values()])
    assert drawn.square().mean().item() == pytest.approx(0.02**2, rel=0.04)


def test_a_clip_in_bfloat16_leaves_parameters_and_gradients_in_float32(small_clip):
    method = build(small_clip().to(torch.bfloat16))
    classes, labels = method.prepare(NAMES, TEMPLATE), torch.tensor([0, 1, 2, 3, 0])
    step = method.step(pictures().bfloat16(), labels, classes, F.cross_entropy)
    step.loss.backward()
    assert step.logits.dtype == step.loss.dtype == torch.float32
    for name, each in method.named_parameters():
        assert each.dtype == each.grad.dtype == torch.float32, name
        assert torch.isfinite(each.grad).all(), name
    assert method.logits(pictures().bfloat16(), classes).dtype == torch.float32


def test_the_published_layers_are_cut_and_recorded_others_refused(small_clip):
    method = build(small_clip(), layers=PromptLtSettings.layers)
    assert method.layers == (3, 4)
    assert method.resolved(PromptLtSettings()).layers == (3, 4)
    for layers in ((2, 5), (5,)):
        with pytest.raises(InputError, match=r"--layers .*: expected layers within 1\.\.4"):
            build(small_clip(), layers=layers)


def test_parameters_on_vit_b_16():
    """Of shapes alone: 10 layers of 2 shared and 2 x 3 extra prompts of width 32, and perceptrons
    32 -> 32 -> 768 and 32 -> 32 -> 512."""
    config = apply_preset(TrainConfig(), "promptlt")
    config = replace(config, clip=replace(config.clip, clip="ViT-B-16"))
    perceptrons = 2 * (32 * 32 + 32) + (32 * 768 + 768) + (32 * 512 + 512)
    expected = 10 * ((2 + 2 * 3) * 32 + perceptrons)
    assert expected == 446_080
    assert parameters.parameter_lines(config)[0] == f"trainable parameters: {expected}"


@pytest.mark.parametrize(
    ("words", "lr", "epochs", "batch"),
    [
        ({}, 3e-3, 50, 4),
        ({"data": "imagenet"}, 1e-3, 5, 32),
        ({"data": "caltech101", "split": "all", "shots": 16}, 1e-3, 50, 32),
        ({"data": "imagenet", "split": "all"}, 1e-3, 1, 32),
    ],
)
def test_published_settings(words, lr, epochs, batch):
    config = default_config({"method": "promptlt", **words})
    optim = config.optim
    assert (optim.lr, optim.epochs, optim.batch, optim.warmup_epochs) == (lr, epochs, batch, 1)
    assert (optim.optimiser, optim.criterion) == ("adamw", "ce")
    own = config.own
    assert (own.shared, own.groups, own.d, own.layers) == (2, 3, 32, tuple(range(3, 13)))
