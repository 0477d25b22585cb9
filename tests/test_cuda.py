"""The CUDA kernels: their logic run on the CPU against float64, their build, and a real GPU.

:mod:`cuda_on_cpu` compiles csrc/*.cu for the CPU. What runs there is every line of the kernels, of
their bindings and of lamp_fast.ops.cuda but for the stream; not what only hardware does (speed,
approximate exp2, memory faults). All tensors that the ops allocate are poisoned.
"""

import importlib
import math
import mmap
import os
import random
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import cuda_on_cpu
import pytest
import test_retrieve
import torch

from lamp_fast import ops
from lamp_fast.ops import contracts

SIMULATED = "cuda_on_cpu"
CSRC = Path(__file__).parents[1] / "csrc"
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or ops.implementations("prefix_attention")["cuda"] is not None,
    reason="torch sees no GPU, or lamp_fast._C has no CUDA",
)
impls = pytest.mark.parametrize("impl", [SIMULATED, pytest.param("cuda", marks=needs_gpu)])


@pytest.fixture(scope="module")
def native(pytestconfig):
    """The kernels on the CPU, in place of lamp_fast._C."""
    reason = cuda_on_cpu.why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = Path(pytestconfig.cache.mkdir("cuda_on_cpu"))
    return cuda_on_cpu.load_native(cuda_on_cpu.build(folder))


@pytest.fixture(scope="module")
def simulated(native):
    """lamp_fast.ops.cuda on them, as one more implementation for tensors on the CPU."""
    module = cuda_on_cpu.load_ops(native)
    sys.modules[SIMULATED + ".ops"] = module
    implementation = contracts.Implementation(SIMULATED + ".ops", ("cpu",))
    table = contracts.IMPLEMENTATIONS
    table["retrieve"][SIMULATED] = contracts.Implementation(
        SIMULATED + ".ops", ("cpu",), backward="reference"
    )
    table["prefix_attention"][SIMULATED] = implementation
    yield module
    for op in ("retrieve", "prefix_attention"):
        del table[op][SIMULATED]


@pytest.fixture(autouse=True)
def _fresh(request):
    """Poisoned memory, one thread order and, where a test simulates, the simulation."""
    if "impl" in request.fixturenames and request.getfixturevalue("impl") == SIMULATED:
        request.getfixturevalue("simulated")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
    if "native" in request.fixturenames:
        request.getfixturevalue("native").set_order(0)


def device(impl):
    return torch.device("cpu" if impl == SIMULATED else "cuda")


# The simulation itself.


def test_memory_of_the_ops_is_poisoned():
    assert torch.ones(1).new_empty(3).isnan().all()
    assert (torch.ones(1).new_empty(3, dtype=torch.int64) > 2**62).all()


def test_simulation_tells_a_race(native):
    values = list(range(64))
    wanted = [*values[1:], 0]
    found = []
    for order in range(4):
        native.set_order(order)
        assert native.run("neighbours_with_barrier", values) == wanted
        found.append(native.run("neighbours_without_barrier", values))
    assert len({tuple(each) for each in found}) > 1
    assert all(each != wanted for each in found)


def test_simulation_ends_what_waits_for_ever(native):
    with pytest.raises(RuntimeError, match="deadlock"):
        native.run("missing_thread", [])
    with pytest.raises(RuntimeError, match="different operations"):
        native.run("different_votes", [])
    assert native.run("neighbours_with_barrier", [1, 2])[:2] == [2, 0]


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "half"), (torch.bfloat16, "bfloat16")])
def test_simulated_numbers_are_those_of_torch(native, dtype, name):
    from_bits, to_bits = getattr(native, f"from_{name}_bits"), getattr(native, f"{name}_bits")
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    numbers = bits.view(dtype).float()
    ours = torch.tensor([from_bits(each & 0xFFFF) for each in bits.tolist()])
    assert torch.equal(ours.nan_to_num(7777.0), numbers.nan_to_num(7777.0))
    # All numbers, and what lies halfway and just beside halfway between two.
    numbers = numbers[numbers.isfinite()].sort().values
    halves = (numbers[1:].double() + numbers[:-1].double()).div(2).float()
    around = [halves, halves.nextafter(halves + 1), halves.nextafter(halves - 1)]
    numbers = torch.cat([numbers, *around, torch.tensor([1e6, -1e6, math.inf, 65519.0, 65520.0])])
    numbers = numbers[torch.randperm(len(numbers), generator=torch.manual_seed(0))[:20_000]]
    rounded = [to_bits(each) for each in numbers.tolist()]
    wanted = numbers.to(dtype).view(torch.int16).tolist()
    assert rounded == [each & 0xFFFF for each in wanted]


