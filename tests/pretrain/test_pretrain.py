"""Rendering and pre-training of the carried CLIP."""

import re

import numpy as np
import open_clip
import pytest
import torch

from lamp_fast.clip import tiny
from lamp_fast.data.sources import digits
from lamp_fast.errors import InputError
from lamp_fast.pretrain import glyphs
from lamp_fast.pretrain import train as pretrain

FEW_FONTS = ("DejaVuSans", "cmr10")


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def shapes():
    return glyphs.load_shapes(FEW_FONTS)


def components(picture, diagonals=True):
    """Number of connected components, by flood fill."""
    left = {tuple(point) for point in np.argwhere(picture)}
    count = 0
    while left:
        count += 1
        front = [left.pop()]
        while front:
            y, x = front.pop()
            steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if diagonals or not dy * dx]
            near = {(y + dy, x + dx) for dy, dx in steps} & left
            left -= near
            front.extend(near)
    return count


def test_thinning_leaves_lines_that_hang_together():
    ink = np.zeros((3, 24, 24), dtype=bool)
    ink[0, 4:20, 8:14] = True  # a bar
    ink[1, 3:21, 3:21] = True  # a ring
    ink[1, 8:16, 8:16] = False
    ink[2, 4:9, 4:20] = ink[2, 9:20, 10:15] = True  # a T
    line = glyphs.thin(ink)
    assert not (line & ~ink).any()
    assert [components(each) for each in line] == [1, 1, 1]
    block = line[:, 1:, 1:] & line[:, :-1, 1:] & line[:, 1:, :-1] & line[:, :-1, :-1]
    assert not block.any()
    assert line.sum() < ink.sum() / 4
    # The ring keeps its hole: a line closed by 8-neighbours parts the plane for 4-neighbours.
    assert components(~line[1], diagonals=False) == 2


def test_every_class_has_shapes_in_every_font():
    for font in (*glyphs.TRAINING_FONTS, *glyphs.HELD_OUT_FONTS):
        classes = glyphs.load_shapes((font,)).classes
        assert set(classes.tolist()) == set(range(len(glyphs.CLASSES))), font
    assert not set(glyphs.TRAINING_FONTS) & set(glyphs.HELD_OUT_FONTS)


def test_drawing_is_seeded(shapes):
    indices = torch.arange(40)
    one = glyphs.draw(shapes, indices, generator(3))
    assert torch.equal(one, glyphs.draw(shapes, indices, generator(3)))
    assert not torch.equal(one, glyphs.draw(shapes, indices, generator(4)))


def test_drawings_fill_their_box(shapes):
    bitmaps = glyphs.draw(shapes, torch.arange(len(shapes.classes)), generator(0))
    assert bitmaps.shape[1:] == (32, 32)
    rows, columns = bitmaps.any(dim=2), bitmaps.any(dim=1)

    def fills(lines):  # the box was measured on a coarser raster: allow a point at either edge
        return lines[:, :2].any(dim=1) & lines[:, -2:].any(dim=1)

    assert (fills(rows) | fills(columns)).all()
    ink = bitmaps.double().mean(dim=(1, 2))
    assert (ink > 0.02).all()
    assert (ink < 0.9).all()


def test_scan_is_the_counting_that_digits_do(shapes):
    bitmaps = glyphs.draw(shapes, torch.arange(6), generator(0))
    grey = bitmaps.view(6, 8, 4, 8, 4).double().sum(dim=(2, 4)) / 16
    pictures = glyphs.scan(bitmaps)
    assert pictures.shape == (6, 3, 32, 32)
    assert pictures.dtype == torch.float32
    # Bicubic enlargement keeps the mean but for what rounding and clamping do at edges.
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    restored = (pictures * std[:, None, None] + mean[:, None, None]).mean(dim=(1, 2, 3))
    torch.testing.assert_close(restored.double(), grey.mean(dim=(1, 2)), rtol=0, atol=0.05)


