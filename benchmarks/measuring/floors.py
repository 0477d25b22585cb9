"""How low a time can lie: a device's rates, and the kernels that a LAMP step needs at least.

The floor of a step is the sum over its kernels of the longer of arithmetic and traffic at the rates
that the device was measured to reach: each kernel reads an input once and writes an output once.
What counts as one kernel is what this package fuses: a matrix product with its bias; attention;
LayerNorm with the residual sum before it; QuickGELU. Masked pairs cost nothing. Retrieval, losses
and readouts of a few rows are left out, so the sum stays below any program of such kernels. Where a
time is given in image forwards, so is the floor: arithmetic alone, over that of the forward.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch

from benchmarks.measuring.timing import time_call
from lamp_fast import ops
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.methods.lamp.prompts import LayerPrompts

PRODUCTS, ATTENTION, NORMS, ACTIVATION, OPTIMISER = (
    "matrix products",
    "attention",
    "LayerNorm, residual sum",
    "activation",
    "optimiser",
)


# A matrix product and a copy large enough to reach the device's rates: the side, and bytes.
SIZES = {"cuda": (8192, 1 << 30), "cpu": (2048, 1 << 28)}


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best, measured: the two rates of every floor in seconds.

    Attributes:
        flops: of a large matrix product in ``dtype``, per second.
        bytes: read plus written by a large copy, per second; what a cache holds can be faster.
        dtype: of the product.
    """

    flops: float
    bytes: float
    dtype: str

    def floor(self, flops: float, moved: float) -> float:
        """Seconds that no program goes below: arithmetic or traffic, whichever takes longer."""
        return max(flops / self.flops, moved / self.bytes)

    def record(self) -> dict:
        """For the report."""
        return asdict(self)


@functools.cache
def measure_ceilings(device: torch.device, dtype: torch.dtype | None = None) -> Ceilings:
    """Measure both rates once; by default of bfloat16 on a GPU and of float32 on a CPU.

    The product is torch's, or the one with a packed weight where that is faster.
    """
    size, copied = SIZES[device.type]
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    products = (time_call(run, [(a,)], device) for run in (a.__matmul__, ops.FrozenLinear(a)))
    copy = time_call(target.copy_, [(source,)], device)
    return Ceilings(
        flops=2 * size**3 / min(product.least for product in products),
        bytes=2 * source.numel() * 4 / copy.least,
        dtype=str(dtype)[6:],
    )


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        part: of the step, one of the names above.
        name: what it computes.
        flops, moved: arithmetic and bytes at least.
    """

    part: str
    name: str
    flops: float
    moved: float


@dataclass(frozen=True)
class Sequences:
    """What one tower computes of a step.

    Attributes:
        width: of its rows.
        count: sequences.
        rows: of each sequence.
        read: rows of each that the last layer computes.
        pairs: (row, key) pairs that attend, prefix included, of one sequence.
        last_pairs: the same where only ``read`` rows ask.
        prefix: prompts that each sequence reads.
        pool: rows that a layer projects to keys and values, once for all.
        phi: widths of a prompt on its way to ``width``.
        item: bytes of an element.
    """

    width: int
    count: int
    rows: int
    read: int
    pairs: int
    last_pairs: int
    prefix: int
    pool: int
    phi: tuple[int, ...]
    item: int

    def linear(self, name: str, rows: int, inner: int, outer: int) -> Kernel:
        """[rows, inner] times [inner, outer]; its bias is left out."""
        moved = self.item * (rows * inner + inner * outer + rows * outer)
        return Kernel(PRODUCTS, name, 2 * rows * inner * outer, moved)

    def project(self, *, backward: bool = False) -> Iterator[Kernel]:
        """The pool through phi."""
        for inner, outer in pairwise([*self.phi, self.width]):
            yield self.linear("phi", self.pool, *((outer, inner) if backward else (inner, outer)))

    def rowwise(self, part: str, name: str, rows: int, width: int, passes: int) -> Kernel:
        """A pass over rows that reads and writes ``passes`` tensors of their size, all told."""
        return Kernel(part, name, 0, self.item * rows * width * passes)


def floor_seconds(kernels: Iterable[Kernel], ceilings: Ceilings) -> float:
    """The floor of a step."""
    return sum(floor_by_part(kernels, ceilings).values())


def floor_by_part(kernels: Iterable[Kernel], ceilings: Ceilings) -> dict[str, float]:
    """Seconds of the floor by part of the step, in the order in which the parts first come."""
    seconds: dict[str, float] = {}
    for each in kernels:
        floor = ceilings.floor(each.flops, each.moved)
        seconds[each.part] = seconds.get(each.part, 0.0) + floor
    return seconds


def floor_in_image_forwards(kernels: Iterable[Kernel], ceilings: Ceilings, forward: float) -> float:
    """Arithmetic of a step at the machine's rate, in units of open_clip's image forward.

    Args:
        kernels: the step's.
        ceilings: of what it computes in.
        forward: seconds that the image forward took beside it.
    """
    return sum(each.flops for each in kernels) / ceilings.flops / forward


def image_forward_kernels(clip: FrozenClip, images: int) -> Iterator[Kernel]:
    """open_clip's image forward: no prompts, and all rows of the last layer."""
    tokens = clip.vision.visual.positional_embedding.shape[0]
    pairs = tokens * tokens
    width, item = clip.vision.width, clip.dtype.itemsize
    plain = Sequences(width, images, tokens, tokens, pairs, pairs, 0, 0, (), item)
    yield from embed_kernels(clip, plain)
    for _ in clip.vision.blocks:
        yield from layer_kernels(plain, last=False, backward=False, prompts=False)


