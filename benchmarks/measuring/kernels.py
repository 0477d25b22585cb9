"""The cases of the ops: what is timed, beside what, and how low its floor lies.

A case draws inputs, names contenders (each a function of the inputs) and counts the arithmetic and
the traffic that must be. ``ours`` is what the package takes by default; a contender that a machine
cannot run is an empty cell with the reason.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.measuring.floors import Ceilings
from benchmarks.measuring.names import CALTECH101
from benchmarks.measuring.timing import CPU, Inputs, Time, interleave, rotations, time_call
from lamp_fast import ops
from lamp_fast.clip.prompts import plant

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


# What serves beside "ours" and plain torch, by the device's type.
IMPLEMENTATIONS = {"cuda": ("triton", "cuda"), "cpu": ("cpp",)}
# Everything else is held against the first of these that a case has.
PLAIN = ("eager", "SDPA math", "reference")

# bfloat16 has 8 bits; two honest programs differ by a few of its roundings, in float32 by some
# hundred.
MAX_ERROR = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
# Three bits of mantissa on both sides of a product: 2^-4 a factor at most, about 4% in the norm.
MAX_FP8_ERROR = 6e-2
FP8 = torch.float8_e4m3fn

TEXT_TARGETS = {
    "cuda": "3x SDPA, 1.5x FlexAttention, within 2x of the floor",
    "cpu": "1x the reference, 1.5x at N=1600",
}


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        what: op, shape, direction.
        target: what ours is held against, in words.
        flops, moved: arithmetic and bytes of one call at least.
        draw: inputs on a device from a seed.
        contenders: by name, "ours" among them.
        coarse: by contender, the error it is allowed where that is more than rounding's; shown
            beside its time.
    """

    what: str
    target: str
    flops: float
    moved: float
    draw: Callable[[int], Inputs]
    contenders: dict[str, Callable[..., object]]
    coarse: dict[str, float] = field(default_factory=dict)

    def on_cpu(self) -> "Case":
        """The C++ code as ours, beside the eager reference alone."""
        reference = next(
            self.contenders[name] for name in ("reference", "eager") if name in self.contenders
        )
        both = {"ours": self.contenders["cpp"], "reference": reference}
        return replace(self, what=f"{self.what}, C++", contenders=both)


@dataclass
class Row:
    """What was measured of a case.

    Attributes:
        floor: seconds.
        times: by contender.
        errors: by contender, its relative error.
        refused: by contender, the first line of why it did not run.
    """

    case: Case
    floor: float
    times: dict[str, Time] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict:
        """For the report; seconds."""
        return {
            "floor": self.floor,
            "times": {name: asdict(each) for name, each in self.times.items()},
            "errors": self.errors,
            "refused": self.refused,
        }

    def ratios(self) -> dict[str, float]:
        """How many times as long as ours each other contender takes."""
        ours = self.times.get("ours")
        if ours is None:
            return {}
        return {
            name: each.median / ours.median for name, each in self.times.items() if name != "ours"
        }

    def beside(self) -> str:
        """How many times as long as ours the others take, and why some did not run."""
        others = [
            f"{name} {ratio:.2f}x{self._error(name)}" for name, ratio in self.ratios().items()
        ]
        return "; ".join([*others, *(f"{name}: {why}" for name, why in self.refused.items())])

    def _error(self, name: str) -> str:
        return f" (error {self.errors[name]:.1e})" if name in self.case.coarse else ""


