"""MMRL and MMRL++ against their equations, over open_clip's own blocks, in float64."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lamp_fast.clip.settings import Trimming
from lamp_fast.data.benchmark import Origin
from lamp_fast.errors import InputError
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs import parameters
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig, apply_preset, choosing_flags, default_config
from lamp_fast.runs.losses import logit_adjustment, mean_over_rows

# The same float64 numbers added up in another order: some hundred operations on values of order 1
# to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
NAMES = ("zero", "a very long name of some kind of bird", "cat", "cathedral")
NEW = ("dog", "a cat")
TEMPLATE = "a photo of a {}, a type of pet."
COUNT, ALPHA, BETA, WEIGHT = 3, 0.6, 0.7, 2.5
METHODS = ("mmrl", "mmrl++")
SMALL = {"rep_tokens": COUNT, "rep_width": 8, "rep_alpha": ALPHA, "reg_weight": WEIGHT}
RANKS = {"rep_beta": BETA, "aligner_rank": 2, "head_rank": 4}
TRIMMINGS = {
    "default": Trimming(),
    "as published": Trimming(as_published=True),
    "one switch each off": Trimming(share_tokens=False, last_row=False, prepare_text=False),
    "small sheets": Trimming(most_rows=12, block=3),
}


def build(name, clip, trimming=None, *, moved=True, **own):
    """A method whose every parameter is felt: products that start at 0 are moved away from it."""
    config = default_config({"method": name, "data": "digits"})
    small = SMALL | (RANKS if name == "mmrl++" else {}) | own
    config = replace(config, own=replace(config.own, **small), trim=trimming or Trimming())
    torch.manual_seed(3)
    method = build_method(clip, config, RunClasses(NAMES, NEW))
    with torch.no_grad():
        for each in method.parameters() if moved else ():
            each += 0.3 * torch.randn(each.shape, dtype=each.dtype)
    return method


def pictures(count=3):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator)


def own_tokens(method, side):
    """F_i(R) by layer."""
    aligners, vectors = getattr(method, side), method.tokens
    if hasattr(aligners, "layers"):
        maps = [(each.weight, each.bias) for each in aligners.layers]
    else:
        parts = zip(aligners.up, aligners.down, aligners.bias, strict=True)
        maps = [(aligners.weight + up @ down, bias) for up, down, bias in parts]
    own = [vectors @ weight.T + bias for weight, bias in maps]
    return dict(zip(method.layers, own, strict=True))


def through_blocks(x, blocks, own, share, causal):
    """Rows [N, L, wide], tokens behind the first one from the first layer that has some."""
    there = False
    for number, block in enumerate(blocks, 1):
        if number in own:
            new = own[number].expand(len(x), -1, -1)
            if there:
                new = share * new + (1 - share) * x[:, 1 : 1 + COUNT]
                x = torch.cat([x[:, :1], new, x[:, 1 + COUNT :]], dim=1)
            else:
                x = torch.cat([x[:, :1], new, x[:, 1:]], dim=1)
            there = True
        mask = torch.full((x.shape[1],) * 2, float("-inf"), dtype=x.dtype).triu(1)
        x = block(x, attn_mask=mask if causal else None)
    return x


def literal_text(method, names, own=None):
    model = method.clip.model
    ids = method.clip.tokenizer([TEMPLATE.format(name) for name in names])
    x = model.token_embedding(ids) + model.positional_embedding
    share = BETA if hasattr(method, "head_up") else 1
    x = through_blocks(x, model.transformer.resblocks, own or {}, share, causal=True)
    x = x[torch.arange(len(ids)), ids.argmax(-1) + (COUNT if own else 0)]
    return F.normalize(model.ln_final(x) @ model.text_projection, dim=-1)


def literal_image(method, images, own=None):
    """f, and f_r where there are tokens."""
    visual = method.clip.model.visual
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    cls = visual.class_embedding.expand(len(images), 1, -1)
    x = visual.ln_pre(torch.cat([cls, patches], dim=1) + visual.positional_embedding)
    plus = hasattr(method, "head_up")
    blocks = visual.transformer.resblocks
    x = through_blocks(x, blocks, own or {}, BETA if plus else 1, causal=False)
    f = F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)
    if own is None:
        return f, None
    head = visual.proj + method.head_up @ method.head_down if plus else method.head
    return f, F.normalize(visual.ln_post(x[:, 1 : 1 + COUNT]).mean(1) @ head, dim=-1)


def literal(method, images, labels, names, criterion=F.cross_entropy):
    scale = method.clip.logit_scale
    text = literal_text(method, names, own_tokens(method, "textual"))
    whole, tokens = literal_image(method, images, own_tokens(method, "visual"))
    z, z_r = scale * whole @ text.T, scale * tokens @ text.T
    distance = 2 - (
        F.cosine_similarity(whole, literal_image(method, images)[0]).mean()
        + F.cosine_similarity(text, literal_text(method, names)).mean()
    )
    cross_entropy = ALPHA * criterion(z, labels) + (1 - ALPHA) * criterion(z_r, labels)
    return z, z_r, cross_entropy + WEIGHT * distance


def assert_equations_hold(method, criterion=F.cross_entropy):
    images, labels = pictures(), torch.tensor([0, len(NAMES) - 1, 1])
    classes = method.prepare(NAMES, TEMPLATE)
    step = method.step(images, labels, classes, criterion)
    step.loss.backward()
    got = {name: each.grad for name, each in method.named_parameters()}
    method.zero_grad(set_to_none=True)
    z, z_r, loss = literal(method, images, labels, NAMES, criterion)
    loss.backward()
    fused = ALPHA * z + (1 - ALPHA) * z_r
    torch.testing.assert_close(step.logits, fused, **TOLERANCE)
    torch.testing.assert_close(step.loss, loss, **TOLERANCE)
    torch.testing.assert_close(sum(step.terms.values()), loss, **TOLERANCE)
    torch.testing.assert_close(method.logits(images, classes), fused, **TOLERANCE)
    for name, each in method.named_parameters():
        assert each.grad.abs().sum() > 0, name
        torch.testing.assert_close(
            got[name], each.grad, **TOLERANCE, msg=lambda text, p=name: f"{p}: {text}"
        )


@pytest.mark.parametrize("trimming", TRIMMINGS.values(), ids=TRIMMINGS)
@pytest.mark.parametrize("name", METHODS)
def test_equations(small_clip, name, trimming):
    """Logits, loss and every gradient, for every kind of trimming."""
    method = build(name, small_clip(), trimming)
    assert method.layers == (2, 3, 4)
    assert_equations_hold(method)


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("layers", [(1, 2), (1, 3), (2, 4), (4,), (1, 2, 3, 4)])
@pytest.mark.parametrize("name", METHODS)
def test_layers_of_ones_own(small_clip, name, layers, as_published):
    """Layers between and above those that have tokens of their own carry tokens on."""
    trimming = Trimming(as_published=as_published)
    assert_equations_hold(build(name, small_clip(), trimming, rep_layers=layers))


@pytest.mark.parametrize("depths", [(3, 4), (5, 4)])
@pytest.mark.parametrize("name", METHODS)
def test_towers_of_unequal_depth(small_clip, name, depths):
    assert_equations_hold(build(name, small_clip(*depths)))


@pytest.mark.parametrize("name", METHODS)
def test_another_loss_reaches_both_cross_entropies(small_clip, name):
    counts = torch.tensor([9.0, 5.0, 2.0, 1.0], dtype=torch.float64)
    criterion = mean_over_rows(logit_adjustment(counts, 1.0))
    assert_equations_hold(build(name, small_clip()), criterion)


def test_layers_follow_the_depth_and_are_recorded(small_clip):
    method = build("mmrl", small_clip(6, 8))
    assert method.resolved(method.config).rep_layers == (3, 4, 5, 6)
    assert build("mmrl", small_clip(12, 12)).layers == tuple(range(6, 13))
    with pytest.raises(InputError, match=r"--rep-layers 3\.\.5: expected layers within 1\.\.4"):
        build("mmrl", small_clip(), rep_layers=(3, 4, 5))


@pytest.mark.parametrize("trimming", [Trimming(), Trimming(as_published=True)])
@pytest.mark.parametrize("name", METHODS)
def test_who_is_scored_by_the_tokens(small_clip, name, trimming):
    """Trained names, wherever they are asked for; none of another data set's."""
    method = build(name, small_clip(), trimming)
    images = pictures()
    names = (NEW[0], NAMES[2], "zebra", NAMES[0])
    z, z_r, _ = literal(method, images, torch.tensor([0, 1, 2]), names)
    fused = ALPHA * z + (1 - ALPHA) * z_r
    expected = torch.stack([z[:, 0], fused[:, 1], z[:, 2], fused[:, 3]], dim=1)
    got = method.logits(images, method.prepare(names, TEMPLATE))
    torch.testing.assert_close(got, expected, **TOLERANCE)
    elsewhere = method.prepare(names, TEMPLATE, Origin("imagenetv2", target=True))
    torch.testing.assert_close(method.logits(images, elsewhere), z, **TOLERANCE)
    z, _, _ = literal(method, images, torch.tensor([0, 1, 1]), NEW)
    torch.testing.assert_close(method.logits(images, method.prepare(NEW, TEMPLATE)), z, **TOLERANCE)
    assert not method.reads_features


