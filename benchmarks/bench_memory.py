"""Peak memory of a LAMP step against the number of classes, with and without blocks.

``pytest benchmarks/bench_memory.py --benchmark-only``. Text per (image, class), batch 32, a small
random CLIP in a process of its own; the closing table says what ViT-B/16 would take by the count
that :meth:`Lamp.affordable_block` uses.
"""

import json
import subprocess
import sys

import pytest

from lamp_fast.config import LampConfig

BATCH = 32
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
def bench_memory(benchmark, memory_table, classes):
    measured = {}

    def both():
        for block in (BLOCK, BATCH * classes):
            measured[block], measured["rows"] = peak_mebibytes(classes, block)

    benchmark.pedantic(both, rounds=1)
    benchmark.extra_info.update({str(key): value for key, value in measured.items()})
    whole = vit_b_16_gibibytes(measured["rows"])
    share = min(1.0, BLOCK / (BATCH * classes))
    memory_table.append(
        [
            classes,
            f"{measured[BLOCK]:.0f}",
            f"{measured[BATCH * classes]:.0f}",
            f"{whole * share:.1f}",
            f"{whole:.1f}",
        ]
    )