def measure(case: Case, device: torch.device, ceilings: Ceilings, *, rounds: int = 5) -> Row:
    """Time every contender of a case on the same inputs: one after the other on a GPU, in turn on a
    CPU, over ``rounds``.

    A contender whose results are not the plain one's is refused: its time is worth nothing.
    """
    row = Row(case, ceilings.floor(case.flops, case.moved))
    inputs = rotations(case.draw, device)
    plain = next(name for name in PLAIN if name in case.contenders)
    wanted = case.contenders[plain](*inputs[0])
    for name, contender in case.contenders.items():
        try:
            error = relative_error(contender(*inputs[0]), wanted)
            if not error <= case.coarse.get(name, MAX_ERROR[inputs[0][0].dtype]):
                row.refused[name] = f"wrong: relative error {error:.1e}"
                continue
            if device.type == "cuda":
                row.times[name] = time_call(contender, inputs, device)
            row.errors[name] = error
        except (
            Exception
        ) as error:  # a backend that does not serve this shape is a cell, not a crash
            row.refused[name] = (str(error) or type(error).__name__).strip().splitlines()[0][:160]
    if device.type != "cuda":
        able = {name: functools.partial(case.contenders[name], *inputs[0]) for name in row.errors}
        row.times = interleave(able, rounds)
    return row


def measure_into(closing, benchmark, case: Case, device: torch.device, ceilings, **options) -> None:
    """Measure a case as a benchmark: a line of the closing table, and its record."""
    row = benchmark.pedantic(measure, (case, device, ceilings), options, rounds=1)
    benchmark.extra_info.update(row.record() | {"ceilings": ceilings.record()})
    ours = row.times.get("ours")
    closing.add(
        case.what,
        math.nan if ours is None else 1e6 * ours.median,
        "us",
        floor=1e6 * row.floor,
        beside=row.beside(),
        aim=case.target,
        device=device,
        dtype=case.draw(0)[0].dtype,
    )


