"""Calls of the ops as data, so that one criterion checks every implementation of every op.

A call is run by the implementation under test, by the reference in the same dtype and by the
reference in float64, each with gradients. The error of the first must stay within twice that of
the second plus a rounding budget that the op's arithmetic allows (``BUDGETS``).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import under_test
from torch import Tensor

from lamp_fast import ops

UNIT32 = torch.finfo(torch.float32).eps


@dataclass
class Call:
    """An op with its tensors and options.

    Attributes:
        op: its name.
        tensors: the positional tensors, float64.
        frozen: the last so many of them take no gradient.
        options: everything else, by name or position.
        rounding: the dtype that the gradients from above are representable in.
        seed: theirs.
    """

    op: str
    tensors: list[Tensor]
    frozen: int = 0
    positional: tuple = ()
    options: dict = field(default_factory=dict)
    rounding: torch.dtype = torch.float32
    seed: int = 0


def differentiate(
    call: Call, impl: str, dtype: torch.dtype, device: torch.device
) -> Callable[[], list[Tensor]]:
    """A function that computes the outputs, then the gradients, of fixed tensors on a device."""
    live = len(call.tensors) - call.frozen
    tensors = [each.to(dtype).to(device) for each in call.tensors]
    tensors = [each.requires_grad_(index < live) for index, each in enumerate(tensors)]
    options = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in call.options.items()
    }
    above = None

    def run() -> list[Tensor]:
        nonlocal above
        outputs = getattr(ops, call.op)(*tensors, *call.positional, **options, impl=impl)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        smooth = [each for each in outputs if each.is_floating_point()]
        if above is None:
            above = gradients_from_above(call, smooth)
            above = [x.to(y.dtype).to(device) for x, y in zip(above, smooth, strict=True)]
        grads = torch.autograd.grad(smooth, tensors[:live], above, materialize_grads=True)
        return [*(each.detach() for each in outputs), *grads]

    return run


def run(call: Call, impl: str, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Outputs and gradients by name, on the CPU."""
    results = [each.cpu() for each in differentiate(call, impl, dtype, device)()]
    outputs = len(results) - (len(call.tensors) - call.frozen)
    names = [f"output {index}" for index in range(outputs)]
    names += [f"gradient {index}" for index in range(len(results) - outputs)]
    return dict(zip(names, results, strict=True))