# retrieve: the tests of every implementation, and the sizes at its corners.

RETRIEVE_TESTS = [
    test_retrieve.test_ties_go_to_the_lower_index,
    test_retrieve.test_zero_rows_have_cosine_zero_and_no_gradient,
    test_retrieve.test_infinite_bias_forces_in_and_out,
    test_retrieve.test_nan_rows_count_nothing,
    test_retrieve.test_strided_and_expanded_views,
    test_retrieve.test_opcheck,
    test_retrieve.test_float32_of_any_size,
    test_retrieve.test_autocast_changes_nothing,
    test_retrieve.test_inputs_are_not_changed,
    test_retrieve.test_bias_takes_no_gradient,
]


@pytest.mark.parametrize("test", RETRIEVE_TESTS, ids=lambda test: test.__name__)
def test_retrieve_as_every_implementation(simulated, test):
    takes_dtype = "dtype" in test.__code__.co_varnames[: test.__code__.co_argcount]
    test(SIMULATED, *((torch.float32,) if takes_dtype else ()))


@pytest.mark.parametrize(
    "shape",  # B, M, Dv, K
    [
        *((0, 20, 8, 2), (1, 1, 1, 1), (37, 5, 7, 5), (128, 20, 24, 6), (3, 64, 33, 32)),
        *((2, 256, 17, 32), (1, 255, 132, 1), (4, 20, 768, 2), (5, 33, 130, 2)),
    ],
    ids=str,
)
def test_retrieve_matches_literal_oracle(simulated, shape):
    batch, pool_size, width, k = shape
    query, keys, bias = test_retrieve.draw(batch, pool_size, width)
    result = ops.retrieve(query, keys, bias, k, impl=SIMULATED)
    test_retrieve.assert_matches_oracle(result, query, keys, bias, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_retrieve_in_half_precision(simulated, dtype):
    test_retrieve.test_half_precision_is_decided_in_float32(SIMULATED, dtype)


def test_retrieve_reads_misaligned_rows(simulated):
    query, keys, bias = test_retrieve.draw(3, 5, 12)
    wanted = ops.retrieve(query, keys, bias, 2, impl="reference")
    spread = torch.full((3 * 13 + 1,), math.nan)
    rows = spread[1:].view(3, 13)[:, :12]
    rows.copy_(query)
    got = ops.retrieve(rows, keys, bias, 2, impl=SIMULATED)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_retrieve_writes_its_outputs_alone(simulated):
    query, keys, bias = test_retrieve.draw(5, 7, 3)
    indices = torch.full((7, 2), -77)
    similarity = torch.full((7, 2), math.nan)
    counts = torch.full((9,), -77)
    outputs = indices[1:6], similarity[1:6], counts[1:8]
    simulated.retrieve(query, keys, bias, 2, *outputs)
    test_retrieve.assert_matches_oracle(outputs, query, keys, bias, 2)
    assert indices[[0, 6]].tolist() == [[-77] * 2] * 2
    assert similarity[[0, 6]].isnan().all()
    assert counts[[0, 8]].tolist() == [-77] * 2


def test_retrieve_in_any_order_of_threads(native, simulated):
    query, keys, bias = test_retrieve.draw(7, 70, 20)
    keys[40] = keys[3]
    results = []
    for order in range(4):
        native.set_order(order)
        results.append(ops.retrieve(query, keys, bias, 9, impl=SIMULATED))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# prefix_attention.


def draw(n, g, h, r, length, p, d, *, dtype=torch.float32, seed=0, index=False, mask=False):
    """q, k, v, prefix_k, prefix_v, a direction, and options: an index, or a mask."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, h, r, d), *[(n, h, length, d)] * 2, *[(g, h, p, d)] * 2, (n, h, r, d)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    options = {}
    if index:
        options["prefix_index"] = torch.randint(g, (n,), generator=generator)
    if mask:
        options["mask"] = torch.rand(r, p + length, generator=generator) < 0.3
        options["mask"][torch.arange(r), torch.randint(p + length, (r,), generator=generator)] = (
            True
        )
    return tensors[:5], tensors[5], options


def results(tensors, direction, impl, dtype=None, **options):
    """Output and gradients of an implementation, on the CPU; zero where there is none."""
    where = torch.device("cpu") if impl == "reference" else device(impl)
    moved = [each.to(where, dtype).clone().requires_grad_() for each in tensors]
    options = {
        name: each.to(where) if isinstance(each, torch.Tensor) else each
        for name, each in options.items()
    }
    out = ops.prefix_attention(*moved, **options, impl=impl)
    direction = direction.to(where, dtype)
    gradients = torch.autograd.grad(out, moved, direction, materialize_grads=True)
    return [each.detach().cpu() for each in (out, *gradients)]


def budgets(tensors, direction, causal=False, blind=0, scale=None, mask=None, prefix_index=None):
    """How far every number of output and gradients may be off by our roundings, element by element.

    With e half a unit of float32, and sizes = |q| |k| scale, products of absolute values: a score
    is a sum of d products of a scaled q, off by (d + 3) e sizes. A weight takes that error and the
    one of its row's log-sum-exp, which has the largest of the row, three e a key (its exp2, the
    rescaling, the sum) and some e of its own size. Sums of n terms err by n e of their sizes, and
    what is made of erring numbers by those errors. ``out`` and the gradients are rounded once to
    the dtype, and the rounded ``out`` goes into delta = out . grad.
    """
    q, k, v, prefix_k, prefix_v = (each.double() for each in tensors)
    grad = direction.double()
    (sequences, _, rows, width), length, prefix = q.shape, k.shape[2], prefix_k.shape[2]
    group = prefix_index
    if group is None:
        group = torch.arange(sequences) // max(sequences // max(len(prefix_k), 1), 1)
    if mask is None:
        mask = torch.ones(length, prefix + length, dtype=torch.bool)
        mask[:blind, :prefix] = False
        mask = (mask.tril(prefix) if causal else mask)[length - rows :]
    keys, values = (torch.cat([x[group], y], dim=2) for x, y in ((prefix_k, k), (prefix_v, v)))
    scale = width**-0.5 if scale is None else scale
    e = torch.finfo(torch.float32).eps / 2
    dtype = torch.finfo(tensors[0].dtype)

    def rounding(x):
        return dtype.eps / 2 * x.abs() + dtype.smallest_normal * dtype.eps

    scores = (q @ keys.mT * scale).masked_fill(~mask, -math.inf)
    sizes = (q.abs() @ keys.abs().mT * scale).masked_fill(~mask, 0)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    weights = scores.softmax(dim=-1)
    largest = sizes.amax(dim=-1, keepdim=True)
    relative = e * ((2 * (width + 3) + 1) * largest + 3 * lse.abs() + 3 * keys.shape[2] + 16)
    out = weights @ values
    out_error = relative * (weights @ values.abs()) + rounding(out)

    products = grad @ values.mT
    delta = (grad * out).sum(dim=-1, keepdim=True)
    delta_error = (grad.abs() * (out_error + width * e * out.abs())).sum(dim=-1, keepdim=True)
    product_error = (width + 1) * e * (grad.abs() @ values.abs().mT)
    grad_scores = weights * (products - delta)
    error = (relative + 2 * e) * grad_scores.abs() + weights * (product_error + delta_error)

    def summed(factor, factor_error, other):
        """The error of factor @ other, whose sum runs over the last dimension of factor."""
        return (factor_error + terms * e * factor.abs()) @ other.abs()

    # The longest sums: of a query over its keys, of a prefix row over all sequences' rows.
    terms = max(keys.shape[2], rows * sequences) + 3
    grad_q = summed(grad_scores, error, keys) * scale
    grad_keys = summed(grad_scores.mT, error.mT, q) * scale
    grad_values = summed(weights.mT, (relative * weights).mT, grad)

    def of_prefix(x):
        return torch.zeros_like(prefix_k).index_add(0, group, x[:, :, :prefix])

    inner = [grad_q, *(x[:, :, prefix:] for x in (grad_keys, grad_values))]
    inner += [of_prefix(grad_keys), of_prefix(grad_values)]
    exact = [grad_scores @ keys * scale]
    both = grad_scores.mT @ q * scale, weights.mT @ grad
    exact += [x[:, :, prefix:] for x in both] + [of_prefix(x) for x in both]
    return [out_error, *(a + rounding(b) for a, b in zip(inner, exact, strict=True))]


def assert_close(tensors, direction, impl, **options):
    """Within twice the error of eager in the same dtype, and the budget."""
    ours = results(tensors, direction, impl, **options)
    exact = results(tensors, direction, "reference", torch.float64, **options)
    eager = results(tensors, direction, "reference", **options)
    names = ("out", "grad_q", "grad_k", "grad_v", "grad_prefix_k", "grad_prefix_v")
    bounds = budgets(tensors, direction, **options)
    for name, a, b, c, budget in zip(names, ours, exact, eager, bounds, strict=True):
        assert a.shape == b.shape
        assert a.dtype == tensors[0].dtype
        if b.numel():
            excess = (a - b).abs() - (2 * (c - b).abs().max() + budget)
            assert excess.max() <= 0, (name, excess.max(), budget.max())


CASES = [  # (N, G, H, R, L, P, d), what draw takes, what the op takes
    ((6, 2, 2, 5, 5, 3, 64), {}, {"causal": True, "blind": 1}),
    ((6, 2, 1, 12, 12, 9, 32), {}, {"causal": True}),
    ((3, 3, 2, 1, 1, 0, 64), {}, {"causal": True}),
    ((4, 1, 1, 7, 7, 37, 80), {}, {"causal": True, "blind": 1}),
    ((2, 2, 2, 32, 32, 16, 8), {}, {"causal": True, "blind": 4}),
    ((2, 1, 1, 77, 77, 4, 16), {}, {"causal": True, "blind": 1}),
    ((3, 3, 1, 5, 5, 4, 128), {}, {"scale": 0.3}),
    ((4, 2, 3, 2, 7, 10, 104), {}, {"causal": True, "blind": 6}),
    ((4, 2, 1, 3, 4, 1, 5), {}, {"blind": 9}),
    ((5, 3, 2, 4, 4, 3, 64), {"index": True}, {"causal": True, "blind": 1}),
    ((7, 4, 1, 2, 3, 2, 1), {"index": True}, {}),
    ((4, 2, 2, 6, 6, 3, 64), {"mask": True}, {}),
    ((2, 1, 1, 37, 40, 64, 33), {"mask": True}, {}),
    ((1, 1, 2, 3, 50, 0, 64), {"mask": True}, {}),
    ((3, 3, 1, 4, 9, 5, 100), {"mask": True, "index": True}, {}),
    ((0, 0, 2, 3, 3, 2, 8), {}, {"causal": True}),
    ((0, 3, 2, 3, 3, 2, 8), {"index": True}, {}),
    ((2, 2, 0, 3, 3, 2, 8), {}, {}),
    ((2, 1, 1, 0, 3, 2, 8), {}, {}),
]


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefix_attention_against_float64(impl, dtype, case):
    shape, drawn, options = case
    tensors, direction, more = draw(*shape, dtype=dtype, **drawn)
    assert_close(tensors, direction, impl, **options, **more)


def a_random_case(generator):
    """A case as those above, small enough for the simulation."""
    groups, heads = generator.randint(1, 3), generator.randint(1, 3)
    length, prefix = generator.randint(1, 14), generator.choice([0, 1, 4, 10, 16])
    rows, width = generator.randint(1, length), generator.randint(1, 128)
    shape = (groups * generator.randint(0, 3), groups, heads, rows, length, prefix, width)
    drawn = {"index": generator.random() < 0.4, "mask": generator.random() < 0.4}
    options = {}
    if not drawn["mask"]:
        options = {"causal": generator.random() < 0.7, "blind": generator.choice([0, 0, 1, 5])}
    return shape, drawn, options


@pytest.mark.parametrize(
    ("impl", "trials"),
    [(SIMULATED, 30), pytest.param("cuda", 2000, marks=[needs_gpu, pytest.mark.slow])],
)
def test_prefix_attention_of_random_shapes(impl, trials):
    generator = random.Random(0)
    for seed in range(trials):
        shape, drawn, options = a_random_case(generator)
        dtype = generator.choice([torch.float32, torch.float16, torch.bfloat16])
        tensors, direction, more = draw(*shape, dtype=dtype, seed=seed, **drawn)
        assert_close(tensors, direction, impl, **options, **more)


@impls
def test_views_without_a_copy_and_with_one(impl):
    tensors, direction, _ = draw(4, 2, 2, 5, 5, 3, 64)
    wanted = results(tensors, direction, impl, causal=True)
    q, k, v, prefix_k, prefix_v = (each.to(device(impl)) for each in tensors)
    fused = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous()  # [N, L, 3, H, d]
    own = fused.permute(2, 0, 3, 1, 4).unbind(0)
    rows = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (prefix_k, prefix_v)]
    # One element off the alignment of a vector; and with a stride in the last dimension.
    off = [x.new_full((x.numel() + 1,), math.nan)[1:].view_as(x).copy_(x) for x in tensors]
    wide = [x.new_full((*x.shape, 2), math.nan) for x in tensors]
    for x, room in zip(tensors, wide, strict=True):
        room[..., 0] = x
    for views in ([*own, *rows], off, [room[..., 0] for room in wide]):
        leaves = [view.to(device(impl)).detach().requires_grad_() for view in views]
        out = ops.prefix_attention(*leaves, causal=True, impl=impl)
        moved = direction.to(device(impl))
        # The gradient, too, comes in any layout.
        for grad in (moved, moved.transpose(1, 2).contiguous().transpose(1, 2)):
            got = torch.autograd.grad(out, leaves, grad, retain_graph=True)
            for a, b in zip((out.detach(), *got), wanted, strict=True):
                assert torch.equal(a.cpu(), b)
    leaves = [x.to(device(impl)).requires_grad_() for x in tensors]
    ops.prefix_attention(*leaves, causal=True, impl=impl).sum().backward()
    summed = results(tensors, torch.ones_like(direction), impl, causal=True)
    assert all(torch.equal(a.grad.cpu(), b) for a, b in zip(leaves, summed[1:], strict=True))


def sparse_memory(elements):
    """Zeros that take no room until they are written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, 4 * elements, flags=flags), dtype=torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space as Linux does")