def vision_sequences(clip: FrozenClip, images: int, config) -> Sequences:
    """The image tower's side of a step over ``images`` pictures under a ``LampSettings``."""
    tokens = clip.vision.visual.positional_embedding.shape[0]
    keys = tokens + config.k + config.s
    return Sequences(
        width=clip.vision.width,
        count=images,
        rows=tokens,
        read=1,
        pairs=tokens * keys,
        last_pairs=keys,
        prefix=config.k + config.s,
        pool=config.m + config.s,
        phi=config.phi_widths,
        item=clip.dtype.itemsize,
    )


def text_sequences(clip: FrozenClip, count: int, classes, config) -> Sequences:
    """The text tower's side: all forests of ``classes`` (``Lamp.prepare``'s), ``count`` times: once
    a picture with all routes distinct, or once. However they are split, weights are read once."""
    prefix = config.k + config.s + 1  # bot
    forests = classes.forests
    rows = sum(len(each) for each in forests)
    read = sum(len(each.eot) for each in forests)
    pairs = sum(int(each.visible.sum()) for each in forests)
    last_pairs = sum(int(each.visible[each.eot].sum()) for each in forests)
    return Sequences(
        width=clip.text.width,
        count=count,
        rows=rows,
        read=read,
        pairs=pairs + rows * prefix,
        last_pairs=last_pairs + read * prefix,
        prefix=prefix,
        pool=config.m + config.s,
        phi=config.phi_widths,
        item=clip.dtype.itemsize,
    )


def embed_kernels(clip: FrozenClip, of: Sequences) -> Iterator[Kernel]:
    """From pixels to the rows ``of`` the image tower that enter layer 1."""
    patch = clip.vision.visual.conv1.weight[0].numel()
    yield of.linear("embed", of.count * (of.rows - 1), patch, of.width)
    yield of.rowwise(NORMS, "embed LayerNorm", of.count * of.rows, of.width, 2)


