"""Pictures a second of ``predict`` beside the image tower's own rate.

``predict`` reads a list of picture files, decodes them in threads, asks zero-shot CLIP (ViT-B/16,
random weights), whose work per picture is the tower's, and writes CSV; loading the run is left out.
The tower runs over one prepared batch again and again. Both in turn, wall time, medians.

``LAMP_FAST_BENCH_PICTURES=DIR`` takes pictures below DIR in place of drawn JPEGs of 500 x 375, over
and over until there are as many as asked for; ``LAMP_FAST_BENCH_COUNT=20000`` asks for so many.
"""

import itertools
import math
import os
from pathlib import Path

import pytest
import torch

from benchmarks.bench_input import draw_pictures
from benchmarks.measuring.timing import interleave, process_seconds, this_device, threads
from lamp_fast import predict
from lamp_fast.classifier import Classifier
from lamp_fast.clip.features import unprojected_features
from lamp_fast.data.handed_over import read_taken
from lamp_fast.data.pictures import EXTENSIONS

FOLDER = os.environ.get("LAMP_FAST_BENCH_PICTURES")
COUNT = os.environ.get("LAMP_FAST_BENCH_COUNT")
UNIT = "pictures/s"
ROUNDS, DECODED = 2, 32
# The tower takes about 0.3 s a picture on two cores: default and whole grid are 10 s and 2 min a
# round. Ours first decodes a batch that nothing is computed beside, so there are four or more.
GRID = [(32, 8), pytest.param((400, 50), marks=pytest.mark.whole_grid)]
if COUNT:
    GRID = [(int(COUNT), min(100, math.ceil(int(COUNT) / 4)))]


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    folder = Path(FOLDER) if FOLDER else draw_pictures(tmp_path_factory.mktemp("pictures"))
    found = sorted(each for each in folder.rglob("*") if each.suffix.lower() in EXTENSIONS)
    return [each.absolute() for each in found]


@pytest.fixture(scope="module")
def run(tmp_path_factory, jpegs):
    """A run of zero-shot CLIP on links to a few of the pictures."""
    place = tmp_path_factory.mktemp("run")
    for number, file in enumerate(itertools.islice(itertools.cycle(jpegs), 8)):
        folder = place / "classes" / ("left" if number % 2 else "right")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}{file.suffix}").symlink_to(file)
    Classifier.train(
        method="zeroshot",
        data="folder",
        root=place / "classes",
        clip="ViT-B-16",
        pretrained="random",
        device=str(this_device()),
        cache_size=0,
        out=place / "run",
    )
    return place / "run"


@pytest.mark.parametrize("size", GRID, ids=str)
def bench_predict(benchmark, size, run, jpegs, tmp_path, monkeypatch, closing):
    count, batch = size
    classifier = Classifier.load(run, device=str(this_device()))
    monkeypatch.setattr(Classifier, "load", lambda *_, **__: classifier)
    listed = tmp_path / "list.txt"
    files = [str(each) for each in itertools.islice(itertools.cycle(jpegs), count)]
    listed.write_text("\n".join(files) + "\n")
    config = predict.PredictConfig(
        run, (listed,), csv=tmp_path / "answers.csv", top=1, batch=batch, device=str(this_device())
    )
    clip, device = classifier.method.clip, this_device()
    side = clip.preprocessing.size
    images = torch.randn(batch, 3, side, side, dtype=clip.dtype, device=device)

    def tower():
        for start in range(0, count, batch):
            rows = images[: min(batch, count - start)]
            clip.vision.project(unprojected_features(clip, rows))
        if device.type == "cuda":
            torch.cuda.synchronize()

    def decode():
        for number in range(DECODED):
            classifier._transform(read_taken(number, Path(files[number % count])))

    pieces = {"predict": lambda: predict.main(config), "tower": tower}
    with torch.no_grad():
        times = benchmark.pedantic(interleave, (pieces, ROUNDS), rounds=1)
    with threads(1):
        times |= interleave({"decode": decode}, 3, clock=process_seconds)
    ours, alone = count / times["predict"].median, count / times["tower"].median
    decoding = times["decode"].median / DECODED / (os.cpu_count() or 1)
    # On a CPU the same cores decode and compute; beside a GPU the slower of both decides.
    on_gpu = device.type == "cuda"
    floor = min(alone, 1 / decoding) if on_gpu else 1 / (1 / alone + decoding)
    closing.add(
        f"predict, ViT-B/16, {count:,} pictures in batches of {batch}",
        ours,
        UNIT,
        floor=floor,
        beside=f"the tower alone {alone:.2f} ({alone / ours:.2f}x)",
        aim="0.95 of the tower alone",
        device=device,
        dtype=clip.dtype,
    )
    benchmark.extra_info["rates"] = {"predict": ours, "tower": alone, "both": floor}
