"""The rivals against their equations in float64: our own methods, and MMRL's written out."""

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import rivals_growth
from benchmarks.measuring.steps import SMALL, random_clip
from benchmarks.measuring.timing import CPU
from benchmarks.rivals import RIVALS, Contest
from benchmarks.rivals.lines import LINES
from benchmarks.rivals.mmrl import ALPHA, COUNT, PULL
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import default_config

NAMES = ("zero", "a very long name of some kind of bird", "cat")
# The same float64 numbers added up in another order: some hundred operations on values of order 1
# to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=generator)
    return images, torch.tensor([0, 2, 1])


def felt(rival):
    """Every parameter moved, so that all of them have a part."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for each in rival.parameters():
            each += 0.1 * torch.randn(each.shape, dtype=each.dtype, generator=generator)
    return rival


def ours(name, clip):
    config = default_config({"method": name, "data": "caltech101"})
    torch.manual_seed(0)
    return build_method(clip, config, RunClasses(NAMES, (), (2, 2, 2)))


@pytest.mark.parametrize("name", ["maple", "lift"])
def test_a_rival_has_the_equations_of_our_method(small_clip, batch, name):
    """Scores, loss and the gradient of every parameter, which have the same names."""
    clip, (images, labels) = small_clip(), batch
    method, rival = ours(name, clip), felt(RIVALS[name](clip, NAMES))
    method.load_state_dict(rival.state_dict())
    classes = method.prepare(NAMES, "a photo of a {}.")
    step = method.step(images, labels, classes, F.cross_entropy)
    step.loss.backward()
    loss = rival.loss(images, labels)
    loss.backward()
    torch.testing.assert_close(rival.scores(images, rival.text()), step.logits, **TOLERANCE)
    torch.testing.assert_close(loss, step.loss, **TOLERANCE)
    expected = dict(method.named_parameters())
    for parameter, each in rival.named_parameters():
        assert each.grad.abs().sum() > 0, parameter
        torch.testing.assert_close(each.grad, expected[parameter].grad, **TOLERANCE)


def test_lift_starts_where_ours_does(small_clip):
    """W_c = norm(P t_c)."""
    clip = small_clip()
    texts = clip.model.encode_text(clip.tokenizer([f"a photo of a {name}." for name in NAMES]))
    rows = texts @ clip.model.visual.proj.T
    rival = RIVALS["lift"](clip, NAMES)
    torch.testing.assert_close(rival.head.data, F.normalize(rows, dim=-1), **TOLERANCE)


def literal_mmrl(rival, images, labels):
    """On 77 tokens through open_clip's own blocks, with a second whole encoder of each side."""
    clip, model = rival.clip, rival.clip.model
    visual, depth, first = model.visual, rival.clip.depth, rival.first

    def tower(blocks, x, maps, mask):
        for number, block in enumerate(blocks, 1):
            if number >= first:
                own = maps[number - first]
                tokens = rival.tokens @ own.weight.T + own.bias
                rest = x[:, 1:] if number == first else x[:, 1 + COUNT :]
                x = torch.cat([x[:, :1], tokens.expand(len(x), -1, -1), rest], dim=1)
            size = x.shape[1]
            causal = torch.full((size, size), float("-inf"), dtype=x.dtype).triu(1)
            x = block(x, attn_mask=causal if mask else None)
        return x

    ids = clip.tokenizer([f"a photo of a {name}." for name in NAMES])
    x = model.token_embedding(ids) + model.positional_embedding
    x = tower(model.transformer.resblocks, x, rival.to_text, mask=True)
    eot = x[torch.arange(len(ids)), ids.argmax(-1) + COUNT]
    w = F.normalize(model.ln_final(eot) @ model.text_projection, dim=-1)
    w0 = F.normalize(model.encode_text(ids), dim=-1)
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    cls = visual.class_embedding.expand(len(images), 1, -1)
    x = visual.ln_pre(torch.cat([cls, patches], dim=1) + visual.positional_embedding)
    x = tower(visual.transformer.resblocks, x, rival.to_image, mask=False)
    assert len(rival.to_image) == depth - first + 1
    f = F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)
    tokens = sum(visual.ln_post(x[:, index]) for index in range(1, COUNT + 1)) / COUNT
    g = F.normalize(tokens @ rival.readout, dim=-1)
    f0 = F.normalize(model.encode_image(images), dim=-1)
    by_cls, by_tokens = (clip.logit_scale * each @ w.T for each in (f, g))
    loss = ALPHA * F.cross_entropy(by_cls, labels) + (1 - ALPHA) * F.cross_entropy(
        by_tokens, labels
    )
    loss = loss + PULL * (1 - F.cosine_similarity(f, f0).mean())
    loss = loss + PULL * (1 - F.cosine_similarity(w, w0).mean())
    return ALPHA * by_cls + (1 - ALPHA) * by_tokens, loss


