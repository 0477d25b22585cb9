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
from dataclasses import replace

import open_clip
import torch
import torch.nn.functional as F
from tabulate import tabulate

from benchmarks.classes import CALTECH101
from lamp_fast import config as settings
from lamp_fast.clip import FrozenClip
from lamp_fast.config import TrainConfig
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.methods import METHODS, RunClasses, build_method

TEMPLATE = "a photo of a {}."
BATCH, CLASSES = 4, 10
ROUNDS = int(os.environ.get("LAMP_FAST_BENCH_ROUNDS", "3"))
# LAMP's own slow path is of the equations, not of anybody's code; the others have nothing to trim.
AS_PUBLISHED = ("coop", "cocoop", "maple", "tcp", "mma")


class Cell:
    """A method over the shared CLIP and batch."""

    def __init__(self, clip, name, as_published=False):
        generator = torch.Generator().manual_seed(0)
        config = settings.apply_published(TrainConfig(), name, "caltech101", "base-new")
        config = replace(config, trim=replace(config.trim, as_published=as_published))
        names = tuple(CALTECH101[:CLASSES])
        torch.manual_seed(0)
        classes = RunClasses(names, tuple(CALTECH101[CLASSES : 2 * CLASSES]))
        self.method = build_method(clip, config, classes)
        self.images = torch.randn(BATCH, 3, 224, 224, generator=generator)
        self.labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        self.inputs = self.images
        if name == "lfa":
            self.inputs = F.normalize(torch.randn(BATCH, 512, generator=generator), dim=-1)
        if name == "candle":
            with torch.no_grad():
                for each in (self.method.visual, self.method.virtual):
                    each.copy_(torch.randn(each.shape, generator=generator))
        self.classes = self.method.prepare(names, TEMPLATE)

    def train(self):
        if not self.method.trainable_parameters():
            return
        self.method.zero_grad(set_to_none=True)
        step = self.method.step(self.inputs, self.labels, self.classes, F.cross_entropy)
        step.loss.backward()

    def evaluate(self):
        self.method.logits(self.images, self.classes)

    def kept(self):
        """Bytes that a step keeps for backward, weights of the CLIP and parameters apart."""
        held = {each.untyped_storage().data_ptr() for each in self.method.clip.model.parameters()}
        held |= {each.untyped_storage().data_ptr() for each in self.method.parameters()}
        towers = (self.method.clip.vision, self.method.clip.text)
        folded = [block.widen + block.narrow for tower in towers for block in tower.blocks]
        held |= {each.untyped_storage().data_ptr() for pair in folded for each in pair}
        saved = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step = self.method.step(self.inputs, self.labels, self.classes, F.cross_entropy)
        total = sum(saved.values())
        del step
        return total


def measure(clip):
    """Ratio medians by (method, as published, piece)."""
    names = [name for name in METHODS if name != "zeroshot"]
    cells = {(name, False): Cell(clip, name) for name in names}
    cells |= {(name, True): Cell(clip, name, True) for name in AS_PUBLISHED}
    zeroshot = Cell(clip, "zeroshot")
    cells[("zeroshot", False)] = zeroshot

    def seconds(function):
        started = time.process_time()
        function()
        return time.process_time() - started

    @torch.no_grad()
    def image_forward():
        clip.model.encode_image(zeroshot.images)

    ratios = defaultdict(list)
    for cell in cells.values():
        cell.method.logits(cell.images[:1], cell.classes)  # leaves text features behind
    image_forward()
    for _ in range(ROUNDS):
        before = seconds(image_forward)
        for key, cell in cells.items():
            train, evaluate = seconds(cell.train), seconds(cell.evaluate)
            after = seconds(image_forward)
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
            f"{cell.kept() / 2**20:.0f}",
        ]


def bench_methods(benchmark, capsys):
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = FrozenClip(open_clip.create_model("ViT-B-16-quickgelu"), Preprocessing(size=224))
    medians, cells = benchmark.pedantic(measure, (clip,), rounds=1)
    header = ["", "parameters", "train", "evaluate", "train, as published"]
    header += ["evaluate, as published", "kept for backward, MiB"]
    with capsys.disabled():
        rows = list(rows_of(medians, cells))
        print("\n" + tabulate(rows, header, tablefmt="github", disable_numparse=True))
    assert medians