def gradients_from_above(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """Alike for every implementation and dtype."""
    generator = torch.Generator().manual_seed(call.seed)
    return [torch.randn(x.shape, generator=generator).to(call.rounding) for x in outputs]


def assert_accurate(call: Call, impl: str, dtype: torch.dtype) -> None:
    """Hold an implementation to the criterion."""
    cpu = torch.device("cpu")
    tensors = [each.to(dtype).double() for each in call.tensors]
    call = replace(call, tensors=tensors, rounding=dtype)
    got = run(call, impl, dtype, under_test.device(impl))
    eager = run(call, "reference", dtype, cpu)
    if call.op == "retrieve":
        _assert_retrieved_alike(got, eager)
    if call.op == "add_layer_norm":
        # By contract the statistics are those of the rounded sum.
        total = eager["output 0"].double()
        assert torch.equal(got["output 0"].double(), total)
        call = replace(call, tensors=[total, torch.zeros_like(total), *tensors[2:]])
    exact = run(call, "reference", torch.float64, cpu)
    outputs = [each for name, each in exact.items() if name.startswith("output")]
    above = [each.double() for each in gradients_from_above(call, outputs)]
    budgets = BUDGETS[call.op](call, dtype, above, exact)
    for name, budget in budgets.items():
        under_test.assert_as_accurate(name, got[name], eager[name], exact[name], budget)


def retrieve(batch, pool_size, width, k, *, seed=0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    keys = torch.randn(pool_size, width, generator=generator, dtype=torch.float64)
    bias = 0.01 * torch.randn(pool_size, generator=generator, dtype=torch.float64)
    return Call("retrieve", [query, keys, bias], 1, (k,), seed=seed)


def _assert_retrieved_alike(got: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """Random scores lie further apart than the 1e-14 or so by which float64 sums differ, so the
    choice is the same; counts are those of the choice."""
    assert torch.equal(got["output 0"], eager["output 0"])
    counts = torch.bincount(got["output 0"].flatten(), minlength=len(got["output 2"]))
    assert torch.equal(got["output 2"], counts)


def _retrieve_budget(call: Call, dtype, above, exact) -> dict[str, Tensor]:
    """Cosines are rounded once to float32, so they err by u'/2 and every term of a gradient by that
    of its size, g (1 + s) / norm; the result is rounded to float32 and to the dtype."""
    query, keys, _ = call.tensors
    slope = above[0].abs()
    to_query = 2 * slope.sum(1, keepdim=True) / query.norm(dim=1, keepdim=True)
    to_keys = torch.zeros(len(keys), dtype=torch.float64)
    to_keys = to_keys.index_add(0, exact["output 0"].flatten(), 2 * slope.flatten())
    to_keys = to_keys[:, None] / keys.norm(dim=1, keepdim=True)
    unit = torch.finfo(dtype).eps / 2
    gradients = {"gradient 0": to_query, "gradient 1": to_keys}
    return {"output 1": torch.full_like(exact["output 1"], UNIT32)} | {
        name: UNIT32 * size + unit * exact[name].abs() + torch.finfo(dtype).smallest_normal * unit
        for name, size in gradients.items()
    }


def prefix_attention(
    sequences, groups, heads, length, prefix, width, *, rows=None, index=None, tree=None, seed=0,
    size=1.0, **options,
) -> Call:  # fmt: skip
    """Random tensors; ``tree`` is the chance that a row sees a key, for a random mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = length if rows is None else rows
    tensors = [
        size * normal(sequences, heads, rows, width),
        size * normal(sequences, heads, length, width),
        normal(sequences, heads, length, width),
        size * normal(groups, heads, prefix, width),
        normal(groups, heads, prefix, width),
    ]
    if index is not None:
        options["prefix_index"] = torch.tensor(index, dtype=torch.int64)
    if tree is not None:
        mask = torch.rand(rows, prefix + length, generator=generator) < tree
        mask[:, prefix + length - 1] = True
        options["mask"] = mask
    return Call("prefix_attention", tensors, options=options, seed=seed)


def _attention_budget(call: Call, dtype, above, exact) -> dict[str, Tensor]:
    """First-order, componentwise, with u of the dtype and u' of float32.

    A score errs by (d + 4) u'/2 of scale |q| |k|, products of absolute values; a weight by that and
    by its row's mean of that, relatively; weights and gradients of scores are rounded to the dtype;
    a sum of t terms adds t u'/2; a result is rounded once.
    """
    q, k, v, prefix_k, prefix_v = call.tensors
    sequences, _, rows, width = q.shape
    length, prefix = k.shape[2], prefix_k.shape[2]
    index = call.options.get("prefix_index")
    if index is None:
        index = torch.arange(sequences) // max(1, sequences // max(1, len(prefix_k)))
    keys = torch.cat([prefix_k[index], k], dim=2)
    values = torch.cat([prefix_v[index], v], dim=2).abs()
    mask = call.options.get("mask")
    if mask is None:
        position = torch.arange(length - rows, length)[:, None]
        blind = position.expand(-1, prefix) >= call.options.get("blind", 0)
        own = torch.arange(length) <= (position if call.options.get("causal") else length)
        mask = torch.cat([blind, own.expand(rows, -1)], dim=1)
    scale = call.options.get("scale") or width**-0.5
    weights = (scale * q @ keys.mT).masked_fill(~mask, -math.inf).softmax(-1)
    unit = torch.finfo(dtype).eps / 2
    terms = prefix + length + rows * (sequences // max(1, len(prefix_k)) or sequences)
    score = (width + 4) * UNIT32 / 2 * abs(scale) * (q.abs() @ keys.abs().mT)
    relative = unit + score + (weights * score).sum(-1, keepdim=True) + terms * UNIT32 / 2
    above = above[0].abs()
    spread = weights * (above @ values.mT)
    # What a row's delta errs by comes with all its errors of weights, and the output's rounding.
    delta = (spread * relative).sum(-1, keepdim=True) + unit * spread.sum(-1, keepdim=True)
    total = spread.sum(-1, keepdim=True)
    slopes = abs(scale) * (2 * relative * (spread + weights * total) + weights * delta)
    weights = weights * relative
    to_keys, to_values = slopes.mT @ q.abs(), weights.mT @ above
    sizes = {"output 0": weights @ values, "gradient 0": slopes @ keys.abs()}
    sizes |= {"gradient 1": to_keys[:, :, prefix:], "gradient 2": to_values[:, :, prefix:]}
    for name, each, like in (
        ("gradient 3", to_keys, prefix_k),
        ("gradient 4", to_values, prefix_v),
    ):
        sizes[name] = torch.zeros_like(like).index_add(0, index, each[:, :, :prefix])
    smallest = torch.finfo(dtype).smallest_normal
    return {
        name: size + unit * exact[name].abs() + smallest * terms * unit
        for name, size in sizes.items()
    }


def gelu(op: str, *shape: int, size=3.0, seed=0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    x = size * torch.randn(shape, generator=generator, dtype=torch.float64)
    return Call(op, [x], seed=seed)


def _gelu_budget(call: Call, dtype, above, exact) -> dict[str, Tensor]:
    """float32 inside: z = 1.702 x errs by u'|z|, which moves the gate by at most a quarter of that
    (0.4 for the normal's); the exponential and a division add a few u'; |slope| < 1.2; one rounding
    to the dtype, or its smallest step."""
    x = call.tensors[0]
    gate = (1.702 * x.abs() + 8) * UNIT32
    sizes = {"output 0": x.abs() * gate, "gradient 0": 1.2 * above[0].abs() * gate * (1 + x.abs())}
    return _rounded_once(sizes, dtype, exact)


def add_layer_norm(*shape: int, size=1.0, seed=0) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = [size * normal(*shape), normal(*shape), normal(shape[-1]), normal(shape[-1])]
    return Call("add_layer_norm", tensors, 2, (1e-5,), seed=seed)


def _add_layer_norm_budget(call: Call, dtype, above, exact) -> dict[str, Tensor]:
    """float32 inside: a mean by trees errs by log2(D) u' of the mean size, and a handful of u' come
    beside; so a unit row errs by that times 1 + mean|sum| / deviation, and what it enters alike."""
    total, _, weight, bias = call.tensors
    width = total.shape[-1]
    relative = (math.log2(width) + 16) * UNIT32
    centred = total - total.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + call.positional[0]).rsqrt()
    unit = (centred * inverse).abs()
    worse = 1 + inverse * total.abs().mean(-1, keepdim=True)
    normed = relative * ((worse + unit) * weight.abs() + bias.abs())
    slope = (above[1] * weight).abs()
    level = slope.mean(-1, keepdim=True)
    along = (slope * unit).mean(-1, keepdim=True)
    grad = slope + level + 3 * unit * along + worse * (along + unit * level)
    grad = relative * (inverse * grad + above[0].abs())
    sizes = {"output 1": normed, "gradient 0": grad, "gradient 1": grad}
    return _rounded_once(sizes, dtype, exact)


def _rounded_once(sizes: dict[str, Tensor], dtype, exact) -> dict[str, Tensor]:
    info = torch.finfo(dtype)
    step = info.smallest_normal * info.eps if dtype != torch.float32 else info.smallest_normal
    return {
        name: size + info.eps / 2 * (exact[name].abs() + size) + step
        for name, size in sizes.items()
    }


BUDGETS: dict[str, Callable] = {
    "retrieve": _retrieve_budget,
    "prefix_attention": _attention_budget,
    "quick_gelu": _gelu_budget,
    "gelu": _gelu_budget,
    "add_layer_norm": _add_layer_norm_budget,
}


OPS = tuple(BUDGETS)


def draw(op: str, seed: int, *, large: bool) -> Call:
    """A random call of an op; small enough for the interpreter unless ``large``."""
    generator = torch.Generator().manual_seed(seed)

    def one(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    if op == "retrieve":
        pool_size = one(1, 5, 20, 33) if not large else one(1, 5, 20, 64, 100, 256)
        width = one(1, 13, 60) if not large else one(1, 77, 512, 768, 1024)
        k = one(*(each for each in (1, 2, 6, 32) if each <= pool_size))
        return retrieve(
            one(0, 1, 3) if not large else one(0, 1, 37, 128), pool_size, width, k, seed=seed
        )
    if op in ("quick_gelu", "gelu"):
        shape = one((1,), (7,), (3, 5), (2, 513), (2, 1, 1024), (1025,), (0, 4))
        shape = (one(1, 3, 64), *shape) if large else shape
        return gelu(op, *shape, size=one(0.1, 3.0, 30.0), seed=seed)
    if op == "add_layer_norm":
        shape = one((3,), (1, 5), (2, 2), (0, 3)) if not large else one((1000,), (3, 77), (5,))
        width = one(1, 5, 32, 100, 512, 768) if not large else one(1, 80, 512, 768, 1280, 4096)
        return add_layer_norm(*shape, width, size=one(0.1, 1.0, 20.0), seed=seed)
    length = (
        one(1, 2, 5, 7, 12, 16, 17, 33) if not large else one(1, 5, 7, 12, 32, 33, 77, 197, 257)
    )
    prefix = one(0, 1, 4, 9, 17) if not large else one(0, 1, 4, 10, 16, 37, 65)
    width = one(8, 20, 32) if not large else one(32, 64, 80, 104, 128)
    heads = one(1, 1, 2) if not large else one(1, 3, 8)
    groups, share = (
        one((1, 1), (1, 5), (2, 1), (2, 2)) if not large else one((1, 9), (7, 1), (3, 30))
    )
    sequences = groups * share
    kind = one("plain", "causal", "blind", "tree", "indexed")
    rows = length if one(True, True, False) else one(1, (length + 1) // 2)
    options = {"rows": rows, "seed": seed, "size": one(0.3, 1.0, 3.0)}
    if kind == "tree":
        options["tree"] = one(0.05, 0.5)
    else:
        options["causal"] = kind != "plain"
        options["blind"] = one(0, 1, 3) if kind in ("blind", "indexed") else 0
    if kind == "indexed":
        options["index"] = torch.randint(groups, (sequences,), generator=generator).tolist()
    return prefix_attention(sequences, groups, heads, length, prefix, width, **options)