def test_addresses_beyond_32_bits(simulated):
    far = 2**31 + 4
    memory = sparse_memory(7 * far)
    tensors, direction, _ = draw(2, 2, 2, 3, 3, 2, 8)

    def spread(dimension, like):
        """Whose index in one dimension leads 2^31 elements on, from a place of its own."""
        place = len(places) * 200
        places.append(place)
        strides = list(like.stride())
        strides[dimension] = far
        return memory.as_strided(like.shape, strides, place)

    for dimension in range(3):
        places = []
        views = [spread(dimension, each).copy_(each) for each in (*tensors, direction)]
        out, *gradients = (spread(dimension, each) for each in (tensors[0], *tensors))
        lse = torch.empty(2, 2, 3)
        *inputs, grad = views
        options = None, None, True, 0, 0.3
        simulated.prefix_attention(*inputs, *options, out, lse)
        simulated.prefix_attention_backward(
            grad, *inputs, out, lse, *options, True, True, *gradients
        )
        wanted = results(tensors, direction, SIMULATED, causal=True, scale=0.3)
        for a, b in zip((out, *gradients), wanted, strict=True):
            assert torch.equal(a, b)
    query, keys, bias = test_retrieve.draw(3, 3, 8)
    rows = [memory.as_strided((3, 8), (far, 1), place) for place in (0, 400)]
    got = ops.retrieve(rows[0].copy_(query), rows[1].copy_(keys), bias, 2, impl=SIMULATED)
    assert torch.equal(got[0], ops.retrieve(query, keys, bias, 2, impl=SIMULATED)[0])


