"""Pictures a second that one process loads, with and without the cache of decoded pictures.

``LAMP_FAST_BENCH_PICTURES=DIR pytest benchmarks/bench_input.py --benchmark-only`` takes up to 512
picture files below DIR; without it, JPEGs of 500 x 375 that it draws. All ways are interleaved, a
quarter of a second each; medians, by this process's CPU time, which other programs disturb least.
"packed" is the host's part where the device transforms. Entries of the cache were used before, so
they are in memory if the machine has it to spare.
"""

import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lamp_fast.data import DecodedCache, Pictures
from lamp_fast.data.loading import PictureDataset
from lamp_fast.data.pictures import EXTENSIONS, check_pictures
from lamp_fast.data.resample import PackTransform, join, resample
from lamp_fast.data.transforms import Preprocessing, training_transform

MOST = 512
ROUNDS, SECONDS = 9, 0.25
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


def bench_input(benchmark, pictures, tmp_path, tables):
    torch.set_num_threads(1)
    cached = replace(pictures, cache=DecodedCache(tmp_path, 2**40))
    for index in range(len(cached)):
        cached.load(index)
    host, device = (
        training_transform(PREPROCESSING),
        PackTransform(PREPROCESSING, random=True),
    )
    ways = {
        ("decoded alone", "files"): pictures.load,
        ("decoded alone", "cache"): cached.load,
    }
    for what, transform in (("transformed on the host", host), ("packed", device)):
        for where, some in (("files", pictures), ("cache", cached)):
            dataset = PictureDataset(some, transform, seed=0)
            ways[what, where] = lambda index, dataset=dataset: dataset[0, index]
    rates = {way: [] for way in ways}
    at = 0

    def one_round():
        nonlocal at
        for way, load in ways.items():
            done, started = 0, time.process_time()
            while (taken := time.process_time() - started) < SECONDS:
                load((at + done) % len(pictures))
                done += 1
            rates[way].append(done / taken)
        at += MOST // ROUNDS

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    medians = {way: statistics.median(values[1:]) for way, values in rates.items()}
    for what in dict.fromkeys(what for what, _ in ways):
        files, cache = medians[what, "files"], medians[what, "cache"]
        tables["input"].append([what, f"{files:,.0f}", f"{cache:,.0f}", f"{cache / files:.2f}"])
        benchmark.extra_info[what] = [files, cache]


def bench_device_transform(benchmark, pictures, tables):
    """The device's part, of a batch of 128: on a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = PackTransform(PREPROCESSING, random=True)
    torch.manual_seed(0)
    count = min(128, len(pictures))
    batch = join([transform(pictures.load(index)) for index in range(count)])
    if device.type == "cuda":
        batch = batch._replace(pixels=batch.pixels.pin_memory(), views=batch.views.pin_memory())

    def run():
        result = resample(batch, device, torch.float32)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    rate = f"{count / benchmark.stats.stats.median:,.0f}"
    tables["input"].append(
        [f"the device's part of packed, batch {count}, on {device}", rate, "", ""]
    )
