"""CLIP-LoRA: equations, dropout, what is merged for prediction, and how long it trains."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lamp_fast.clip.settings import Trimming
from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.methods import clip_lora
from lamp_fast.methods.fixed import without_parameters
from lamp_fast.methods.settings import SteppedSettings
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs import parameters
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig, apply_preset, default_config
from lamp_fast.runs.experiment import assemble
from lamp_fast.runs.optimisation import learning_rate

# The same float64 numbers added up in another order: some hundred operations on values of order 1
# to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
NAMES = ("zero", "a very long name of some kind of bird", "cat", "cathedral")
TEMPLATE = "a photo of a {}, a type of pet."
TRIMMINGS = {
    "default": Trimming(),
    "as published": Trimming(as_published=True),
    "one switch each off": Trimming(share_tokens=False, last_row=False),
    "small sheets": Trimming(most_rows=12),
}


def build(clip, trimming=None, **own):
    config = apply_preset(TrainConfig(), "clip-lora")
    config = replace(config, own=replace(config.own, **own), trim=trimming or Trimming())
    torch.manual_seed(3)
    method = build_method(clip, config, RunClasses(NAMES, ("ox",)))
    with torch.no_grad():
        for name, each in method.named_parameters():
            if name.endswith("widen"):  # which starts at 0
                each.normal_(std=0.3)
    return method


def pictures(count=3):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator)


def literal_block(block, low_rank, x, scale, masks, causal):
    """Attention by its formula, each of q, k and v with W x + s B A (mask x), then the MLP."""
    normed, attention = block.ln_1(x), block.attn
    heads, width = attention.num_heads, x.shape[-1]
    projected = []
    for which in range(3):
        rows = slice(which * width, (which + 1) * width)
        weight, bias = attention.in_proj_weight[rows], attention.in_proj_bias[rows]
        change = scale * low_rank.widen[which] @ low_rank.narrow[which]
        dropped = normed if masks is None else normed * masks[which]
        projected.append(normed @ weight.T + bias + dropped @ change.T)
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in projected)
    scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
    if causal:
        length = x.shape[1]
        scores = scores + torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
    attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
    x = x + attended @ attention.out_proj.weight.T + attention.out_proj.bias
    return x + block.mlp(block.ln_2(x))


def literal_logits(method, images, scale, masks=None):
    """77 tokens; ``masks`` of every block, those of the text tower first."""
    model = method.clip.model
    masks = iter(masks or [None] * (len(method.text) + len(method.vision)))
    ids = method.clip.tokenizer([TEMPLATE.replace("{}", name) for name in NAMES])
    x = model.token_embedding(ids) + model.positional_embedding
    for block, low_rank in zip(model.transformer.resblocks, method.text, strict=True):
        x = literal_block(block, low_rank, x, scale, next(masks), causal=True)
    eot = x[torch.arange(len(ids)), ids.argmax(-1)]
    text = F.normalize(model.ln_final(eot) @ model.text_projection, dim=-1)

    visual = model.visual
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    cls = visual.class_embedding.expand(len(images), 1, -1)
    x = visual.ln_pre(torch.cat([cls, patches], dim=1) + visual.positional_embedding)
    for block, low_rank in zip(visual.transformer.resblocks, method.vision, strict=True):
        x = literal_block(block, low_rank, x, scale, next(masks), causal=False)
    features = F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)
    return method.clip.logit_scale * features @ text.T


def assert_same_step(method, step, logits, labels):
    """The step's logits, loss and every gradient are those of literal logits."""
    step.loss.backward()
    got = {name: each.grad for name, each in method.named_parameters()}
    method.zero_grad(set_to_none=True)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    torch.testing.assert_close(step.logits, logits, **TOLERANCE)
    torch.testing.assert_close(step.loss, loss, **TOLERANCE)
    for name, each in method.named_parameters():
        assert each.grad.abs().sum() > 0, name
        torch.testing.assert_close(got[name], each.grad, **TOLERANCE)


@pytest.mark.parametrize("trimming", TRIMMINGS.values(), ids=TRIMMINGS)
@pytest.mark.parametrize(("rank", "alpha"), [(2, 1.0), (3, 0.5)])
def test_equations(small_clip, trimming, rank, alpha):
    """Logits, loss and every gradient; the scale is alpha / sqrt(r), and prediction merges."""
    own = {"lora_rank": rank, "lora_alpha": alpha, "lora_dropout": 0.0}
    method = build(small_clip(), trimming, **own)
    images, labels = pictures(), torch.tensor([0, 3, 1])
    classes = method.prepare(NAMES, TEMPLATE)
    step = method.step(images, labels, classes, F.cross_entropy)
    logits = literal_logits(method, images, alpha / rank**0.5)
    assert_same_step(method, step, logits, labels)
    torch.testing.assert_close(method.logits(images, classes), logits.detach(), **TOLERANCE)