@impls
def test_an_expanded_prefix(impl):
    tensors, direction, _ = draw(4, 1, 2, 5, 5, 3, 64)
    spread = [*tensors[:3], *(each.expand(4, -1, -1, -1) for each in tensors[3:])]
    one = results(tensors, direction, impl, causal=True)
    each = results(spread, direction, impl, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(one[:4], each[:4], strict=True))


@impls
def test_a_nan_reaches_the_rows_that_see_it_alone(impl):
    tensors, *_ = draw(2, 1, 2, 6, 6, 3, 40)
    healthy = ops.prefix_attention(
        *(each.to(device(impl)) for each in tensors), causal=True, blind=2, impl=impl
    ).cpu()
    for which, row, seers in [(0, 3, [3]), (1, 4, [4, 5]), (2, 2, [2, 3, 4, 5])]:
        spoilt = [each.clone() for each in tensors]
        spoilt[which][0, 1, row, 39] = math.nan
        out = ops.prefix_attention(
            *(each.to(device(impl)) for each in spoilt), causal=True, blind=2, impl=impl
        ).cpu()
        expected = torch.zeros_like(out, dtype=torch.bool)
        expected[0, 1, seers, 39 if which == 2 else slice(None)] = True
        assert torch.equal(out.isnan(), expected)
        assert torch.equal(out[~expected], healthy[~expected])
    spoilt = [each.clone() for each in tensors]
    spoilt[3][0, 0, 2, 0] = math.nan
    out = ops.prefix_attention(
        *(each.to(device(impl)) for each in spoilt), causal=True, blind=2, impl=impl
    )
    assert out[:, 0, 2:].isnan().all()
    assert out[:, 1].isfinite().all()
    assert out[:, 0, :2].isfinite().all()


