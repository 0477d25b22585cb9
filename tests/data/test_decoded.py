"""The cache of decoded pictures: the same bits, bounded, whole under concurrency, mended."""

import errno
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lamp_fast import train
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.data import decoded, disk_cache
from lamp_fast.data.decoded import DecodedCache
from lamp_fast.data.pictures import Pictures, check_pictures, decode
from lamp_fast.data.settings import DataConfig
from lamp_fast.files import read_json
from lamp_fast.runs.config import TrainConfig, apply_preset
from lamp_fast.runs.folder import CONFIG, LEARNED
from lamp_fast.tensors import load_tensors

LIMIT = 10**7


def write_pictures(folder: Path, count: int = 6) -> Pictures:
    """JPEGs and PNGs of odd sizes, one grey, one with transparency; checked."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    names = []
    for number in range(count):
        height, width = 11 + 7 * number, 50 - 5 * number
        pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
        image = {0: Image.fromarray(pixels[..., 0]), 1: Image.fromarray(pixels)}.get(
            number, Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
        )
        names.append(f"{number}.{'png' if number < 2 else 'jpg'}")
        image.save(folder / names[-1])
    return check_pictures(Pictures(names, [0] * count, root=folder), progress=False)[0]


def entries(cache: DecodedCache) -> list[Path]:
    return [each for each in cache.folder.glob("??/*") if each.is_file()]


def picture(value: int, side: int = 10) -> torch.Tensor:
    return torch.full((side, side, 3), value, dtype=torch.uint8)


def test_the_same_bits_and_layout_with_and_without(tmp_path, monkeypatch):
    plain = write_pictures(tmp_path / "data")
    kept = replace(plain, cache=DecodedCache(tmp_path, LIMIT))
    for _ in range(2):
        for index in range(len(plain)):
            expected, got = plain.load(index), kept.load(index)
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()
    # From now on without a look at the files.
    monkeypatch.setattr(Pictures, "content", None)
    assert all(kept.load(index) is not None for index in range(len(plain)))
    assert kept.select([3]).load(0).shape == (3, 32, 35)


def test_a_changed_file_is_decoded_anew(tmp_path):
    pictures = write_pictures(tmp_path / "data")
    cached = replace(pictures, cache=DecodedCache(tmp_path, LIMIT))
    before = cached.load(2)
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / "data" / "2.jpg")
    assert torch.equal(cached.load(2), before)  # a run reads what it has checked
    anew = check_pictures(replace(pictures, digests=None), progress=False)[0]
    assert replace(anew, cache=cached.cache).load(2).shape == (3, 5, 6)


def test_a_file_that_changed_since_it_was_checked_is_kept_under_its_own_content(tmp_path):
    pictures = write_pictures(tmp_path / "data")
    cache = DecodedCache(tmp_path, LIMIT)
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / "data" / "2.jpg")
    replace(pictures, cache=cache).load(2)
    assert cache.read(pictures.digests[2].tobytes()) is None


def test_another_decoder_meets_no_old_entry(tmp_path, monkeypatch):
    cache = DecodedCache(tmp_path, LIMIT)
    cache.write(b"a", picture(1))
    monkeypatch.setattr(decoded, "DECODER", b"a later PIL")
    assert cache.read(b"a") is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other"])
def test_damage_is_found_and_mended(tmp_path, damage):
    plain = write_pictures(tmp_path / "data")
    cache = DecodedCache(tmp_path, LIMIT)
    pictures = replace(plain, cache=cache)
    pictures.load(3)
    (file,) = entries(cache)
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(
        {"flip": content, "truncate": content[:-9], "empty": b"", "other": b"{" * 99}[damage]
    )
    assert cache.read(plain.digests[3].tobytes()) is None
    assert torch.equal(pictures.load(3), plain.load(3))
    assert cache.read(plain.digests[3].tobytes()) is not None


@pytest.mark.parametrize("downscale", [None, 16])
def test_an_entry_moved_over_another_is_refused(tmp_path, downscale):
    """Of the same shape, so that nothing but the name tells them apart."""
    cache = DecodedCache(tmp_path, LIMIT)
    cache.write(b"a", picture(1), downscale)
    cache.write(b"b", picture(2))
    os.replace(cache._file(b"a", downscale), cache._file(b"b", None))
    assert cache.read(b"b") is None
    cache.write(b"b", picture(2))
    assert torch.equal(cache.read(b"b"), picture(2))


def test_turned_pixels_are_refused(tmp_path):
    """The shape stands in the header, where the pixels' own checksum does not reach."""
    cache = DecodedCache(tmp_path, LIMIT)
    cache.write(b"a", torch.zeros(10, 20, 3, dtype=torch.uint8))
    (file,) = entries(cache)
    content = file.read_bytes()
    assert content.count(b"[10,20,3]") == 1
    file.write_bytes(content.replace(b"[10,20,3]", b"[20,10,3]"))
    assert cache.read(b"a") is None


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_what_is_written_follows_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        cache = DecodedCache(tmp_path, LIMIT)
        cache.write(b"a", picture(1))
    finally:
        os.umask(before)
    for path in cache.folder.rglob("*"):
        everyone = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == everyone & ~mask, path