def test_captions_say_what_is_drawn():
    classes = list(range(len(glyphs.CLASSES))) * 20
    texts = glyphs.captions(classes, generator(0))
    assert set(texts) <= set(glyphs.all_captions())
    assert digits.TEMPLATE.format("seven") in glyphs.all_captions()
    assert not any(each in glyphs.DIGIT_TEMPLATES for each in glyphs.HELD_OUT_TEMPLATES)
    for index, text in zip(classes, texts, strict=True):
        words = text.rstrip(".").split()
        assert words[-1] in (glyphs.CLASSES[index], str(index))
        assert ("letter" in words) <= (index >= 10)
        assert ("digit" in words or "number" in words) <= (index < 10)


def test_no_group_holds_two_captions_of_a_class():
    config = pretrain.PretrainConfig(groups=5, letters=7)
    classes = pretrain.draw_classes(config, generator(0))
    assert classes.shape == (5, 17)
    for group in classes.tolist():
        assert len(set(group)) == 17
        assert set(range(10)) <= set(group)
        assert max(group) < len(glyphs.CLASSES)


def test_seen_tokens_cover_captions_and_held_out_phrasings():
    seen = pretrain.seen_token_ids()
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    assert {tokenizer.sot_token_id, tokenizer.eot_token_id} <= seen
    for template in glyphs.HELD_OUT_TEMPLATES:
        assert set(tokenizer.encode(template.format("seven"))) <= seen
    assert len(seen) < 200


def test_trimmed_text_is_open_clips_text():
    model = tiny.load_tiny().double()
    texts = open_clip.tokenizer.SimpleTokenizer()(["three", "a photo of the digit seven."])
    with torch.no_grad():
        trimmed = pretrain.encode_text(model, texts)
        whole = model.encode_text(texts, normalize=True)
    torch.testing.assert_close(trimmed, whole, rtol=0, atol=1e-12)


def test_rate_warms_up_and_ends_near_zero():
    config = pretrain.PretrainConfig(steps=100, warmup=10)
    rates = [pretrain.rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_a_short_run_learns_and_repeats(tmp_path, capsys):
    config = pretrain.PretrainConfig(
        out=tmp_path / "new",
        steps=20,
        warmup=5,
        groups=1,
        letters=2,
        evaluate_every=20,
        held_out=1,
        threads=1,
    )
    threads = torch.get_num_threads()
    try:
        pretrain.main(config)
        again, losses = pretrain.pretrain(config)
    finally:
        torch.set_num_threads(threads)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    stored = tiny.load_tiny(tmp_path / "new").state_dict()
    for name, value in again.state_dict().items():
        if name != "token_embedding.weight":
            assert torch.equal(stored[name], value.half().float()), name
    assert "held-out accuracy" in capsys.readouterr().out
    with pytest.raises(InputError, match="--overwrite"):
        pretrain.main(config)


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "weights"
    file.write_text("mine")
    with pytest.raises(InputError, match="a file, expected a folder"):
        pretrain.main(pretrain.PretrainConfig(out=file, overwrite=True))
    assert file.read_text() == "mine"


def test_the_carried_weights_are_not_replaced_by_default():
    with pytest.raises(InputError, match=r"tiny_clip: expected .*--overwrite"):
        pretrain.main(pretrain.PretrainConfig())


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("steps", 0),
        ("groups", 0),
        ("threads", 0),
        ("evaluate_every", 0),
        ("held_out", 0),
        ("letters", 26),
        ("letters", -1),
        ("warmup", 1500),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("weight_decay", -0.1),
        ("seed", -1),
        ("seed", 2**40),
        ("steps", 10**9),
        ("groups", 10**9),
        ("threads", 1_000_000),
        ("evaluate_every", 10**9),
        ("held_out", 10**9),
        ("warmup", 10**9),
        ("lr", 1e300),
        ("weight_decay", float("inf")),
    ],
)
def test_bad_values_are_named(flag, value):
    wanted = re.escape(f"--{flag.replace('_', '-')} {value}: expected")
    with pytest.raises(InputError, match=f"^{wanted}"):
        pretrain.main(pretrain.PretrainConfig(**{flag: value}))


def test_the_carried_clip_reads_held_out_glyphs():
    scores = pretrain.score(tiny.load_tiny(), pretrain.held_out(per_class=20))
    # Chance is 0.1 for digits and 0.04 for letters.
    assert scores["digits"] > 0.8
    assert scores["bare"] > 0.8
    assert scores["phrases"] > 0.7
    assert scores["letters"] > 0.6
