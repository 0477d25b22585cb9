"""Every method's step beside LAMP's, in units of open_clip's image forward.

``pytest benchmarks/bench_methods.py --benchmark-only`` prints one table, measured in one run:
trainable parameters; a training step (forward, loss, backward, no optimiser) and an evaluation
batch, medians over rounds in which the image forward (no_grad, same batch) runs before and after
each method; both again with ``--as-published`` (77 tokens, text anew for every evaluation batch
where the peers' code does so); and what a step keeps for backward. ViT-B-16-quickgelu with random
weights, float32, B=4, C=10: Caltech101's first names. Times are CPU seconds of one thread, which
other programs on the machine disturb least. Candle and LFA look at random features; LFA's step is
one of its iterations over a batch of features. LAMP_FAST_BENCH_ROUNDS sets the rounds (3).
"""

import os
import statistics
import time
from collections import defaultdict

import torch
from tabulate import tabulate

from benchmarks.methods import AS_PUBLISHED, MethodCell
from benchmarks.steps import random_clip
from lamp_fast.clip import Trimming
from lamp_fast.methods import METHODS

BATCH, CLASSES = 4, 10
ROUNDS = int(os.environ.get("LAMP_FAST_BENCH_ROUNDS", "3"))


def kept_for_backward(cell: MethodCell) -> int:
    """Bytes that a step keeps for backward, weights of the CLIP and parameters apart."""
    clip = cell.method.clip
    held = {each.untyped_storage().data_ptr() for each in clip.model.parameters()}
    held |= {each.untyped_storage().data_ptr() for each in cell.method.parameters()}
    folded = [
        block.widen + block.narrow for tower in (clip.vision, clip.text) for block in tower.blocks
    ]
    held |= {each.untyped_storage().data_ptr() for pair in folded for each in pair}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step = cell.step()
    total = sum(saved.values())
    del step
    return total


def measure(clip):
    """Ratio medians by (method, as published, piece)."""
    names = [name for name in METHODS if name != "zeroshot"]
    published = Trimming(as_published=True)
    cells = {(name, False): MethodCell(clip, name, BATCH, CLASSES) for name in names}
    cells |= {
        (name, True): MethodCell(clip, name, BATCH, CLASSES, published) for name in AS_PUBLISHED
    }
    zeroshot = MethodCell(clip, "zeroshot", BATCH, CLASSES)
    cells[("zeroshot", False)] = zeroshot

    def seconds(function):
        started = time.process_time()
        function()
        return time.process_time() - started

    ratios = defaultdict(list)
    for cell in cells.values():
        cell.method.logits(cell.images[:1], cell.classes)  # leaves text features behind
    zeroshot.image_forward()
    for _ in range(ROUNDS):
        before = seconds(zeroshot.image_forward)
        for key, cell in cells.items():
            train, evaluate = seconds(cell.train), seconds(cell.evaluate)
            after = seconds(zeroshot.image_forward)
            ratios[(*key, "train")].append(2 * train / (before + after))
            ratios[(*key, "evaluate")].append(2 * evaluate / (before + after))
            before = after
    medians = {key: statistics.median(values) for key, values in ratios.items()}
    return medians, {name: cells[name, False] for name in names}


def rows_of(medians, cells):
    def shown(*key):
        return f"{medians[key]:.2f}" if key in medians else ""

    yield ["CLIP zero-shot", "0", "", shown("zeroshot", False, "evaluate"), "", "", ""]
    for name, cell in cells.items():
        yield [
            cell.method.title,
            f"{cell.method.trainable_parameters():,}",
            shown(name, False, "train"),
            shown(name, False, "evaluate"),
            shown(name, True, "train"),
            shown(name, True, "evaluate"),
            f"{kept_for_backward(cell) / 2**20:.0f}",
        ]


def bench_methods(benchmark, capsys):
    torch.set_num_threads(1)
    clip = random_clip(torch.device("cpu"))
    medians, cells = benchmark.pedantic(measure, (clip,), rounds=1)
    header = ["", "parameters", "train", "evaluate", "train, as published"]
    header += ["evaluate, as published", "kept for backward, MiB"]
    with capsys.disabled():
        rows = list(rows_of(medians, cells))
        print("\n" + tabulate(rows, header, tablefmt="github", disable_numparse=True))
    assert medians