def relative_error(got: object, wanted: object) -> float:
    """The largest ||got - wanted|| / ||wanted|| over floating-point results."""
    got, wanted = (each if isinstance(each, tuple) else (each,) for each in (got, wanted))
    pairs = [pair for pair in zip(got, wanted, strict=True) if pair[1].is_floating_point()]
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def both_ways(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., object]:
    """Forward and backward of a function towards every input that wants a gradient."""

    def run(*inputs: Tensor):
        out = function(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        out = [each for each in out if each.requires_grad]
        wanting = [each for each in inputs if each.requires_grad]
        return torch.autograd.grad(out, wanting, [torch.ones_like(each) for each in out])

    return run


def _both_ways(contenders: dict[str, Callable[..., object]], backward: bool) -> dict:
    return {name: both_ways(run) for name, run in contenders.items()} if backward else contenders


def _direction(backward: bool) -> str:
    return ", with backward" if backward else ""


def cases(device: torch.device, *, small: bool = False) -> Iterator[Case]:
    """All cases; ``small`` shrinks them so that a CPU can try the code (its times mean nothing)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    few = 16 if small else 1
    yield retrieve_case(device, False, batch=128 // few)
    for backward in (False, True):
        yield from (
            vision_case(device, dtype, backward, batch=128 // few),
            short_case(device, dtype, backward, groups=128 // few, share=50, rows=4, prefix=9),
            short_case(device, dtype, backward, groups=128 // few, share=50, rows=12, prefix=8),
            tree_case(device, dtype, backward, images=128 // few, prefix=5),
            tree_case(device, dtype, backward, images=128 // few, prefix=9),
        )
        yield from (
            activation_case(device, dtype, backward, op, rows=128 * 197 // few, width=3072)
            for op in ("quick_gelu", "gelu")
        )
        yield norm_case(device, dtype, backward, rows=128 * 197 // few, width=768)
    for rows, inner, outer in (
        (128 * 197, 768, 3072),
        (128 * 197, 3072, 768),
        (128 * 170, 512, 2048),
    ):
        yield product_case(device, dtype, rows=rows // few, inner=inner, outer=outer)


def _normal(device, dtype, seed, *shapes, grad=False) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(
        torch.randn(shape, device=device, generator=generator).to(dtype).requires_grad_(grad)
        for shape in shapes
    )


def frozen_linear_case(dtype, backward, *, rows: int, inputs: int, outputs: int) -> Case:
    """A product of a frozen weight on a CPU, packed, beside torch's own."""
    weight, bias = _normal(CPU, dtype, 0, (outputs, inputs), (outputs,))
    linear = ops.FrozenLinear(weight, bias)
    contenders = {
        "ours": linear,
        "reference": lambda x: linear(x, impl="reference"),
    }
    times = 2 if backward else 1
    return Case(
        what=f"frozen_linear {rows} x {inputs} -> {outputs}{_direction(backward)}",
        target="",
        flops=2 * rows * inputs * outputs * times,
        moved=dtype.itemsize * (rows * (inputs + outputs) + inputs * outputs) * times,
        draw=lambda seed: _normal(CPU, dtype, seed, (rows, inputs), grad=backward),
        contenders=_both_ways(contenders, backward),
    )


def retrieve_case(device, backward, *, batch: int, width: int = 768, k: int = 6) -> Case:
    """Retrieval over the paper's pool: float32, queries as they leave a bfloat16 tower."""
    pool_size = 20

    def retrieve(impl):
        return lambda query, keys, bias: ops.retrieve(query, keys, bias, k, impl=impl)

    def draw(seed):
        query, keys, bias = _normal(
            device, torch.float32, seed, (batch, width), (pool_size, width), (pool_size,)
        )
        return query.requires_grad_(backward), keys.requires_grad_(backward), bias

    contenders = {
        "ours": retrieve(None),
        **{impl: retrieve(impl) for impl in IMPLEMENTATIONS[device.type]},
        "eager": retrieve("reference"),
        "torch.compile": torch.compile(retrieve("reference"), fullgraph=True, dynamic=False),
    }
    rows = 4 * width * (batch + pool_size)
    return Case(
        what=f"retrieve B={batch} M={pool_size} K={k} Dv={width}{_direction(backward)}",
        target="6x eager, 2x torch.compile, under 12 us" if device.type == "cuda" else "3x eager",
        # Backward weighs K keys a query and K queries a key; it reads both once more and writes
        # their gradients.
        flops=2 * batch * width * (pool_size + (2 * k if backward else 0)),
        moved=rows * (3 if backward else 1) + batch * k * (16 if backward else 12),
        draw=draw,
        contenders=_both_ways(contenders, backward),
    )


def _attention_contenders(
    implementations, options: dict, mask: Tensor | None, flex, backward: bool
) -> dict:
    """Ours, concatenate + each SDPA backend, and compiled FlexAttention."""

    def concatenated(q, k, v, prefix_k, prefix_v):
        share = len(q) // len(prefix_k)
        prefixes = (each.repeat_interleave(share, 0) for each in (prefix_k, prefix_v))
        k, v = (torch.cat(pair, dim=2) for pair in zip(prefixes, (k, v), strict=True))
        return k, v

    def sdpa(backend):
        def run(q, k, v, prefix_k, prefix_v):
            k, v = concatenated(q, k, v, prefix_k, prefix_v)
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return run

    def flexible(q, k, v, prefix_k, prefix_v):
        return flex(q, *concatenated(q, k, v, prefix_k, prefix_v))

    def prefix_attention(impl):
        return lambda *tensors: ops.prefix_attention(*tensors, **options, impl=impl)

    contenders = {
        "ours": prefix_attention(None),
        **{impl: prefix_attention(impl) for impl in (*implementations, "reference")},
        **{f"SDPA {name}": sdpa(backend) for name, backend in BACKENDS.items()},
        "FlexAttention": flexible,
    }
    return _both_ways(contenders, backward)


def _flex(mask: Tensor | None, device: torch.device) -> Callable[..., Tensor]:
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    if mask is None:
        return compiled

    @functools.cache
    def block():
        def seen(batch, head, row, key):
            return mask[row, key]

        return create_block_mask(seen, None, None, *mask.shape, device=device)

    return lambda q, k, v: compiled(q, k, v, block_mask=block())


def _attention_case(
    what, target, device, dtype, backward, sizes, seen: int, options: dict, mask: Tensor | None
) -> Case:
    """``sizes``: N, G, H, R, L, P, d; ``seen``: (row, key) pairs of one sequence and head."""
    sequences, groups, heads, rows, length, prefix, width = sizes
    element = torch.finfo(dtype).bits // 8
    own = sequences * heads * length * width * element
    asking = sequences * heads * rows * width * element
    shared = groups * heads * prefix * width * element
    forward_flops = 4 * sequences * heads * seen * width
    forward_moved = 2 * asking + 2 * own + 2 * shared

    def draw(seed):
        fused, both = _normal(
            device,
            dtype,
            seed,
            (sequences, length, 3, heads, width),
            (2, groups, prefix, heads, width),
        )
        q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
        if rows < length:
            (q,) = _normal(device, dtype, seed + 1, (sequences, rows, heads, width))
            q = q.transpose(1, 2)
        prefix_k, prefix_v = both.transpose(2, 3).unbind(0)
        tensors = q, k, v, prefix_k, prefix_v
        return tuple(each.detach().requires_grad_(backward) for each in tensors)

    return Case(
        what=f"prefix_attention {what}{_direction(backward)}",
        target=target,
        # Backward forms the scores again and has four more products; it reads q, k, v, out and the
        # gradient and writes three.
        flops=forward_flops * (3.5 if backward else 1),
        moved=forward_moved + (4 * asking + 4 * own + 4 * shared if backward else 0),
        draw=draw,
        contenders=_attention_contenders(
            IMPLEMENTATIONS[device.type], options, mask, _flex(mask, device), backward
        ),
    )


def vision_case(device, dtype, backward, *, batch, heads=12, rows=197, prefix=8, width=64) -> Case:
    """An image tower, ViT-B/16's by default: every row sees all prompts and all rows."""
    sizes = batch, batch, heads, rows, rows, prefix, width
    what = f"vision B={batch} H={heads} L={rows} P={prefix} d={width}"
    target, seen = "1.2x the better alternative", rows * (rows + prefix)
    return _attention_case(what, target, device, dtype, backward, sizes, seen, {}, None)


def short_case(device, dtype, backward, *, groups, share, rows, prefix, heads=8, width=64) -> Case:
    """Causal sequences of few rows, ``share`` of them to a prefix, bot blind to it."""
    sizes = groups * share, groups, heads, rows, rows, prefix, width
    mask = torch.ones(rows, prefix + rows, dtype=torch.bool, device=device).tril(prefix)
    mask[0, :prefix] = False
    what = f"text N={groups * share} G={groups} H={heads} L={rows} P={prefix} d={width}"
    target = TEXT_TARGETS[device.type]
    options = {"causal": True, "blind": 1}
    seen = int(mask.sum())
    return _attention_case(what, target, device, dtype, backward, sizes, seen, options, mask)


def tree_case(device, dtype, backward, *, images, prefix, classes=50, last=False) -> Case:
    """The step's own call: the classes of an image as one sequence under the tree mask; of the last
    layer its eot rows alone."""
    # Words stand for tokens: one a word is what CLIP's tokenizer gives for most of these names.
    known: dict[str, int] = {}
    sequences = [
        [known.setdefault(word, len(known)) for word in f"bot a photo of a {name} . eot".split()]
        for name in CALTECH101[:classes]
    ]
    (forest,) = plant(sequences)
    visible = forest.visible.to(device)
    length = len(forest)
    mask = torch.cat([visible.new_ones(length, prefix), visible], dim=1)
    mask = mask[forest.eot.to(device)] if last else mask
    rows = len(mask)
    sizes = images, images, 8, rows, length, prefix, 64
    what = f"text as the step calls it N={images} H=8 R={rows} L={length} P={prefix} d=64, tree"
    target, seen = TEXT_TARGETS[device.type], int(mask.sum())
    return _attention_case(what, target, device, dtype, backward, sizes, seen, {"mask": mask}, mask)


def _rowwise_contenders(ours, plain, backward: bool) -> dict[str, Callable[..., object]]:
    contenders = {
        "ours": ours,
        "eager": plain,
        "torch.compile": torch.compile(plain, fullgraph=True, dynamic=False),
    }
    return _both_ways(contenders, backward)


def activation_case(device, dtype, backward, op: str, *, rows: int, width: int) -> Case:
    """The MLP's activation of the image tower."""
    element = torch.finfo(dtype).bits // 8
    plain = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}[op]
    return Case(
        what=f"{op} {rows}x{width}{_direction(backward)}",
        target="within 1.25x of the floor",
        flops=0,
        # Forward reads x and writes y; backward reads x and the gradient and writes one.
        moved=rows * width * element * (5 if backward else 2),
        draw=lambda seed: _normal(device, dtype, seed, (rows, width), grad=backward),
        contenders=_rowwise_contenders(getattr(ops, op), plain, backward),
    )


