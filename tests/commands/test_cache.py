"""What ``lamp_fast.cache`` lists and removes, in a made-up home."""

import json

import pytest
import torch
from huggingface_hub import scan_cache_dir

from lamp_fast import cache
from lamp_fast.data.decoded import DecodedCache

CONFIGS = {
    "models--timm--vit_base_patch16_clip_224.openai": "{}",
    "models--someone--birds": json.dumps(
        {
            "version": "0.1.0",
            "settings": {"method": "lamp"},
            "clip": {"fingerprint": "0"},
            "data": {"sha256": "0"},
        }
    ),
    "models--someone--novel": '{"model_type": "gpt2"}',
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A hub cache with weights, a classifier and a stranger, and open_clip's own folder."""
    hub = tmp_path / "hub"
    for name, file, size in (
        ("models--timm--vit_base_patch16_clip_224.openai", "open_clip_model.safetensors", 300),
        ("models--someone--birds", "model.safetensors", 20),
        ("models--someone--novel", "model.safetensors", 5000),
    ):
        snapshot = hub / name / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / file).write_bytes(b"x" * size)
        (snapshot / "config.json").write_text(CONFIGS[name])
        (hub / name / "refs").mkdir()
        (hub / name / "refs" / "main").write_text("0" * 40)
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "ViT-B-16.pt").write_bytes(b"x" * 7)
    (folder / "diary.txt").write_text("mine")
    monkeypatch.setattr(cache, "scan_cache_dir", lambda: scan_cache_dir(hub))
    monkeypatch.setattr(cache, "OPEN_CLIP_FOLDER", folder)
    monkeypatch.setenv("LAMP_FAST_CACHE", str(tmp_path / "own"))
    return tmp_path


def files(folder):
    return {each.name for each in folder.rglob("*") if each.is_file()}


def test_it_lists_what_we_had_downloaded_and_nothing_else(home, capsys):
    before = files(home)
    assert cache.main(cache.CacheConfig()) == 0
    shown = capsys.readouterr().out
    kept = {each.name: (each.what, each.size) for each in cache.find_stored()}
    assert kept == {
        "timm/vit_base_patch16_clip_224.openai": ("CLIP weights", 302),
        "someone/birds": ("classifier", 20 + len(CONFIGS["models--someone--birds"])),
        "ViT-B-16.pt": ("CLIP weights", 7),
    }
    assert all(name in shown for name in kept)
    assert "novel" not in shown
    assert files(home) == before


def test_clear_with_yes_leaves_the_rest(home, capsys):
    assert cache.main(cache.CacheConfig(clear=True, yes=True)) == 0
    assert "Removed 3." in capsys.readouterr().out
    assert files(home) == {"main", "config.json", "model.safetensors", "diary.txt"}
    assert cache.main(cache.CacheConfig()) == 0
    assert "keeps nothing" in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "left"), [("n", 3), ("", 3), ("y", 0)])
def test_clear_asks(home, monkeypatch, answer, left):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    assert cache.main(cache.CacheConfig(clear=True)) == 0
    assert len(cache.find_stored()) == left


def test_decoded_pictures_are_listed_and_cleared(home, capsys):
    kept = DecodedCache(home / "own", limit=10**6)
    kept.write(b"digest", torch.zeros(10, 10, 3, dtype=torch.uint8))
    assert cache.main(cache.CacheConfig()) == 0
    assert "decoded pictures" in capsys.readouterr().out
    assert cache.main(cache.CacheConfig(clear=True, yes=True)) == 0
    assert not (home / "own" / "decoded").exists()
    # A run that goes on meanwhile decodes again and keeps again.
    assert kept.read(b"digest") is None
    kept.write(b"digest", torch.zeros(10, 10, 3, dtype=torch.uint8))
    assert kept.read(b"digest") is not None


def test_a_folder_called_decoded_that_is_not_ours_stays(home, capsys):
    mine = home / "own" / "decoded" / "film.mkv"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    assert cache.main(cache.CacheConfig(clear=True, yes=True)) == 0
    assert "Removed 3." in capsys.readouterr().out
    assert mine.read_text() == "precious"


def test_no_cache_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAMP_FAST_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setattr(cache, "scan_cache_dir", lambda: scan_cache_dir(tmp_path / "none"))
    monkeypatch.setattr(cache, "OPEN_CLIP_FOLDER", tmp_path / "nor-this")
    assert cache.main(cache.CacheConfig()) == 0
    assert "keeps nothing" in capsys.readouterr().out