@impls
def test_huge_and_infinite_scores(impl):
    tensors, direction, _ = draw(2, 2, 1, 5, 5, 3, 64)
    tensors[0] *= 1e3
    tensors[1] *= 1e3
    for each in results(tensors, direction, impl, causal=True):
        assert each.isfinite().all()
    # Scores of some 1e6 are off by some tens: one that leads by more has all the weight.
    above = torch.ones(5, 5, dtype=torch.bool).triu(1)
    q, k, v, prefix_k, prefix_v = (each.double() for each in tensors)
    scores = torch.cat([q @ prefix_k.mT, (q @ k.mT).masked_fill(above, -math.inf)], dim=-1) / 8
    first, second = scores.topk(2, dim=-1).values.unbind(-1)
    clear = first - second > 1000
    assert clear.float().mean() > 0.8
    values = torch.cat([prefix_v, v], dim=2)
    winners = scores.argmax(dim=-1)[..., None].expand(-1, -1, -1, 64)
    out = results(tensors, direction, impl, causal=True)[0]
    assert torch.equal(out[clear].double(), values.gather(2, winners)[clear])
    # A score of -inf weighs nothing, also where it comes first.
    q, k, v, prefix_k, prefix_v = (torch.ones_like(each) for each in tensors)
    prefix_k[:, :, :2] = -math.inf
    v[:] = 3.0
    leaves = [each.to(device(impl)) for each in (q, k, v, prefix_k, prefix_v)]
    out = ops.prefix_attention(*leaves, impl=impl).cpu()
    # One key of value 1 and five of value 3, all of the same score.
    torch.testing.assert_close(out, torch.full_like(out, 16 / 6), rtol=4e-7, atol=0)


