"""One training step and one evaluation of LAMP, in units of open_clip's image forward.

``pytest benchmarks/bench_step.py --benchmark-only``: medians over rounds in which the image forward
(no_grad, same batch) runs before and after each measured piece. ViT-B-16-quickgelu with random
weights, float32 on CPU, forward + loss + backward + optimiser, K=2, S=2, layers 3..12, "a photo of
a {}." with Caltech101's first C names. On a CPU that multiplies bfloat16 the same steps run over
the same CLIP in bfloat16, too, in units of the float32 forward. A step whose frozen image layers
run ahead stands beside the plain one. A floor is a step's arithmetic at the best rate that products
were measured to reach, which torch's own, and so the forward, stay below. ``--all`` adds B=32,
look-ahead of more layers, shared routes and the equations as printed.
"""

import pytest
import torch

from benchmarks.measuring.floors import floor_in_image_forwards
from benchmarks.measuring.steps import Cell
from benchmarks.measuring.timing import interleave
from lamp_fast.clip.settings import Trimming
from lamp_fast.ops import dispatch

UNIT = "image forwards"
BATCHES_AHEAD = 8
# (batch, classes): rounds, and what is known of others: the targets of train and evaluation for
# text per image, of train for text per class, a padded plain-PyTorch prototype, and the peers' own
# code with text once a batch (MaPLe, MMA, CoOp), all measured on two CPU cores.
SIZES = {
    (4, 10): (5, (2.05, 1.10), 2.0, (2.08, 1.11), (3.0, 2.5, 2.0)),
    (4, 50): (5, (2.75, 1.33), 2.3, (2.93, 1.35), (7.0, 5.5, 4.8)),
    (32, 50): (3, (2.95, 1.38), 2.1, (4.30, 1.46), (3.7, 2.3, 1.6)),
}
# In bfloat16: the targets of train and evaluation for text per image.
BF16_TARGETS = {(4, 10): (1.0, 0.5), (4, 50): (1.25, 0.62), (32, 50): (1.3, 0.63)}
SHAPES = [
    pytest.param(
        *shape,
        id=f"B{shape[0]}-C{shape[1]}",
        marks=[pytest.mark.whole_grid] if shape[0] > 4 else [],
    )
    for shape in SIZES
]


def measure(benchmark, cell, rounds, unit=None):
    """The median ratio of a training step and of an evaluation to the image forward, by default of
    the same CLIP, and the forward's seconds."""
    pieces = {"train": cell.train, "evaluate": cell.evaluate_anew}
    options = {"unit": unit or cell.image_forward}
    times = benchmark.pedantic(interleave, (pieces, rounds), options, rounds=1)
    ratios = {piece: time.ratio for piece, time in times.items()}
    benchmark.extra_info.update({f"ratio_{piece}": ratio for piece, ratio in ratios.items()})
    return ratios, unit_seconds(times["train"])


def unit_seconds(time):
    """What the image forward took beside a piece."""
    return time.median / time.ratio


@pytest.mark.parametrize("text_query", ["image", "class"])
@pytest.mark.parametrize(("batch", "classes"), SHAPES)
def bench_step(benchmark, clip, ceilings, closing, batch, classes, text_query):
    rounds, aims, train_aim, prototype, (maple, mma, coop) = SIZES[batch, classes]
    query = "(image, class)"
    if text_query == "class":
        aims, prototype, query = (train_aim, None), (None, None), "class"
    cell = Cell(clip, batch, classes, text_query=text_query)
    measured, forward = measure(benchmark, cell, rounds)
    for (piece, ratio), aim, padded in zip(measured.items(), aims, prototype, strict=True):
        others = [f"prototype {padded}"] if padded else []
        others += [f"MaPLe {maple}, MMA {mma}, CoOp {coop}"] if piece == "train" else []
        closing.add(
            f"LAMP B={batch} C={classes}, text per {query}: {piece}",
            ratio,
            UNIT,
            floor=floor_in_image_forwards(cell.kernels(piece == "train"), ceilings, forward),
            beside="; ".join(others),
            aim=f"{aim or ''}",
        )


