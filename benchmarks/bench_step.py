"""One training step and one evaluation of LAMP, in units of open_clip's image forward.

``pytest benchmarks/bench_step.py --benchmark-only`` prints a table whose lines start with
``ratio``: medians over rounds in which the image forward (no_grad, same batch) runs before and
after each measured piece. ViT-B-16-quickgelu with random weights, float32 on CPU, forward + loss +
backward without the optimiser, K=2, S=2, layers 3..12, "a photo of a {}." with Caltech101's first C
names.
"""

import statistics
import time

import pytest
import torch
import torch.nn.functional as F

from benchmarks.classes import CALTECH101, TEMPLATE
from benchmarks.floor import step_floor
from benchmarks.steps import random_clip
from lamp_fast.clip import Trimming
from lamp_fast.methods import Lamp
from lamp_fast.methods.lamp import LampSettings

# (batch, classes): rounds, and what is known of others: the targets of train and evaluation for
# text per image, of train for text per class, a padded plain-PyTorch prototype, and the peers' own
# code with text once a batch (MaPLe, MMA, CoOp), all measured on two CPU cores.
CELLS = {
    (4, 10): (9, (2.05, 1.10), 2.0, (2.08, 1.11), (3.0, 2.5, 2.0)),
    (4, 50): (9, (2.75, 1.33), 2.3, (2.93, 1.35), (7.0, 5.5, 4.8)),
    (32, 50): (3, (2.95, 1.38), 2.1, (4.30, 1.46), (3.7, 2.3, 1.6)),
}


@pytest.fixture(scope="module")
def clip():
    return random_clip(torch.device("cpu"))


class Cell:
    """One method setting at one batch size and class count."""

    def __init__(self, clip, batch, classes, text_query="image", path="exact", **trimming):
        generator = torch.Generator().manual_seed(batch * 1000 + classes)
        self.clip = clip
        self.images = torch.randn(batch, 3, 224, 224, generator=generator)
        self.labels = torch.randint(classes, (batch,), generator=generator)
        torch.manual_seed(0)
        self.lamp = Lamp(clip, LampSettings(text_query=text_query), path, Trimming(**trimming))
        self.classes = self.lamp.prepare(CALTECH101[:classes], TEMPLATE)

    @torch.no_grad()
    def image_forward(self):
        self.clip.model.encode_image(self.images)

    def train(self):
        self.lamp.zero_grad(set_to_none=True)
        self.lamp.step(self.images, self.labels, self.classes, F.cross_entropy).loss.backward()

    def evaluate(self):
        # Features that the last call left would make this free with a query a class.
        self.lamp.forget_text()
        self.lamp.logits(self.images, self.classes)


def measure(benchmark, cell, pieces, rounds):
    """Interleave the image forward with each piece; the median ratio of each."""
    ratios = {piece: [] for piece in pieces}

    def seconds(function):
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    def one_round():
        before = seconds(cell.image_forward)
        for piece in pieces:
            taken = seconds(getattr(cell, piece))
            after = seconds(cell.image_forward)
            ratios[piece].append(2 * taken / (before + after))
            before = after

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=1)
    medians = {piece: statistics.median(values[1:]) for piece, values in ratios.items()}
    benchmark.extra_info.update({f"ratio_{piece}": value for piece, value in medians.items()})
    return medians


def text_rows(cell):
    return sum(len(forest) for forest in cell.classes.forests)


@pytest.mark.parametrize("shape", CELLS, ids=lambda shape: f"B{shape[0]}-C{shape[1]}")
def bench_text_per_image(benchmark, clip, ratio_table, shape):
    batch, classes = shape
    rounds, (train_target, evaluation_target), _, prototype, peers = CELLS[shape]
    cell = Cell(clip, batch, classes, share_routes=False)
    medians = measure(benchmark, cell, ["train", "evaluate"], rounds)
    floors = step_floor(clip, batch, text_rows(cell) * batch, classes * batch, first_layer=3)
    what = f"text per (image, class) B={batch} C={classes}"
    ratio_table.add(f"{what} train", medians["train"], train_target, floors[0], prototype[0], peers)
    ratio_table.add(
        f"{what} evaluation", medians["evaluate"], evaluation_target, floors[1], prototype[1]
    )


@pytest.mark.parametrize("shape", CELLS, ids=lambda shape: f"B{shape[0]}-C{shape[1]}")
def bench_text_per_class(benchmark, clip, ratio_table, shape):
    batch, classes = shape
    rounds, _, target, _, peers = CELLS[shape]
    cell = Cell(clip, batch, classes, text_query="class")
    medians = measure(benchmark, cell, ["train", "evaluate"], rounds)
    floors = step_floor(clip, batch, text_rows(cell), classes, first_layer=3)
    what = f"text per class B={batch} C={classes}"
    ratio_table.add(f"{what} train", medians["train"], target, floors[0], None, peers)
    ratio_table.add(f"{what} evaluation", medians["evaluate"], None, floors[1])


def bench_shared_routes(benchmark, clip, ratio_table):
    """Sharing pays by how many images retrieved alike, which the pictures decide."""
    cell = Cell(clip, 32, 50)
    medians = measure(benchmark, cell, ["train", "evaluate"], rounds=2)
    distinct = distinct_routes(cell)
    what = f"text per (image, class) B=32 C=50, routes shared ({distinct} distinct of 32)"
    for piece, value in medians.items():
        ratio_table.add(f"{what} {piece}", value)


def bench_literal(benchmark, clip, ratio_table):
    """The equations as printed, for scale."""
    cell = Cell(clip, 4, 10, path="literal")
    medians = measure(benchmark, cell, ["train"], rounds=2)
    ratio_table.add("literal, text per (image, class) B=4 C=10 train", medians["train"])


def distinct_routes(cell):
    with torch.no_grad():
        chosen = cell.lamp.routes(cell.images)
    return len(torch.unique(torch.cat(chosen, dim=1), dim=0))