def norm_case(device, dtype, backward, *, rows: int, width: int) -> Case:
    """Residual add and LayerNorm of the image tower."""
    element = torch.finfo(dtype).bits // 8
    weight, bias = _normal(device, dtype, 0, (width,), (width,))

    def ours(x, update):
        return ops.add_layer_norm(x, update, weight, bias, 1e-5)

    def plain(x, update):
        total = x + update
        return total, F.layer_norm(total, (width,), weight, bias, 1e-5)

    return Case(
        what=f"add_layer_norm {rows}x{width}{_direction(backward)}",
        target="within 1.25x of the floor",
        flops=0,
        # Forward reads two and writes two; backward reads both gradients and the sum, writes one.
        moved=rows * width * element * (8 if backward else 4),
        draw=lambda seed: _normal(device, dtype, seed, (rows, width), (rows, width), grad=backward),
        contenders=_rowwise_contenders(ours, plain, backward),
    )


def product_case(device, dtype, *, rows: int, inner: int, outer: int) -> Case:
    """A frozen matrix product with its bias, and what 8-bit floats would make of it.

    FP8 has a scale for each row of x, found anew, and one for each output column of the weight,
    found once. "fp8 product alone" takes an x that the kernel before it has written as FP8.
    """
    element = torch.finfo(dtype).bits // 8
    weight, bias = _normal(device, dtype, 0, (outer, inner), (outer,))
    weight = weight * inner**-0.5
    small_weight, weight_scale = to_fp8(weight)

    def draw(seed):
        (x,) = _normal(device, dtype, seed + 1, (rows, inner))
        return x, *to_fp8(x)

    def fp8_product(x, scale):
        return torch._scaled_mm(
            x,
            small_weight.t(),
            scale_a=scale,
            scale_b=weight_scale.t(),
            bias=bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16,
        )

    convert = torch.compile(to_fp8, fullgraph=True, dynamic=False)
    return Case(
        what=f"frozen product [{rows}, {inner}] x [{inner}, {outer}]",
        target="",
        flops=2 * rows * inner * outer,
        moved=element * (rows * inner + inner * outer + rows * outer),
        draw=draw,
        contenders={
            "ours": lambda x, *_: F.linear(x, weight, bias),
            "eager": lambda x, *_: torch.addmm(bias, x, weight.t()),
            "fp8, converted by torch.compile": lambda x, *_: fp8_product(*convert(x)),
            "fp8 product alone": lambda _, *converted: fp8_product(*converted),
        },
        coarse={
            "fp8, converted by torch.compile": MAX_FP8_ERROR,
            "fp8 product alone": MAX_FP8_ERROR,
        },
    )


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, K] as FP8 and the float32 scale [N, 1] that each is to be multiplied with."""
    scale = x.abs().amax(dim=1, keepdim=True).float() / torch.finfo(FP8).max
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).to(FP8), scale