def layer_kernels(
    of: Sequences, *, last: bool, backward: bool, to_input: bool = True, prompts: bool = True
) -> Iterator[Kernel]:
    """One layer of a tower, forward or backward.

    Args:
        of: the tower's sequences.
        last: only the rows that are read out are computed, beyond keys and values.
        backward: the gradients of activations and prompts; weights are frozen.
        to_input: backward goes on to the layer below; in the first layer with prompts it ends.
        prompts: the layer has some.
    """
    width, rows = of.width, of.count * of.rows
    asking = of.count * (of.read if last else of.rows)
    pairs = of.count * (of.last_pairs if last else of.pairs)
    shared = 2 * of.count * of.prefix * width if prompts else 0  # keys and values read
    qkv = 2 * rows * width + asking * width
    if not backward:
        if prompts:
            yield from of.project()
            yield of.linear("keys and values of prompts", of.pool, width, 2 * width)
        yield of.rowwise(NORMS, "add_layer_norm", rows, width, 4)
        if last:
            yield of.linear("keys and values", rows, width, 2 * width)
            yield of.linear("queries", asking, width, width)
        else:
            yield of.linear("queries, keys and values", rows, width, 3 * width)
        moved = of.item * (qkv + shared + asking * width)
        yield Kernel(ATTENTION, "attention", 4 * pairs * width, moved)
        yield of.linear("attention out", asking, width, width)
        yield of.rowwise(NORMS, "add_layer_norm", asking, width, 4)
        yield of.linear("widen", asking, width, 4 * width)
        yield of.rowwise(ACTIVATION, "quick_gelu", asking, 4 * width, 2)
        yield of.linear("narrow", asking, 4 * width, width)
        return
    yield of.linear("narrow", asking, width, 4 * width)
    yield of.rowwise(ACTIVATION, "quick_gelu", asking, 4 * width, 3)
    yield of.linear("widen", asking, 4 * width, width)
    yield of.rowwise(NORMS, "add_layer_norm", asking, width, 4)
    yield of.linear("attention out", asking, width, width)
    # Five products where forward has two; without a gradient to the input, those of the prompts
    # alone remain: scores and their gradient, then keys and values.
    products = 10 * pairs * width if to_input else 8 * asking * of.prefix * width
    moved = of.item * (qkv + shared + 2 * asking * width + (qkv if to_input else 0) + shared)
    yield Kernel(ATTENTION, "attention", products, moved)
    if to_input:
        yield of.linear("queries, keys and values", rows, 3 * width, width)
        yield of.rowwise(NORMS, "add_layer_norm", rows, width, 4)
    if prompts:
        yield of.linear("keys and values of prompts", of.pool, 2 * width, width)
        yield from of.project(backward=True)


def tower_kernels(
    of: Sequences, depth: int, layers: tuple[int, ...], *, start: int, train: bool
) -> Iterator[Kernel]:
    """A tower from layer ``start`` (from 1) on, forward and, to train, back to min(``layers``)."""
    for number in range(start, depth + 1):
        yield from layer_kernels(of, last=number == depth, backward=False, prompts=number in layers)
    if not train:
        return
    for number in range(depth, layers[0] - 1, -1):
        yield from layer_kernels(
            of,
            last=number == depth,
            backward=True,
            to_input=number > layers[0],
            prompts=number in layers,
        )


def step_kernels(
    clip: FrozenClip, images: int, classes, config, *, train: bool
) -> Iterator[Kernel]:
    """Every kernel of a training step, or of an evaluation without gradient.

    Args:
        clip: the towers.
        images: B.
        classes: what ``Lamp.prepare`` gave under ``config``.
        config: a ``LampSettings``.
        train: with backward and the optimiser.
    """
    vision = vision_sequences(clip, images, config)
    yield from embed_kernels(clip, vision)
    depth = len(clip.vision.blocks)
    yield from tower_kernels(vision, depth, config.layers, start=1, train=train)
    count = images if config.text_query == "image" else 1
    depth, start = len(clip.text.blocks), classes.first_layer
    text = text_sequences(clip, count, classes, config)
    yield from tower_kernels(text, depth, config.layers, start=start, train=train)
    if train:
        with torch.device("meta"):
            layer = LayerPrompts(config, clip.vision.width, clip.text.width)
        numbers = len(config.layers) * sum(each.numel() for each in layer.parameters())
        # Gradient, parameter and two moments read; the last three written; float32.
        yield Kernel(OPTIMISER, "optimiser", 0, 4 * 7 * numbers)