def test_mmrl_has_its_equations(small_clip, batch):
    images, labels = batch
    rival = felt(RIVALS["mmrl"](small_clip(), NAMES))
    logits, loss = literal_mmrl(rival, images, labels)
    loss.backward()
    expected = {name: each.grad for name, each in rival.named_parameters()}
    rival.zero_grad(set_to_none=True)
    got = rival.loss(images, labels)
    got.backward()
    torch.testing.assert_close(got, loss, **TOLERANCE)
    torch.testing.assert_close(rival.scores(images, rival.text()), logits, **TOLERANCE)
    for name, each in rival.named_parameters():
        assert expected[name].abs().sum() > 0, name
        torch.testing.assert_close(each.grad, expected[name], **TOLERANCE)


def test_parameters_of_vit_b_16_are_the_published_ones():
    """3,555,072 of MaPLe and 4,992,256 of MMRL; LIFT's tuner of 100 classes has 101,436, its head
    76,800."""
    clip = random_clip(CPU)
    names = tuple(str(number) for number in range(100))
    counts = {
        name: sum(each.numel() for each in kind(clip, names).own()) for name, kind in RIVALS.items()
    }
    assert counts == {"maple": 3_555_072, "mmrl": 4_992_256, "lift": 101_436 + 76_800}


@pytest.mark.parametrize("name", RIVALS)
def test_a_step_in_bfloat16_lowers_the_loss(name):
    clip = random_clip(CPU, torch.bfloat16, SMALL)
    contest = Contest(clip, 2, 3, name)
    before = contest.rival.loss(contest.images, contest.labels).item()
    for _ in range(5):
        contest.train()
    contest.evaluate()
    assert contest.rival.loss(contest.images, contest.labels).item() < before
    assert all(each.dtype == torch.float32 for each in contest.rival.own())


def test_every_line_is_measured_and_drawn(monkeypatch, tmp_path, capsys):
    """A row for training and one for evaluation of each line, a line each in every panel."""
    monkeypatch.setattr(rivals_growth, "random_clip", lambda *where: random_clip(*where, SMALL))
    settings = rivals_growth.Settings(
        tmp_path, rounds=1, batches=(2,), classes=(3, 4), compiled=False
    )
    rivals_growth.main(settings)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(LINES)
    steps = json.loads((tmp_path / "rivals_growth.json").read_text())["steps"]
    assert [*steps] == [line.title for line in LINES]
    for line, found in zip(lines[2::2], steps.values(), strict=True):
        cells = [f"{point['train']:.2f}" for point in found]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == cells
    results = {
        name: {(each["batch"], each["classes"]): rivals_growth.Point(1.0, 2.0) for each in found}
        for name, found in steps.items()
    }
    drawn = rivals_growth.draw("title", results).axes
    assert [len(axes.lines) for axes in drawn] == [len(LINES)] * 2
    assert (tmp_path / "rivals_growth.png").stat().st_size > 0


def test_a_point_without_memory_says_so():
    class Hungry:
        def pieces(self, *arguments, **options):
            raise torch.OutOfMemoryError("no more\nof it")

    clip = random_clip(CPU, None, SMALL)
    point = rivals_growth.measure(clip, Hungry(), 2, 3, 1, compiled=False)
    assert point == rivals_growth.Point(refused="no more")
    results = {line.title: {(2, 3): point} for line in LINES}
    assert "no more" in rivals_growth.table(results)
    rivals_growth.draw("title", results)


@pytest.mark.parametrize("name", RIVALS)
def test_torch_compile_takes_a_rival_whole(small_clip, batch, name):
    """No break in the graphs of the loss and of the scores: ``fullgraph`` raises at the first."""
    images, labels = batch
    rival = felt(RIVALS[name](small_clip(2, 2), NAMES))
    options = {"backend": "aot_eager", "fullgraph": True, "dynamic": False}
    rival.loss(images, labels).backward()
    expected = [each.grad for each in rival.own()]
    rival.zero_grad(set_to_none=True)
    torch.compile(rival.loss, **options)(images, labels).backward()
    for each, gradient in zip(rival.own(), expected, strict=True):
        torch.testing.assert_close(each.grad, gradient, **TOLERANCE)
    with torch.no_grad():
        text = rival.text()
        scores = torch.compile(rival.scores, **options)(images, text)
        torch.testing.assert_close(scores, rival.scores(images, text), **TOLERANCE)