def test_dropout_stands_before_a_and_each_of_q_k_and_v_has_its_own(small_clip, monkeypatch):
    """With the masks that were drawn: as published, where text has 77 tokens."""
    drawn = []

    class Recorded(clip_lora.Dropout):
        def __call__(self, x):
            dropped = super().__call__(x)
            drawn.append((dropped / x).detach())  # no number of a LayerNorm is 0 here
            return dropped

    monkeypatch.setattr(clip_lora, "Dropout", Recorded)
    method = build(small_clip(), Trimming(as_published=True))
    images, labels = pictures(), torch.tensor([0, 3, 1])
    step = method.step(images, labels, method.prepare(NAMES, TEMPLATE), F.cross_entropy)
    assert len(drawn) == 8
    assert all(each.shape[0] == 3 and not torch.equal(each[0], each[1]) for each in drawn)
    for each in drawn:
        torch.testing.assert_close(each * 0.75, (each > 0).to(each), **TOLERANCE)
    # Of 4 * 3 * 4 * 77 * 24 text numbers a quarter is dropped, within 6 standard deviations.
    text = torch.cat([each.flatten() for each in drawn[:4]])
    assert (text == 0).double().mean().item() == pytest.approx(
        0.25, abs=6 * (0.25 * 0.75 / len(text)) ** 0.5
    )
    assert_same_step(method, step, literal_logits(method, images, 2**-0.5, drawn), labels)


@pytest.mark.parametrize("trimming", TRIMMINGS.values(), ids=TRIMMINGS)
def test_dropout_follows_torchs_generator_and_has_no_part_in_prediction(small_clip, trimming):
    method = build(small_clip(), trimming)
    images, labels = pictures(), torch.tensor([0, 3, 1])
    classes = method.prepare(NAMES, TEMPLATE)
    state, losses = torch.get_rng_state(), []
    for _ in range(2):
        losses.append(method.step(images, labels, classes, F.cross_entropy).loss.item())
    torch.set_rng_state(state)
    again = method.step(images, labels, classes, F.cross_entropy).loss.item()
    assert losses[0] == again != losses[1]
    before = torch.get_rng_state()
    got = method.logits(images, classes)
    assert torch.equal(before, torch.get_rng_state())
    expected = literal_logits(method, images, 2**-0.5).detach()
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_no_class_shares_a_mask_with_another(small_clip):
    """Two classes that begin alike have rows of their own while there is dropout."""
    method = build(small_clip())
    (forest,) = method.prepare(("cat", "cathedral", "cat bird"), TEMPLATE).forests
    assert forest.visible is None
    assert len(forest.states) == 3
    without = build(small_clip(), lora_dropout=0.0)
    shared = without.prepare(("cat", "cathedral", "cat bird"), TEMPLATE).forests
    assert sum(map(len, shared)) < 3 * len(forest)


def test_it_starts_as_clip(small_clip):
    clip = small_clip()
    method = build_method(clip, apply_preset(TrainConfig(), "clip-lora"), RunClasses(NAMES))
    images, ids = pictures(), clip.tokenizer([TEMPLATE.replace("{}", name) for name in NAMES])
    text = F.normalize(clip.model.encode_text(ids), dim=-1)
    expected = clip.logit_scale * F.normalize(clip.model.encode_image(images), dim=-1) @ text.T
    got = method.logits(images, method.prepare(NAMES, TEMPLATE))
    torch.testing.assert_close(got, expected.detach(), **TOLERANCE)
    for each in (*method.vision, *method.text):
        assert not each.widen.any()
        # Kaiming over fan-in with a = sqrt 5: uniform within 1 / sqrt(width).
        bound = each.narrow.shape[-1] ** -0.5
        assert 0.7 * bound < each.narrow.abs().max() <= bound