def test_a_folder_of_somebody_else_is_neither_filled_nor_emptied(tmp_path, capsys):
    mine = tmp_path / "decoded" / "ab" / ("ab" * 32)
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    cache = DecodedCache(tmp_path, 0)
    cache.opened = time.time() + 60
    cache.write(b"a", picture(1))
    cache._entries()
    disk_cache.clear(cache.folder)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds other files" in line


@pytest.mark.parametrize("marked", [True, False])
def test_eviction_and_clearing_leave_what_the_cache_did_not_write(tmp_path, marked):
    """Unmarked, the folder is as version 0.1.0 left it."""
    cache = DecodedCache(tmp_path, LIMIT)
    cache.write(b"a", picture(1))
    (entry,) = entries(cache)
    assert (cache.folder / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d1727")
    if not marked:
        (cache.folder / "CACHEDIR.TAG").unlink()
    mine = [entry.parent / "notes.txt", entry.parent / entry.name[:63]]
    for path in mine:
        path.write_text("precious")
    os.utime(entry, (0, 0))
    assert DecodedCache(tmp_path, 0).size() == 0
    assert not entry.exists()
    disk_cache.clear(cache.folder)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(mine)


def test_what_is_read_may_be_written_to_without_changing_the_entry(tmp_path):
    cache = DecodedCache(tmp_path, LIMIT)
    cache.write(b"a", picture(1))
    cache.read(b"a").fill_(9)
    assert torch.equal(cache.read(b"a"), picture(1))


def test_the_least_recently_used_make_room(tmp_path):
    """Room for four entries of one disk block; a later run uses the oldest and offers a fifth."""
    first = DecodedCache(tmp_path, 4 * 4096)
    for value in range(4):
        first.write(b"%d" % value, picture(value))
        os.utime(first._file(b"%d" % value, None), (value, value))
    later = DecodedCache(tmp_path, 4 * 4096)
    assert torch.equal(later.read(b"0"), picture(0))  # now the last one used
    later.write(b"4", picture(4))
    assert later.size() <= 4 * 4096
    held = [value for value in range(5) if later.read(b"%d" % value) is not None]
    assert held == [0, 2, 3, 4]


def test_a_run_does_not_evict_what_it_uses_itself(tmp_path, monkeypatch):
    cache = DecodedCache(tmp_path, 3 * 4096)
    cache.opened -= 60
    for value in range(5):
        cache.write(b"%d" % value, picture(value))
    assert [cache.read(b"%d" % value) is not None for value in range(5)] == [True] * 3 + [False] * 2
    monkeypatch.setattr(cache, "_reserve", None)  # full: not looked at again
    cache.write(b"5", picture(5))


def test_a_smaller_bound_is_kept_from_the_start(tmp_path):
    cache = DecodedCache(tmp_path, LIMIT)
    for value in range(8):
        cache.write(b"%d" % value, picture(value))
        os.utime(cache._file(b"%d" % value, None), (value, value))
    assert DecodedCache(tmp_path, 3 * 4096).size() == 3 * 4096


def test_half_of_the_free_disk_at_most(tmp_path, monkeypatch):
    usage = disk_cache.shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(disk_cache.shutil, "disk_usage", lambda _: usage)
    assert DecodedCache(tmp_path, LIMIT).limit == 10_000


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_costs_one_line(tmp_path, monkeypatch, capsys, code):
    plain = write_pictures(tmp_path / "data")
    cache = DecodedCache(tmp_path, LIMIT)

    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(disk_cache.os, "replace", full)
    pictures = replace(plain, cache=cache)
    for index in range(len(plain)):
        assert torch.equal(pictures.load(index), plain.load(index))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert os.strerror(code) in line
    assert not entries(cache)


def test_a_folder_that_cannot_be_made_costs_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cache = DecodedCache(tmp_path / "file", LIMIT)
    cache.write(b"a", picture(1))
    assert cache.read(b"a") is None
    assert len(capsys.readouterr().err.splitlines()) == 1


def _fill(folder: Path, limit: int, start: int) -> None:
    cache = DecodedCache(folder, limit)
    cache.opened = time.time() + 60  # everything may go: the worst case for the others
    for step in range(60):
        value = (start + step) % 40
        kept = cache.read(b"%d" % value)
        assert kept is None or torch.equal(kept, picture(value, 20)), value
        cache.write(b"%d" % value, picture(value, 20))


def test_concurrent_runs_read_whole_pictures_within_the_bound(tmp_path):
    context = multiprocessing.get_context("fork")
    limit = 16 * 4096
    processes = [
        context.Process(target=_fill, args=(tmp_path, limit, start)) for start in (0, 7, 20)
    ]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    assert [each.exitcode for each in processes] == [0] * 3
    cache = DecodedCache(tmp_path, limit)
    assert 0 < cache.size() <= limit
    assert not list(cache.folder.glob("??/*.partial"))


def test_what_a_dead_process_left_is_removed(tmp_path):
    cache = DecodedCache(tmp_path, LIMIT)
    cache.write(b"a", picture(1))
    left = entries(cache)[0].with_name("tmp0a_b1c2d.partial")
    left.write_bytes(b"x" * 9999)
    os.utime(left, (0, 0))
    assert cache.size() == 4096
    assert not left.exists()


def test_downscale_has_entries_of_its_own(tmp_path):
    plain = write_pictures(tmp_path / "data")
    cache = DecodedCache(tmp_path, LIMIT)
    whole, small = replace(plain, cache=cache), replace(plain, cache=cache, downscale=16)
    for _ in range(2):
        assert whole.load(3).shape == (3, 32, 35)
        assert small.load(3).shape == (3, 16, 18)  # 35 / 2 to even, as Python rounds
        assert small.load(0).shape == whole.load(0).shape == (3, 11, 50)
        expected = decode((tmp_path / "data" / "3.jpg").read_bytes()).resize(
            (18, 16), Image.Resampling.BICUBIC
        )
        assert np.array_equal(small.load(3).permute(1, 2, 0).numpy(), np.asarray(expected))


def test_training_gives_the_same_bits_and_records_a_downscale(tmp_path, monkeypatch):
    monkeypatch.setenv(disk_cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        for number in range(8):
            folder = tmp_path / "data" / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(level - 60, level + 60, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
    weights = []
    for number, (size, downscale) in enumerate(((0, None), (1, None), (1, None), (1, 32), (0, 32))):
        config = apply_preset(TrainConfig(out=tmp_path / str(number)), "tiny")
        config = replace(
            config,
            clip=ClipConfig("tiny"),
            data=DataConfig(data="folder", root=tmp_path / "data", downscale=downscale),
            optim=replace(config.optim, epochs=2, batch=4, warmup_epochs=0),
            machine=replace(config.machine, cache_size=size, threads=1),
        )
        assert train.main(config) == 0
        tensors = load_tensors(config.out / LEARNED)[0]
        weights.append(torch.cat([each.double().flatten() for each in tensors.values()]))
        record = read_json(config.out / CONFIG)
        assert record["settings"]["data"]["downscale"] == downscale
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(weights[3], weights[4])
    assert not torch.equal(weights[0], weights[3])
    # Two sizes of 16 pictures: an epoch is kept by the validation part, so that is read, too.
    assert len(list((tmp_path / "cache" / "decoded").glob("??/*"))) == 2 * 16