@pytest.mark.parametrize("name", METHODS)
def test_kept_text_follows_every_change(small_clip, name):
    method = build(name, small_clip())
    images, classes = pictures(), method.prepare(NAMES, TEMPLATE)
    before, state = method.logits(images, classes), copy.deepcopy(method.state_dict())
    with torch.no_grad():
        method.tokens += 0.1
    after = method.logits(images, classes)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(
        after, method.logits(images, method.prepare(NAMES, TEMPLATE)), **TOLERANCE
    )
    method.load_state_dict(state)
    assert torch.equal(method.logits(images, classes), before)
    torch.testing.assert_close(method.logits(images[:1], classes), before[:1], **TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
def test_pieces_of_a_batch_give_the_whole_batchs_gradient(small_clip, name):
    method = build(name, small_clip())
    images, labels = pictures(5), torch.tensor([0, 1, 2, 3, 0])
    classes = method.prepare(NAMES, TEMPLATE)
    results = []
    for pieces in (1, 3):
        method.zero_grad(set_to_none=True)
        method.accumulate(images, labels, classes, F.cross_entropy, pieces, lambda loss: loss)
        results.append([each.grad for each in method.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_where_training_starts(small_clip):
    """MMRL: maps that are alike, a projection of its own. MMRL++: one map, CLIP's projection."""
    clip = small_clip()
    method = build("mmrl", clip, moved=False)
    for side in (method.textual, method.visual):
        first, *others = side.layers
        assert all(torch.equal(each.weight, first.weight) for each in others)
        assert all(torch.equal(each.bias, first.bias) for each in others)
    method = build("mmrl++", clip, moved=False)
    rows = torch.randn(3, clip.vision.width, dtype=torch.float64)
    torch.testing.assert_close(method.project(rows), rows @ clip.model.visual.proj, **TOLERANCE)
    for side in ("textual", "visual"):
        first, *others = own_tokens(method, side).values()
        assert all(torch.allclose(each, first) for each in others)
        assert all(each.abs().sum() > 0 for each in getattr(method, side).up)


@pytest.mark.parametrize("name", METHODS)
def test_a_clip_in_bfloat16_leaves_parameters_and_gradients_in_float32(small_clip, name):
    method = build(name, small_clip().to(torch.bfloat16))
    classes = method.prepare(NAMES, TEMPLATE)
    labels = torch.tensor([0, 1, 2])
    step = method.step(pictures().bfloat16(), labels, classes, F.cross_entropy)
    step.loss.backward()
    assert step.loss.dtype == step.logits.dtype == torch.float32
    assert method.logits(pictures().bfloat16(), classes).dtype == torch.float32
    for parameter, each in method.named_parameters():
        assert each.dtype == torch.float32, parameter
        assert torch.isfinite(each.grad).all(), parameter


def test_trainable_parameters_on_vit_b_16():
    """As worked out in the public code, exactly, of shapes alone."""
    for preset, expected in (("mmrl", 4_992_256), ("mmrl++", 813_312)):
        config = apply_preset(TrainConfig(), preset)
        config = replace(config, clip=replace(config.clip, clip="ViT-B-16"))
        first, *_ = parameters.parameter_lines(config)
        assert first == f"trainable parameters: {expected}"


@pytest.mark.parametrize(
    ("flags", "optim", "own"),
    [
        ("--method mmrl", (1e-3, 10, 4, 1), {"reg_weight": 1.0, "rep_width": 512}),
        ("--method mmrl --data EuroSAT", (1e-3, 10, 4, 1), {"reg_weight": 0.01, "rep_width": 2048}),
        ("--method mmrl --data imagenet", (1e-3, 5, 32, 1), {"reg_weight": 0.5}),
        ("--method mmrl --split all", (1e-3, 50, 32, 1), {"reg_weight": 0.5}),
        ("--method mmrl --split all --data dtd", (1e-3, 50, 32, 1), {"reg_weight": 6.0}),
        ("--method mmrl --split all --data imagenet", (1e-3, 1, 32, 0), {"reg_weight": 0.2}),
        ("--method mmrl --split all --data imagenet --shots 16", (1e-3, 5, 32, 1), {}),
        ("--method mmrl++", (1e-3, 10, 4, 1), {"reg_weight": 1.0, "rep_beta": 0.9}),
        ("--method mmrl++ --data food101", (1e-3, 10, 4, 1), {"reg_weight": 1.0, "rep_beta": 0.1}),
        ("--method mmrl++ --split all --data sun397", (2e-3, 100, 32, 1), {"rep_beta": 0.5}),
        (
            "--method mmrl++ --split all --data imagenet",
            (1e-3, 1, 32, 0),
            {"reg_weight": 0.1, "rep_beta": 0.9},
        ),
    ],
)
def test_published_settings(flags, optim, own):
    config = default_config(choosing_flags(flags.split()))
    chosen = config.optim
    assert (chosen.lr, chosen.epochs, chosen.batch, chosen.warmup_epochs) == optim
    assert chosen.optimiser == "adamw"
    assert config.views.crop_area == 0.5
    assert {name: getattr(config.own, name) for name in own} == own
