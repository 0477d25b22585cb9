"""The carried CLIP: what is stored, what is redrawn, what a user is told."""

import json
import warnings

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from lamp_fast.clip import tiny

SMALL = {
    "embed_dim": 8,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 1, "width": 16, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "layers": 1, "width": 16, "heads": 2},
}


def build_small():
    torch.manual_seed(0)
    model = tiny.build_tiny(SMALL)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return model


def test_round_trip(tmp_path):
    model = build_small()
    seen = [5, 49407, 320]
    tiny.save_tiny(model, SMALL, seen, tmp_path)
    loaded = tiny.load_tiny(tmp_path)
    assert not loaded.training
    expected, got = model.state_dict(), loaded.state_dict()
    assert got.keys() == expected.keys()
    table, expected_table = (
        got.pop("token_embedding.weight"),
        expected.pop("token_embedding.weight"),
    )
    for name, value in expected.items():
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name], value.half().float(), rtol=0, atol=0)
    assert torch.equal(table[seen], expected_table[seen].half().float())
    others = torch.ones(len(table), dtype=torch.bool)
    others[seen] = False
    assert torch.equal(table[others], tiny.untrained_token_rows(*table.shape)[others])


def test_redrawn_rows_do_not_depend_on_the_stored_ones(tmp_path):
    model = build_small()
    tiny.save_tiny(model, SMALL, [1, 2], tmp_path / "few")
    tiny.save_tiny(model, SMALL, range(1, 1000), tmp_path / "many")
    few = tiny.load_tiny(tmp_path / "few").token_embedding.weight
    many = tiny.load_tiny(tmp_path / "many").token_embedding.weight
    assert torch.equal(few[1000:], many[1000:])
    assert not torch.equal(few[3:1000], many[3:1000])


def test_untrained_rows_are_a_normal_of_the_stated_scale():
    rows = tiny.untrained_token_rows(4096, 64)
    assert torch.equal(rows[:100], tiny.untrained_token_rows(100, 64))
    # 262,144 values: the mean's standard error is std/512, the standard deviation's std/724.
    assert abs(rows.mean()) < 5 * tiny.TOKEN_STD / 512
    assert abs(rows.std() / tiny.TOKEN_STD - 1) < 5 / 724
    # A sum of four uniforms has 66.93 % within one standard deviation (a normal 68.27 %).
    within = (rows.abs() < tiny.TOKEN_STD).double().mean().item()
    assert within == pytest.approx(0.6693, abs=5 * (0.6693 * 0.3307 / 2**18) ** 0.5)
    distinct = torch.corrcoef(rows[:200]) - torch.eye(200)
    assert distinct.abs().max() < 5 / 64**0.5


def test_loading_leaves_the_random_stream_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    tiny.load_tiny()
    assert torch.equal(torch.rand(3), expected)


def test_loading_twice_gives_the_same_bits():
    one, other = tiny.load_tiny().state_dict(), tiny.load_tiny().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_carried_files():
    folder = tiny.carried_folder()
    files = {file.name: len(file.read_bytes()) for file in folder.iterdir()}
    assert files.keys() == {"config.json", "weights.safetensors"}
    assert sum(files.values()) <= 4_000_000
    config = json.loads((folder / "config.json").read_text())
    model = tiny.load_tiny()
    assert isinstance(model, open_clip.CLIP)
    assert len(model.visual.transformer.resblocks) == config["vision_cfg"]["layers"] == 6
    assert len(model.transformer.resblocks) == config["text_cfg"]["layers"] == 6
    stored = load_file(str(folder / "weights.safetensors"))
    floating = {name: value for name, value in stored.items() if value.is_floating_point()}
    assert {value.dtype for value in floating.values()} == {torch.float16}
    assert all(value.isfinite().all() for value in floating.values())
    assert model.logit_scale.exp() <= 100.1  # float16 rounds ln 100 by up to 2e-3


def test_unseen_tokens_warn_once(monkeypatch):
    monkeypatch.setattr(tiny, "_warned", False)
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.warn_unseen_tokens(tokenizer(["a photo of the digit seven.", "a photo of a 3."]))
    with pytest.warns(UserWarning, match="^2 tokens of these texts were never seen"):
        tiny.warn_unseen_tokens(tokenizer(["a photo of a helicopter.", "a photo of a zebra."]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.warn_unseen_tokens(tokenizer(["an accordion"]))


def test_every_class_name_has_its_own_text_feature():
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    texts = tokenizer(
        ["a photo of a helicopter.", "a photo of a zebra.", "a photo of an accordion."]
    )
    with torch.no_grad():
        features = tiny.load_tiny().encode_text(texts, normalize=True)
    cosine = features @ features.T
    assert (cosine[~torch.eye(3, dtype=torch.bool)] < 0.999).all()
