"""Peak memory of a LAMP step against the number of classes, with and without blocks.

``pytest benchmarks/bench_memory.py --benchmark-only``. Text per (image, class), batch 32, a small
random CLIP in a process of its own; the closing table says what ViT-B/16 would take by the count
that :meth:`Lamp.affordable_block` uses.

A second table has ImageNet's classes with ViT-B/16 in bfloat16, K=4, S=4: measured on a GPU, and
everywhere computed from the storages that the same code holds under fake tensors
(:mod:`benchmarks.fake_memory`), weights included. Minutes on two CPU cores.
"""

import json
import subprocess
import sys

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_memory import PeakMemory
from lamp_fast.clip import FrozenClip
from lamp_fast.config import LampConfig, Trimming
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.methods import Lamp

BATCH = 32
TEST_BATCH = 100
# GiB that ImageNet's classes may take in training and in evaluation.
LIMITS = {"train": 40, "evaluate": 16}
# The largest block that a run chooses (lamp_fast.methods.lamp.model.MOST_PAIRS), and a small one.
BLOCKS = [1 << 16, 4096]
BLOCK = 1600

STEP = """
import json, resource, sys
import open_clip, torch
import torch.nn.functional as F
from lamp_fast.clip import FrozenClip
from lamp_fast.config import LampConfig, Trimming
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.methods import Lamp

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
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16-quickgelu")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return FrozenClip(model, Preprocessing(size=224)).to(device, torch.bfloat16)


def peaks(lamp, classes):
    """Bytes at the peak of a training step and of an evaluation batch, weights not counted."""
    device, dtype = next(lamp.clip.parameters()).device, lamp.clip.dtype

    def train():
        images = torch.zeros(BATCH, 3, 224, 224, dtype=dtype, device=device)
        labels = torch.zeros(BATCH, dtype=torch.int64, device=device)
        lamp.step(images, labels, classes, F.cross_entropy).loss.backward()
        lamp.zero_grad(set_to_none=True)

    def evaluate():
        lamp.logits(torch.zeros(TEST_BATCH, 3, 224, 224, dtype=dtype, device=device), classes)

    computed, measured = [], []
    for piece in (train, evaluate):
        with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory:
            piece()
        computed.append(memory.peak)
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            piece()
            measured.append(torch.cuda.max_memory_allocated() - before)
    return computed, measured


@pytest.mark.parametrize("classes", [500, 1000])
def bench_imagenet_memory(benchmark, tables, vit_b_16, classes):
    config = LampConfig(k=4, s=4)
    lamp = Lamp(vit_b_16, config)
    prepared = lamp.prepare(open_clip.IMAGENET_CLASSNAMES[:classes], "a photo of a {}.")
    held = [*vit_b_16.parameters(), *lamp.parameters(), *prepared.states]
    weights = sum(each.numel() * each.element_size() for each in held)

    def measure():
        for block in BLOCKS:
            lamp.trimming = Trimming(block=block, share_routes=False)
            computed, measured = peaks(lamp, prepared)
            for at, (what, most) in enumerate(LIMITS.items()):
                shown = [f"{(weights + computed[at]) / 2**30:.1f}", "no GPU"]
                if measured:
                    shown[1] = f"{(weights + measured[at]) / 2**30:.1f}"
                tables["imagenet memory"].append([what, classes, f"{block:,}", *shown, most])

    benchmark.pedantic(measure, rounds=1)