@pytest.mark.skipif(not dispatch.cpu_bfloat16(), reason="a CPU without products of bfloat16")
@pytest.mark.parametrize("text_query", ["image", "class"])
@pytest.mark.parametrize(("batch", "classes"), SHAPES)
def bench_step_in_bfloat16(
    benchmark, clip, bf16_clip, ceilings, bf16_ceilings, closing, batch, classes, text_query
):
    cell = Cell(bf16_clip, batch, classes, text_query=text_query)
    unit = Cell(clip, batch, classes).image_forward
    measured, forward = measure(benchmark, cell, SIZES[batch, classes][0], unit)
    speed = bf16_ceilings.flops / ceilings.flops
    benchmark.extra_info["products"] = [ceilings.record(), bf16_ceilings.record()]
    aims = BF16_TARGETS[batch, classes] if text_query == "image" else ("", "")
    query = "class" if text_query == "class" else "(image, class)"
    for (piece, ratio), aim in zip(measured.items(), aims, strict=True):
        kernels = cell.kernels(piece == "train")
        closing.add(
            f"LAMP B={batch} C={classes}, text per {query}: {piece}",
            ratio,
            f"float32 {UNIT}",
            floor=floor_in_image_forwards(kernels, bf16_ceilings, forward),
            beside=f"products at {speed:.2f} times float32's rate",
            aim=f"{aim}",
            dtype=torch.bfloat16,
        )


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        pytest.param("lamp", range(3, 13), id="lamp"),
        pytest.param("lamp", range(6, 13), id="lamp-from-6", marks=pytest.mark.whole_grid),
        pytest.param("coop", None, id="coop", marks=pytest.mark.whole_grid),
    ],
)
def bench_look_ahead(benchmark, clip, ceilings, closing, method, layers):
    """A step whose frozen layers ran for eight batches at once, an eighth of which is its own."""
    changes = {} if layers is None else {"layers": tuple(layers)}
    cell = Cell(clip, 4, 10, method, **changes)
    pieces = {
        "alone": cell.train,
        "ahead": cell.train_from_states,
        "frozen": cell.frozen_layers(BATCHES_AHEAD),
    }
    options = {"unit": cell.image_forward}
    times = benchmark.pedantic(interleave, (pieces, 3), options, rounds=1)
    alone, ahead, frozen = (times[name].ratio for name in pieces)
    both = {"alone": alone, "looking ahead": ahead + frozen / BATCHES_AHEAD}
    benchmark.extra_info.update(both)
    title, first = cell.method.entry.title, cell.method.first_changed_layer
    floor = None
    if layers is not None:
        forward = unit_seconds(times["alone"])
        floor = floor_in_image_forwards(cell.kernels(True), ceilings, forward)
    for how, ratio in both.items():
        closing.add(
            f"{title} B=4 C=10, layers below {first} {how}: train",
            ratio,
            UNIT,
            floor=floor,
        )


@pytest.mark.whole_grid
def bench_shared_routes(benchmark, clip, closing):
    """Sharing pays by how many images retrieved alike, which the pictures decide."""
    cell = Cell(clip, 32, 50, trim=Trimming())
    ratios, _ = measure(benchmark, cell, rounds=2)
    with torch.no_grad():
        chosen = torch.cat(cell.method.routes(cell.images), dim=1)
    distinct = len(torch.unique(chosen, dim=0))
    for piece, ratio in ratios.items():
        what = f"LAMP B=32 C=50, routes shared ({distinct} distinct of 32 at the end): {piece}"
        closing.add(what, ratio, UNIT)


@pytest.mark.whole_grid
def bench_literal(benchmark, clip, closing):
    """The equations as printed, for scale."""
    cell = Cell(clip, 4, 10, path="literal")
    pieces, options = {"train": cell.train}, {"unit": cell.image_forward}
    times = benchmark.pedantic(interleave, (pieces, 2), options, rounds=1)
    closing.add("LAMP B=4 C=10, literal: train", times["train"].ratio, UNIT)
