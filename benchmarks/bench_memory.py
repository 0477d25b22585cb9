"""Peak memory of a LAMP step against the number of classes, with and without blocks.

``pytest benchmarks/bench_memory.py --benchmark-only``. Text per (image, class), batch 32, a small
random CLIP in a process of its own, beside what ViT-B/16 would take by the count that
:func:`lamp_fast.methods.lamp.memory.affordable_block` uses. ``--all`` adds 50 and 1,000 classes,
and:

ImageNet's classes with ViT-B/16 in bfloat16, K=4, S=4: measured on a GPU, and everywhere counted
from the storages that the same code holds under fake tensors, weights included; the last line is
the most classes of which a batch of 32 fits 80 GB whole (ImageNet's names, then the same with
numbers), by the line through 500 and 1,000 classes. Minutes on two CPU cores.
"""

import open_clip
import pytest
import torch

from benchmarks.measuring.memory import BATCH, counted_peak, gpu_peak, system_peak
from benchmarks.measuring.names import numbered
from benchmarks.measuring.steps import Cell
from benchmarks.measuring.timing import this_device
from lamp_fast.clip.settings import Trimming
from lamp_fast.methods.settings.lamp import LampSettings

TEST_BATCH = 100
# GiB that ImageNet's classes may take in training and in evaluation.
LIMITS = {"train": 40, "evaluate": 16}
# The largest block that a run chooses (lamp_fast.methods.lamp.memory.MAX_PAIRS), and a small one.
BLOCKS = [1 << 16, 4096]
BLOCK = 1600
WHOLE = Trimming(block=1 << 30, share_routes=False)
MEMORY = 80e9
WHERE = {"device": this_device(), "dtype": torch.bfloat16}


def vit_b_16_gibibytes(rows):
    """What backward keeps of the text side in ViT-B/16: float32, layers 3..12, ten widths a row."""
    return BATCH * rows * 10 * 512 * 4 * len(LampSettings().layers) / 2**30


@pytest.mark.parametrize(
    "classes", [250, *(pytest.param(count, marks=pytest.mark.whole_grid) for count in (50, 1000))]
)
def bench_memory(benchmark, closing, classes):
    def both():
        return [system_peak(classes, block) for block in (BLOCK, BATCH * classes)]

    (in_blocks, rows), (in_one, _) = benchmark.pedantic(both, rounds=1)
    benchmark.extra_info.update({"in_blocks": in_blocks, "in_one": in_one, "rows": rows})
    whole = vit_b_16_gibibytes(rows)
    computed = whole * min(1.0, BLOCK / (BATCH * classes))
    closing.add(
        f"peak memory of a step, small CLIP, B={BATCH} C={classes}, blocks of {BLOCK:,} pairs",
        in_blocks,
        "MiB",
        beside=f"in one {in_one:,.0f} MiB; ViT-B/16, computed: {computed:.1f} and {whole:.1f} GiB",
    )


def imagenet_cell(clip, classes):
    names = numbered(open_clip.IMAGENET_CLASSNAMES, classes)
    return Cell(clip, BATCH, classes, trim=WHOLE, names=names, k=4, s=4)


def pieces(cell):
    """A training step and an evaluation batch; the optimiser's own memory is not of the classes."""

    def evaluate():
        images = cell.images.new_zeros(TEST_BATCH, *cell.images.shape[1:])
        cell.method.logits(images, cell.classes)

    return {"train": cell.gradients, "evaluate": evaluate}


def held_bytes(cell):
    """Bytes of the weights, the parameters, the pictures and what is prepared of the classes."""
    states = [forest.states for forest in cell.classes.forests]
    held = [*cell.clip.parameters(), *cell.method.parameters(), *states, cell.images]
    return sum(each.numel() * each.element_size() for each in held)


def add(closing, what, counted, measured, most):
    beside = "no GPU" if measured is None else f"measured {measured / 2**30:.1f} GiB"
    aim = f"at most {most:.0f}"
    closing.add(
        f"peak memory, {what}", counted / 2**30, "GiB counted", beside=beside, aim=aim, **WHERE
    )


@pytest.mark.whole_grid
@pytest.mark.parametrize("classes", [500, 1000])
def bench_imagenet_memory(benchmark, closing, device_clip, classes):
    cell = imagenet_cell(device_clip, classes)
    held = held_bytes(cell)

    def measure():
        for block in BLOCKS:
            cell.method.trimming = Trimming(block=block, share_routes=False)
            for what, piece in pieces(cell).items():
                counted, measured = held + counted_peak(piece), gpu_peak(piece)
                measured = None if measured is None else held + measured
                title = f"ImageNet's first {classes:,}, blocks of {block:,}: {what}"
                add(closing, title, counted, measured, LIMITS[what])
                benchmark.extra_info[f"{what} {block}"] = [held, counted, measured]

    benchmark.pedantic(measure, rounds=1)


@pytest.mark.whole_grid
def bench_largest(benchmark, closing, device_clip):
    def counted(count):
        cell = imagenet_cell(device_clip, count)
        return held_bytes(cell) + counted_peak(cell.gradients)

    def measure():
        few, some, many = (counted(count) for count in (250, 500, 1000))
        slope = (many - some) / 500
        # Some names are longer than others.
        assert few == pytest.approx(some - 250 * slope, rel=0.05), "memory is not linear"
        count = int(1000 + (MEMORY - many) / slope) // 100 * 100
        expected, measured = many + slope * (count - 1000), None
        if torch.cuda.is_available():
            cell = imagenet_cell(device_clip, count)
            measured = held_bytes(cell) + gpu_peak(cell.gradients)
        title = f"as many classes as fit, whole: train with {count:,}"
        add(closing, title, expected, measured, MEMORY / 2**30)
        benchmark.extra_info.update({"classes": count, "bytes": [expected, measured]})

    benchmark.pedantic(measure, rounds=1)