@impls
def test_blind_rows_are_bit_for_bit_deaf_to_the_prefix(impl):
    tensors, *_ = draw(4, 2, 2, 5, 5, 3, 64)
    leaves = [each.to(device(impl)) for each in tensors]
    before = ops.prefix_attention(*leaves, causal=True, blind=2, impl=impl)
    leaves[3], leaves[4] = leaves[3].flip(0) * 3, leaves[4] - 9
    after = ops.prefix_attention(*leaves, causal=True, blind=2, impl=impl)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert (before[:, :, 2:] != after[:, :, 2:]).any(dim=-1).all()


@impls
def test_only_what_is_needed_is_computed(impl):
    tensors, direction, _ = draw(4, 2, 2, 5, 5, 3, 64)
    moved = [each.to(device(impl)) for each in (*tensors, direction)]
    direction = moved.pop()
    options = None, None, True, 1, 0.125
    out, lse = contracts.prefix_attention(*moved, *options, impl)
    both = contracts.prefix_attention_backward(
        direction, *moved, out, lse, *options, True, True, impl
    )
    own = contracts.prefix_attention_backward(
        direction, *moved, out, lse, *options, True, False, impl
    )
    prefix = contracts.prefix_attention_backward(
        direction, *moved, out, lse, *options, False, True, impl
    )
    assert all(torch.equal(a, b) for a, b in zip(both[:3], own[:3], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(both[3:], prefix[3:], strict=True))
    assert all(each.numel() == 0 for each in (*own[3:], *prefix[:3]))
    scores = (moved[0].double() @ moved[1].double().mT) * 0.125
    scores = scores.masked_fill(scores.new_ones(5, 5).triu(1).bool(), -math.inf)
    prefix_scores = moved[0].double() @ moved[3].double().repeat_interleave(2, 0).mT * 0.125
    prefix_scores[:, :, 0] = -math.inf
    wanted = torch.cat([scores, prefix_scores], dim=-1).logsumexp(dim=-1)
    # Scores of size up to 5 from 64 products, in float32.
    assert (lse - wanted).abs().max() <= 5 * 66 * 2**-23


@impls
def test_gradients_of_a_long_group_are_summed_in_parts(impl, request, monkeypatch):
    module = (
        request.getfixturevalue("simulated")
        if impl == SIMULATED
        else importlib.import_module("lamp_fast.ops.cuda")
    )
    for shape, drawn, options in CASES:
        tensors, direction, more = draw(*shape, **drawn)
        monkeypatch.setattr(module, "_ENOUGH_WALKS", 1000)
        monkeypatch.setattr(module, "_SHORT_WALK", 2)
        assert_close(tensors, direction, impl, **options, **more)
    tensors, direction, _ = draw(4, 1, 1, 32, 32, 2, 8)
    assert module._parts(tensors[0], tensors[3]) == 64
    monkeypatch.undo()
    # 128 rows are two short walks.
    assert module._parts(tensors[0], tensors[3]) == 2
    assert_close(tensors, direction, impl, causal=True)


def test_prefix_attention_in_any_order_of_threads(native, simulated, monkeypatch):
    monkeypatch.setattr(simulated, "_SHORT_WALK", 4)
    for drawn in ({}, {"mask": True}, {"index": True}):
        tensors, direction, options = draw(6, 2, 2, 5, 5, 3, 40, **drawn)
        options |= {} if "mask" in options else {"causal": True, "blind": 1}
        found = []
        for order in range(4):
            native.set_order(order)
            found.append(results(tensors, direction, SIMULATED, **options))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_blocks_beyond_a_grid_are_walked(native, simulated):
    """LAMP_MOST_BLOCKS is 3 there: what needs more blocks of work takes several rounds."""
    before = native.blocks()
    tensors, direction, _ = draw(60, 2, 2, 4, 4, 2, 32)
    assert_close(tensors, direction, SIMULATED, causal=True)
    # Forward, gradients of queries, of keys, and of the prefix, where 2 * 2 * 2 rows fit one block.
    assert native.blocks() - before == 3 + 3 + 3 + 1


def test_an_index_out_of_range_ends_the_launch(simulated):
    tensors, *_ = draw(2, 2, 1, 2, 2, 1, 8)
    options = torch.tensor([0, 2]), None, True, 0, 1.0
    with pytest.raises(RuntimeError, match=r"^prefix_attention: a kernel trapped"):
        contracts.prefix_attention(*tensors, *options, SIMULATED)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_prefix_attention_writes_its_outputs_alone(simulated, needs):
    """Rows beside each other in one memory, with a guard before, between and behind them."""
    tensors, direction, _ = draw(2, 1, 1, 3, 3, 2, 20)

    def guarded(like):
        n, h, rows, width = like.shape
        room = torch.full((n, rows + 2, h, width + 4), -77.0)
        return room, room[:, 1:-1, :, :width].transpose(1, 2)

    room, out = guarded(tensors[0])
    lse = torch.empty(2, 1, 3)
    options = None, None, True, 1, 0.2
    simulated.prefix_attention(*tensors, *options, out, lse)
    rooms, gradients = zip(*(guarded(each) for each in tensors), strict=True)
    simulated.prefix_attention_backward(direction, *tensors, out, lse, *options, *needs, *gradients)
    for memory in (room, *rooms):
        assert (memory[:, [0, -1]] == -77).all()
        assert (memory[..., -4:] == -77).all()
    for which, (memory, gradient) in enumerate(zip(rooms, gradients, strict=True)):
        if needs[which > 2]:
            assert not gradient.isnan().any()
            assert (gradient != -77).all()
        else:
            assert (memory == -77).all()


@impls
def test_prefix_attention_opcheck(impl):
    for drawn in ({}, {"mask": True}, {"index": True}):
        tensors, direction, options = draw(4, 2, 2, 3, 3, 2, 8, **drawn)
        moved = [each.to(device(impl)) for each in (*tensors, direction)]
        direction = moved.pop()
        more = [options.get("prefix_index"), options.get("mask")]
        more = [None if each is None else each.to(device(impl)) for each in more]
        arguments = (*moved, *more, "mask" not in options, 0, 0.3, impl)
        torch.library.opcheck(contracts.prefix_attention, arguments)
        out, lse = contracts.prefix_attention(*arguments)
        torch.library.opcheck(
            contracts.prefix_attention_backward,
            (direction, *moved, out, lse, *arguments[5:-1], True, True, impl),
        )


# The build.


def test_without_cuda_the_import_says_why():
    native = types.SimpleNamespace(
        build_info=lambda: {"cuda": False, "cuda_reason": "no nvcc in PATH"},
        PrefixAttentionParams=object,
        PrefixAttentionBackwardParams=object,
    )
    with pytest.raises(ImportError, match=r"^lamp_fast\._C has no CUDA: no nvcc in PATH$"):
        cuda_on_cpu.load_ops(native)


def test_the_build_is_for_both_architectures():
    native = pytest.importorskip("lamp_fast._C")
    info = native.build_info()
    if not info["cuda"]:
        pytest.skip(info["cuda_reason"])
    if os.environ.get("CUDAARCHS"):
        pytest.skip("CUDAARCHS decides")
    assert info["cuda_architectures"] == "sm_80 sm_90"
    assert ops.implementations("prefix_attention")["cuda"] is None


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cu")), ids=lambda path: path.stem)
def test_kernels_compile_without_spills(source, tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc")
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in (80, 90)]
    run = subprocess.run(
        [nvcc, "-std=c++17", "-O3", *targets, "-Xptxas=-v", "-c", source, "-o", tmp_path / "o"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", run.stderr)
    assert len(spills) > 0 or source.stem == "cuda_devices"
    assert set(spills) <= {"0"}


# A real GPU.


@needs_gpu
def test_a_graph_captures_forward_and_backward():
    tensors, direction, options = draw(6, 2, 2, 5, 5, 3, 64, index=True)
    leaves = [each.cuda().requires_grad_() for each in tensors]
    index, direction = options["prefix_index"].cuda(), direction.cuda()
    query, keys, bias = (each.cuda() for each in test_retrieve.draw(9, 20, 64))

    def step():
        out = ops.prefix_attention(*leaves, prefix_index=index, causal=True, blind=1, impl="cuda")
        gradients = torch.autograd.grad(out, leaves, direction)
        return out, *gradients, *contracts.retrieve(query, keys, bias, 3, "cuda")

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for each in leaves:
            each.mul_(-0.5)
        query.neg_()
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_two_runs_give_the_same_bits():
    tensors, direction, _ = draw(640, 8, 8, 12, 12, 9, 64, dtype=torch.bfloat16)
    one, two = (results(tensors, direction, "cuda", causal=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_tensors_say_on_which_device():
    tensors, *_ = draw(4, 2, 2, 5, 5, 3, 64)
    one, two = (
        ops.prefix_attention(*(each.to(where) for each in tensors), causal=True, impl="cuda")
        for where in ("cuda:0", "cuda:1")
    )
    assert two.device == torch.device("cuda", 1)
    assert torch.equal(one.cpu(), two.cpu())
    assert torch.cuda.current_device() == 0