def test_what_is_merged_follows_the_weights(small_clip):
    """It is kept, and computed again once a weight has moved."""
    method = build(small_clip())
    images, classes = pictures(), method.prepare(NAMES, TEMPLATE)
    first = method.logits(images, classes)
    assert method._merged(method.clip.vision, method.vision) is method._merged(
        method.clip.vision, method.vision
    )
    with torch.no_grad():
        method.vision[0].widen.add_(0.1)
    moved = method.logits(images, classes)
    assert (moved - first).abs().max() > 0.01
    expected = literal_logits(method, images, 2**-0.5).detach()
    torch.testing.assert_close(moved, expected, **TOLERANCE)


def test_both_sides_for_an_exporter_are_merged(small_clip):
    """The picture side holds CLIP with other weights and nothing of B and A."""
    method = build(small_clip())
    classes, images = method.prepare(NAMES, TEMPLATE), pictures()
    sides = method.fixed_sides(without_parameters(method.clip), classes)
    got = method.clip.logit_scale * sides.pictures(images) @ sides.classes.T
    torch.testing.assert_close(got, method.logits(images, classes), **TOLERANCE)
    with torch.no_grad():
        for each in method.parameters():
            each.zero_()
    again = method.clip.logit_scale * sides.pictures(images) @ sides.classes.T
    assert torch.equal(got, again)


def test_a_clip_in_bfloat16_leaves_parameters_and_gradients_in_float32(small_clip):
    method = build(small_clip().to(torch.bfloat16))
    classes = method.prepare(NAMES, TEMPLATE)
    step = method.step(pictures().bfloat16(), torch.tensor([0, 1, 2]), classes, F.cross_entropy)
    step.loss.backward()
    assert step.logits.dtype == step.loss.dtype == torch.float32
    for name, each in method.named_parameters():
        assert each.dtype == each.grad.dtype == torch.float32, name
        assert torch.isfinite(each.grad).all(), name
    assert method.logits(pictures().bfloat16(), classes).dtype == torch.float32


def test_parameters_on_vit_b_16():
    """2 matrices of rank 2 for each of q, k and v in 12 blocks a tower, of shapes alone."""
    config = apply_preset(TrainConfig(), "clip-lora")
    config = replace(config, clip=replace(config.clip, clip="ViT-B-16"))
    assert parameters.parameter_lines(config) == [
        "trainable parameters: 184320",
        f"  vision: {12 * 3 * 2 * 2 * 768}",
        f"  text: {12 * 3 * 2 * 2 * 512}",
    ]


def test_the_published_rate_is_a_cosine_over_every_step():
    """CosineAnnealingLR over all steps, from 2e-4 to 1e-6."""
    optim = replace(apply_preset(TrainConfig(), "clip-lora").optim, epochs=5)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.AdamW([weight], lr=2e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 5 * 8, eta_min=1e-6)
    for step in range(40):
        expected = optimiser.param_groups[0]["lr"]
        assert learning_rate(optim, step / 8) == pytest.approx(expected, rel=1e-9)
        optimiser.step()
        schedule.step()


@pytest.mark.parametrize(
    ("pictures", "classes", "batch", "expected"),
    [
        (16 * 50, 50, 32, 320),  # 8,000 steps of 25 an epoch
        (16 * 51, 51, 32, 320),  # 25.5 batches, of which the half is dropped: 8,000 / 25
        (16 * 1000, 1000, 32, 16),
        (100, 50, 32, 333),  # a mean of 2 a class: 1,000 steps of 3
        (20, 10, 32, 1000),  # one batch of all
        (1, 1000, 32, 1),
    ],
)
def test_steps_for_each_shot_become_epochs(pictures, classes, batch, expected):
    assert SteppedSettings().epochs(pictures, classes, batch) == expected


def test_a_run_counts_its_epochs_from_its_data_and_keeps_the_number(tmp_path):
    """A number of epochs is taken instead; a method without a number of steps refuses none."""
    config = default_config({"method": "clip-lora", "data": "digits"})
    assert config.optim.epochs is None
    data = replace(config.data, data="digits", imb=10.0)
    experiment = assemble(replace(config, data=data, out=tmp_path))
    counts = experiment.benchmark.counts
    steps = 500 * counts.mean() / (counts.sum() // 32)
    assert experiment.config.optim.epochs == round(steps)
    assert experiment.record()["settings"]["optim"]["epochs"] == round(steps)
    fixed = replace(config, data=data, optim=replace(config.optim, epochs=7))
    assert assemble(fixed).config.optim.epochs == 7
    coop = default_config({"method": "coop"})
    with pytest.raises(InputError, match="--epochs none: --method coop has no published number"):
        validate(replace(coop, optim=replace(coop.optim, epochs=None)))
