"""Features on disk: the same bits, shared, bounded, mended, and never another kind's."""

import hashlib
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lamp_fast.data import disk_cache
from lamp_fast.data.feature_cache import FeatureCache

LIMIT = 10**7


def digests(*words):
    each = [hashlib.sha256(str(word).encode()).digest() for word in words]
    return np.frombuffer(b"".join(each), dtype=np.uint8).reshape(len(each), 32)


def features(*numbers, width=5):
    return torch.stack(
        [torch.randn(width, generator=torch.Generator().manual_seed(n)) for n in numbers]
    )


def shards(cache):
    return sorted(each for each in cache.folder.glob("??/*") if each.is_file())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_what_was_written_is_read_to_the_bit_in_any_order(tmp_path, dtype, shape):
    cache = FeatureCache(tmp_path, LIMIT)
    written = torch.randn(4, *shape).to(dtype)
    cache.write("k", digests(*"abcd"), written)
    known, read = FeatureCache(tmp_path, LIMIT).read("k", digests(*"cxab"))
    assert known.tolist() == [True, False, True, True]
    assert read.dtype == dtype
    assert torch.equal(read[[0, 2, 3]], written[[2, 0, 1]])


def test_digests_that_end_in_zeros_are_themselves(tmp_path):
    cache = FeatureCache(tmp_path, LIMIT)
    keys = np.zeros((3, 32), dtype=np.uint8)
    keys[1, 0] = keys[2, 0] = 7
    keys[2, 31] = 1
    cache.write("k", keys, features(0, 1, 2))
    known, read = cache.read("k", keys[::-1])
    assert known.all()
    assert torch.equal(read, features(2, 1, 0))


def test_several_shards_are_one_cache(tmp_path):
    cache = FeatureCache(tmp_path, LIMIT)
    cache.write("k", digests("a", "b"), features(1, 2))
    cache.write("k", digests("c"), features(3))
    known, read = cache.read("k", digests("b", "c", "a", "b"))
    assert known.all()
    assert torch.equal(read, features(2, 3, 1, 2))
    assert len(shards(cache)) == 2


def test_another_kind_meets_nothing(tmp_path):
    cache = FeatureCache(tmp_path, LIMIT)
    cache.write("k", digests("a"), features(1))
    known, read = cache.read("another", digests("a"))
    assert not known.any()
    assert read is None


def test_of_two_writers_every_reader_gets_the_same(tmp_path):
    """Rounding may differ between machines; what counts is that all go on with the same."""
    first, second = FeatureCache(tmp_path, LIMIT), FeatureCache(tmp_path, LIMIT)
    first.write("k", digests("a"), features(1))
    second.write("k", digests("a", "b"), features(2, 3))
    got = [FeatureCache(tmp_path, LIMIT).read("k", digests("a"))[1] for _ in range(3)]
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], first.read("k", digests("b", "a"))[1][1:])


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "moved"])
def test_damage_is_found_and_goes(tmp_path, damage):
    cache = FeatureCache(tmp_path, LIMIT)
    cache.write("k", digests("a", "b"), features(1, 2))
    cache.write("k", digests("c"), features(3))
    file = next(
        each
        for each in shards(cache)
        if each.stat().st_size == max(other.stat().st_size for other in shards(cache))
    )
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-3] ^= 16
    elif damage == "moved":
        content = next(each for each in shards(cache) if each != file).read_bytes()
    file.write_bytes({"truncate": content[:-9], "empty": b""}.get(damage, content))
    known, read = cache.read("k", digests("a", "b", "c"))
    assert known.tolist() == [False, False, True]
    assert torch.equal(read[2:], features(3))
    assert not file.exists()
    cache.write("k", digests("a", "b"), features(1, 2))
    assert cache.read("k", digests("a", "b"))[0].all()


def test_what_finds_no_room_is_not_kept_and_nothing_fails(tmp_path):
    cache = FeatureCache(tmp_path, 4096)
    cache.write("k", digests("a"), features(1))
    cache.write("k", digests("b"), features(2))
    known, _ = cache.read("k", digests("a", "b"))
    assert known.tolist() == [True, False]


def test_the_least_recently_used_go_first(tmp_path):
    old = FeatureCache(tmp_path, LIMIT)
    old.write("k", digests("a"), features(1))
    old.write("k", digests("b"), features(2))
    for file in shards(old):
        os.utime(file, (1, 1))
    used = FeatureCache(tmp_path, 3 * 4096)
    assert used.read("k", digests("a"))[0].all()
    later = FeatureCache(tmp_path, 2 * 4096)
    later.write("k", digests("c"), features(3))
    assert later.read("k", digests("c"))[0].all()
    assert not later.read("k", digests("b"))[0].any()


def test_it_is_cleared_with_what_it_wrote_alone(tmp_path):
    cache = FeatureCache(tmp_path, LIMIT)
    cache.write("k", digests("a"), features(1))
    (cache.folder / "mine.txt").write_text("mine")
    disk_cache.clear(cache.folder)
    assert [each.name for each in cache.folder.iterdir()] == ["mine.txt"]


def _write_some(folder: Path, number: int) -> None:
    cache = FeatureCache(folder, LIMIT)
    for turn in range(20):
        cache.write("k", digests(turn, turn + 1), features(turn, turn + 1))
        known, read = cache.read("k", digests(*range(turn + 1)))
        assert known.all()
        assert torch.equal(read, features(*range(turn + 1)))


def test_processes_share_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_some, args=(tmp_path, n)) for n in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
        assert each.exitcode == 0
