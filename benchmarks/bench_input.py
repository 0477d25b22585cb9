"""Pictures a second that one process loads, with and without the cache of decoded pictures.

``LAMP_FAST_BENCH_PICTURES=DIR pytest benchmarks/bench_input.py --benchmark-only`` takes up to 512
picture files below DIR; without it, JPEGs of 500 x 375 that it draws. All ways are interleaved, a
hundred pictures each; medians, by this process's CPU time on one thread, which other programs
disturb least. "packed" is the host's part where the device transforms. Entries of the cache were
used before, so they are in memory if the machine has it to spare.
"""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.measuring.timing import (
    device_seconds,
    interleave,
    process_seconds,
    this_device,
    threads,
)
from lamp_fast.data.decoded import DecodedCache
from lamp_fast.data.loading import PictureDataset
from lamp_fast.data.pictures import EXTENSIONS, Pictures, check_pictures
from lamp_fast.data.resample import PackTransform, join, resample
from lamp_fast.data.transforms import Preprocessing, RandomCrop, training_transform

MOST = 512
ROUNDS, EACH = 9, 100
UNIT = "pictures/s"
PREPROCESSING = Preprocessing(size=224)
FOLDER = os.environ.get("LAMP_FAST_BENCH_PICTURES")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = Path(FOLDER) if FOLDER else draw_pictures(tmp_path_factory.mktemp("pictures"))
    names = sorted(
        str(each.relative_to(folder))
        for each in folder.rglob("*")
        if each.suffix.lower() in EXTENSIONS
    )
    names = names[:: max(1, len(names) // MOST)][:MOST]
    return check_pictures(Pictures(names, [0] * len(names), root=folder))[0]


def draw_pictures(folder, count=64):
    """Smooth noise with some grain, about as hard to decode as a photograph."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += rng.integers(-6, 7, pixels.shape, dtype=np.int16)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number}.jpg", quality=85)
    return folder


def bench_input(benchmark, pictures, tmp_path, closing):
    cached = replace(pictures, cache=DecodedCache(tmp_path, 2**40))
    for index in range(len(cached)):
        cached.load(index)
    ways = {}

    def add_way(what, where, load):
        indices = itertools.cycle(range(len(pictures)))
        ways[what, where] = lambda: [load(next(indices)) for _ in range(EACH)]

    transforms = {
        "transformed on the host": training_transform(PREPROCESSING),
        "packed": PackTransform(PREPROCESSING, RandomCrop()),
    }
    for where, some in (("files", pictures), ("cache", cached)):
        add_way("decoded alone", where, some.load)
        for what, transform in transforms.items():
            dataset = PictureDataset(some, transform, seed=0)
            add_way(what, where, lambda index, dataset=dataset: dataset[0, index])
    with threads(1):
        options = {"clock": process_seconds}
        times = benchmark.pedantic(interleave, (ways, ROUNDS), options, rounds=1)
        rates = {way: EACH / time.median for way, time in times.items()}
        for what in ("decoded alone", *transforms):
            files, cache = rates[what, "files"], rates[what, "cache"]
            beside = f"from files {files:,.0f} ({cache / files:.2f}x)"
            closing.add(f"{what}, from the cache, one process", cache, UNIT, beside=beside)
            benchmark.extra_info[what] = [files, cache]


def bench_device_transform(benchmark, pictures, closing):
    """The device's part, of a batch of 128: on a GPU where there is one."""
    device = this_device()
    transform = PackTransform(PREPROCESSING, RandomCrop())
    torch.manual_seed(0)
    count = min(128, len(pictures))
    batch = join([transform(pictures.load(index)) for index in range(count)])
    if device.type == "cuda":
        batch = batch._replace(pixels=batch.pixels.pin_memory(), views=batch.views.pin_memory())

    def transformed():
        return resample(batch, device, torch.float32)

    options = {"clock": device_seconds(device)}
    times = benchmark.pedantic(interleave, ({"device": transformed}, 5), options, rounds=1)
    what = f"the device's part of packed, batch {count}"
    closing.add(what, count / times["device"].median, UNIT, device=device)
