"""Peak memory of a LAMP step against the number of classes, with and without blocks.

``pytest benchmarks/bench_memory.py --benchmark-only``. Text per (image, class), batch 32, a small
random CLIP in a process of its own; the closing table says what ViT-B/16 would take by the count
that :meth:`Lamp.affordable_block` uses.

A second table has ImageNet's classes with ViT-B/16 in bfloat16, K=4, S=4: measured on a GPU, and
everywhere computed from the storages that the same code holds under fake tensors
(:mod:`benchmarks.fake_memory`), weights included; its last line is the most classes of which a
batch of 32 fits 80 GB whole (ImageNet's names, then the same with numbers), computed by the line
through 500 and 1,000 classes. Minutes on two CPU cores.
"""

import json
import subprocess
import sys

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.classes import TEMPLATE, numbered
from benchmarks.fake_memory import PeakMemory
from benchmarks.measure import this_device
from benchmarks.steps import random_clip
from lamp_fast.methods import Lamp
from lamp_fast.runs.config import LampConfig, Trimming

BATCH = 32
TEST_BATCH = 100
# GiB that ImageNet's classes may take in training and in evaluation.
LIMITS = {"train": 40, "evaluate": 16}
# The largest block that a run chooses (lamp_fast.methods.lamp.model.MAX_PAIRS), and a small one.
BLOCKS = [1 << 16, 4096]
BLOCK = 1600
WHOLE = Trimming(block=1 << 30, share_routes=False)
MEMORY = 80e9

STEP = """
import json, resource, sys
import open_clip, torch
import torch.nn.functional as F
from lamp_fast.clip import FrozenClip
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.methods import Lamp
from lamp_fast.runs.config import LampConfig, Trimming

classes, block = json.loads(sys.argv[1])
torch.manual_seed(0)
model = open_clip.CLIP(
    embed_dim=64,
    vision_cfg=dict(image_size=32, patch_size=8, layers=6, width=128, head_width=32),
    text_cfg=dict(context_length=77, vocab_size=49408, layers=6, width=128, heads=4),
    quick_gelu=True,
)
clip = FrozenClip(model, Preprocessing(size=32))
trimming = Trimming(block=block, share_routes=False)
lamp = Lamp(clip, LampConfig(layers=(3, 4, 5, 6)), trimming=trimming)
prepared = lamp.prepare([f"thing number {each}" for each in range(classes)], "a photo of a {}.")
images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % classes
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lamp.step(images, labels, prepared, F.cross_entropy).loss.backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([(after - before) / 1024, sum(map(len, prepared.forests))]))
"""


def peak_mebibytes(classes, block):
    answer = subprocess.run(
        [sys.executable, "-c", STEP, json.dumps([classes, block])],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout)


def vit_b_16_gibibytes(rows):
    """What backward keeps of the text side in ViT-B/16: float32, layers 3..12, ten widths a row."""
    return BATCH * rows * 10 * 512 * 4 * len(LampConfig().layers) / 2**30


@pytest.mark.parametrize("classes", [50, 250, 1000])
def bench_memory(benchmark, tables, classes):
    measured = {}

    def both():
        for block in (BLOCK, BATCH * classes):
            measured[block], measured["rows"] = peak_mebibytes(classes, block)

    benchmark.pedantic(both, rounds=1)
    benchmark.extra_info.update({str(key): value for key, value in measured.items()})
    whole = vit_b_16_gibibytes(measured["rows"])
    share = min(1.0, BLOCK / (BATCH * classes))
    tables["memory"].append(
        [
            classes,
            f"{measured[BLOCK]:.0f}",
            f"{measured[BATCH * classes]:.0f}",
            f"{whole * share:.1f}",
            f"{whole:.1f}",
        ]
    )


@pytest.fixture(scope="module")
def vit_b_16():
    return random_clip(this_device()).to(torch.bfloat16)


def pieces(lamp, classes):
    """A training step and an evaluation batch."""
    device, dtype = next(lamp.clip.parameters()).device, lamp.clip.dtype

    def train():
        images = torch.zeros(BATCH, 3, 224, 224, dtype=dtype, device=device)
        labels = torch.zeros(BATCH, dtype=torch.int64, device=device)
        lamp.step(images, labels, classes, F.cross_entropy).loss.backward()
        lamp.zero_grad(set_to_none=True)

    def evaluate():
        lamp.logits(torch.zeros(TEST_BATCH, 3, 224, 224, dtype=dtype, device=device), classes)

    return {"train": train, "evaluate": evaluate}


def computed_peak(piece):
    """Bytes at the peak of a piece, weights not counted."""
    with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory:
        piece()
    return memory.peak


def measured_peak(piece):
    """The same as a GPU's allocator saw it; None without one."""
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    piece()
    return torch.cuda.max_memory_allocated() - before


def held_bytes(lamp, classes):
    """Bytes of the weights, the parameters and what is prepared of the classes."""
    states = (forest.states for forest in classes.forests)
    held = [*lamp.clip.parameters(), *lamp.parameters(), *states]
    return sum(each.numel() * each.element_size() for each in held)


def gibibytes(held, peak):
    return "no GPU" if peak is None else f"{(held + peak) / 2**30:.1f}"


@pytest.mark.parametrize("classes", [500, 1000])
def bench_imagenet_memory(benchmark, tables, vit_b_16, classes):
    lamp = Lamp(vit_b_16, LampConfig(k=4, s=4))
    prepared = lamp.prepare(open_clip.IMAGENET_CLASSNAMES[:classes], TEMPLATE)
    held = held_bytes(lamp, prepared)

    def measure():
        for block in BLOCKS:
            lamp.trimming = Trimming(block=block, share_routes=False)
            for what, piece in pieces(lamp, prepared).items():
                computed, measured = computed_peak(piece), measured_peak(piece)
                shown = [gibibytes(held, computed), gibibytes(held, measured), LIMITS[what]]
                tables["imagenet memory"].append([what, classes, f"{block:,}", *shown])
                benchmark.extra_info[f"{what} {block}"] = [held, computed, measured]

    benchmark.pedantic(measure, rounds=1)


def bench_largest(benchmark, tables, vit_b_16):
    lamp = Lamp(vit_b_16, LampConfig(k=4, s=4), trimming=WHOLE)

    def prepare(count):
        prepared = lamp.prepare(numbered(open_clip.IMAGENET_CLASSNAMES, count), TEMPLATE)
        return held_bytes(lamp, prepared), pieces(lamp, prepared)["train"]

    def computed(count):
        held, train = prepare(count)
        return held + computed_peak(train)

    def measure():
        few, some, many = (computed(count) for count in (250, 500, 1000))
        slope = (many - some) / 500
        # Some names are longer than others.
        assert few == pytest.approx(some - 250 * slope, rel=0.05), "memory is not linear"
        count = int(1000 + (MEMORY - many) / slope) // 100 * 100
        expected = many + slope * (count - 1000)
        shown, measured = [f"{expected / 2**30:.1f}", "no GPU"], None
        if torch.cuda.is_available():
            held, train = prepare(count)
            measured = held + measured_peak(train)
            shown[1] = f"{measured / 2**30:.1f}"
        shown.append(f"{MEMORY / 2**30:.1f}")
        tables["imagenet memory"].append(["train, as many as fit", count, "whole", *shown])
        benchmark.extra_info.update({"classes": count, "bytes": [expected, measured]})

    benchmark.pedantic(measure, rounds=1)
