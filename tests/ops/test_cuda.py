"""The CUDA kernels: their logic run on the CPU, and their build.

:mod:`cuda_on_cpu` compiles csrc/*.cu for the CPU. What runs there is every line of the kernels, of
their bindings and of lamp_fast.ops.cuda but for the stream; not what only hardware does (speed,
the approximate power of two, memory faults). On a GPU the tests of every implementation run them.
"""

import math
import mmap
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import calls
import cuda_on_cpu
import pytest
import test_prefix_attention
import test_retrieve
import torch
import under_test

from lamp_fast import ops
from lamp_fast.ops import dispatch

SIMULATED = "cuda_on_cpu"
CSRC = Path(__file__).parents[2] / "csrc"
DTYPES = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(scope="module")
def native(pytestconfig, tmp_path_factory):
    """The kernels on the CPU, in place of lamp_fast._C."""
    reason = cuda_on_cpu.why_not()
    if reason is not None:
        pytest.skip(reason)
    kept = getattr(pytestconfig, "cache", None)  # pytest may be told to keep nothing
    folder = Path(kept.mkdir("cuda_on_cpu")) if kept else tmp_path_factory.mktemp("cuda_on_cpu")
    return cuda_on_cpu.load_native(cuda_on_cpu.build(folder))


@pytest.fixture(scope="module")
def simulated(native):
    """lamp_fast.ops.cuda on them, as one more implementation for tensors on the CPU."""
    module = cuda_on_cpu.load_ops(native)
    name = f"{SIMULATED}.ops"
    sys.modules[name] = module
    table = dispatch.IMPLEMENTATIONS
    table["retrieve"][SIMULATED] = dispatch.Implementation(name, ("cpu",), backward="reference")
    table["prefix_attention"][SIMULATED] = dispatch.Implementation(name, ("cpu",))
    yield module
    for op in ("retrieve", "prefix_attention"):
        del table[op][SIMULATED]
    del sys.modules[name]


@pytest.fixture
def in_orders(native):
    """Calls a function with the threads of a block, and the blocks, in several orders."""

    def results(function):
        found = []
        for order in range(4):
            native.set_order(order)
            found.append(function())
        return found

    yield results
    native.set_order(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with under_test.poisoned_memory():
        yield


# The simulation itself.


def test_simulation_tells_a_race(native, in_orders):
    values = list(range(64))
    wanted = [*values[1:], 0]
    assert in_orders(lambda: native.run("neighbours_with_barrier", values)) == [wanted] * 4
    found = in_orders(lambda: native.run("neighbours_without_barrier", values))
    assert wanted not in found
    assert len({tuple(each) for each in found}) > 1


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


def test_retrieve_in_any_order_of_threads(simulated, in_orders):
    query, keys, bias = test_retrieve.draw(7, 70, 20)
    keys[40] = keys[3]
    one, *others = in_orders(lambda: ops.retrieve(query, keys, bias, 9, impl=SIMULATED))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_retrieve_of_random_shapes(simulated, seed):
    calls.assert_accurate(calls.draw("retrieve", seed, large=False), SIMULATED, torch.float32)


# prefix_attention.

CASES = {  # N, G, H, L, P, d; options
    "text": ((6, 2, 2, 5, 3, 64), {"causal": True, "blind": 1}),
    "longer text": ((6, 2, 1, 12, 9, 32), {"causal": True}),
    "one row": ((3, 3, 2, 1, 0, 64), {"causal": True}),
    "long prefix": ((4, 1, 1, 7, 37, 80), {"causal": True, "blind": 1}),
    "longest short rows": ((2, 2, 2, 32, 16, 8), {"causal": True, "blind": 4}),
    "uncut text": ((2, 1, 1, 77, 4, 16), {"causal": True, "blind": 1}),
    "not causal": ((3, 3, 1, 5, 4, 128), {"scale": 0.3}),
    "last rows": ((4, 2, 3, 7, 10, 104), {"causal": True, "blind": 6, "rows": 2}),
    "all blind": ((4, 2, 1, 4, 1, 5), {"blind": 9, "rows": 3}),
    "indexed": ((5, 3, 2, 4, 3, 64), {"causal": True, "blind": 1, "index": [2, 0, 2, 2, 0]}),
    "indexed, d = 1": ((7, 4, 1, 3, 2, 1), {"index": [3, 3, 3, 0, 2, 0, 3], "rows": 2}),
    "tree": ((4, 2, 2, 6, 3, 64), {"tree": 0.3}),
    "tree of several words": ((2, 1, 1, 40, 64, 33), {"tree": 0.2, "rows": 37}),
    "tree, read out": ((1, 1, 2, 50, 0, 64), {"tree": 0.3, "rows": 3}),
    "tree, indexed": ((3, 3, 1, 9, 5, 100), {"tree": 0.3, "rows": 4, "index": [1, 1, 0]}),
    "sharp": ((2, 1, 1, 9, 4, 32), {"size": 20.0}),
    "no sequences": ((0, 0, 2, 3, 2, 8), {"causal": True}),
    "no sequences, indexed": ((0, 3, 2, 3, 2, 8), {"index": []}),
    "no heads": ((2, 2, 0, 3, 2, 8), {}),
    "no rows": ((2, 1, 1, 3, 2, 8), {"rows": 0}),
}


def case(name, **options):
    shape, more = CASES[name]
    return calls.prefix_attention(*shape, **more, **options)


def run(call):
    """Output and gradients in float32."""
    return list(calls.run(call, SIMULATED, torch.float32, torch.device("cpu")).values())


def arguments(call):
    """Tensors of the float32 call, and its options in the order of the schema without the name."""
    tensors = [each.float() for each in call.tensors]
    known = {"prefix_index": None, "mask": None, "causal": False, "blind": 0}
    known |= {"scale": tensors[0].shape[3] ** -0.5} | call.options
    return tensors, list(known.values())


def all_equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_prefix_attention_against_float64(simulated, name, dtype):
    calls.assert_accurate(case(name), SIMULATED, dtype)


@pytest.mark.parametrize("seed", range(30))
def test_prefix_attention_of_random_shapes(simulated, seed):
    call = calls.draw("prefix_attention", seed, large=False)
    calls.assert_accurate(call, SIMULATED, DTYPES[seed % 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [12, 40])
def test_gradients_of_a_saturated_softmax(simulated, dtype, length):
    test_prefix_attention.test_gradients_of_a_saturated_softmax(SIMULATED, dtype, length)


def test_prefix_attention_opcheck(simulated):
    for name in ("tree", "indexed"):
        tensors, options = arguments(case(name))
        torch.library.opcheck(torch.ops.lamp_fast.prefix_attention, (*tensors, *options, SIMULATED))
        out, lse = torch.ops.lamp_fast.prefix_attention(*tensors, *options, SIMULATED)
        torch.library.opcheck(
            torch.ops.lamp_fast.prefix_attention_backward,
            (torch.ones_like(out), *tensors, out, lse, *options, True, True, SIMULATED),
        )


def test_views_without_a_copy_and_with_one(simulated):
    call = case("text")
    wanted, (above,) = run(call), calls.gradients_from_above(call, [call.tensors[0]])
    tensors, (*_, causal, blind, _) = arguments(call)
    q, k, v, *prefix = tensors
    fused = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous()  # [N, L, 3, H, d]
    own = fused.permute(2, 0, 3, 1, 4).unbind(0)
    rows = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in prefix]
    # One element off the alignment of a vector; and with a stride in the last dimension.
    off = [x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x) for x in tensors]
    wide = [x.new_empty((*x.shape, 2))[..., 0].copy_(x) for x in tensors]
    for views in ([*own, *rows], off, wide):
        leaves = [view.detach().requires_grad_() for view in views]
        out = ops.prefix_attention(*leaves, causal=causal, blind=blind, impl=SIMULATED)
        # The gradient, too, comes in any layout.
        for grad in (above, above.transpose(1, 2).contiguous().transpose(1, 2)):
            got = torch.autograd.grad(out, leaves, grad, retain_graph=True)
            assert all_equal([out.detach(), *got], wanted)
        expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
        assert all_equal(expanded, torch.autograd.grad(out, leaves, torch.ones_like(out)))


def test_an_expanded_prefix(simulated):
    one = calls.prefix_attention(4, 1, 2, 5, 3, 64, causal=True)
    spread = [each.expand(4, -1, -1, -1) for each in one.tensors[3:]]
    each = calls.Call("prefix_attention", [*one.tensors[:3], *spread], options=one.options)
    assert all_equal(run(one)[:4], run(each)[:4])


def sparse_memory(elements):
    """Zeros that take no room until they are written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, 4 * elements, flags=flags), dtype=torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space as Linux does")
def test_addresses_beyond_32_bits(simulated):
    far = 2**31 + 4
    memory = sparse_memory(7 * far)
    call = calls.prefix_attention(2, 2, 2, 3, 2, 8, causal=True, scale=0.3)
    wanted, (above,) = run(call), calls.gradients_from_above(call, [call.tensors[0]])
    tensors, options = arguments(call)

    def spread(dimension, like):
        """Whose index in one dimension leads 2^31 elements on, from a place of its own."""
        places.append(len(places) * 200)
        strides = list(like.stride())
        strides[dimension] = far
        return memory.as_strided(like.shape, strides, places[-1])

    for dimension in range(3):
        places = []
        *inputs, grad = (spread(dimension, each).copy_(each) for each in (*tensors, above))
        out, *gradients = (spread(dimension, each) for each in (tensors[0], *tensors))
        lse = torch.empty(2, 2, 3)
        simulated.prefix_attention(*inputs, *options, out, lse)
        simulated.prefix_attention_backward(
            grad, *inputs, out, lse, *options, True, True, *gradients
        )
        assert all_equal([out, *gradients], wanted)
    query, keys, bias = test_retrieve.draw(3, 3, 8)
    rows = [memory.as_strided((3, 8), (far, 1), place) for place in (0, 400)]
    got = ops.retrieve(rows[0].copy_(query), rows[1].copy_(keys), bias, 2, impl=SIMULATED)
    assert all_equal(got, ops.retrieve(query, keys, bias, 2, impl=SIMULATED))


def test_a_nan_reaches_the_rows_that_see_it_alone(simulated):
    tensors, _ = arguments(calls.prefix_attention(2, 1, 2, 6, 3, 40))

    def attend():
        return ops.prefix_attention(*tensors, causal=True, blind=2, impl=SIMULATED)

    healthy = attend()
    for which, row, seers in [(0, 3, [3]), (1, 4, [4, 5]), (2, 2, [2, 3, 4, 5])]:
        before = tensors[which][0, 1, row, 39].item()
        tensors[which][0, 1, row, 39] = math.nan
        out = attend()
        expected = torch.zeros_like(out, dtype=torch.bool)
        expected[0, 1, seers, 39 if which == 2 else slice(None)] = True
        assert torch.equal(out.isnan(), expected)
        assert torch.equal(out[~expected], healthy[~expected])
        tensors[which][0, 1, row, 39] = before
    tensors[3][0, 0, 2, 0] = math.nan
    out = attend()
    assert out[:, 0, 2:].isnan().all()
    assert torch.equal(out[:, 1], healthy[:, 1])
    # Which also says that blind rows are deaf to the prefix.
    assert torch.equal(out[:, 0, :2], healthy[:, 0, :2])


def test_huge_and_infinite_scores(simulated):
    call = calls.prefix_attention(2, 2, 1, 5, 3, 64, causal=True, size=1e3)
    out, *gradients = run(call)
    assert all(each.isfinite().all() for each in (out, *gradients))
    # Scores of some 1e6 are off by some tens: one that leads by more has all the weight.
    q, k, v, prefix_k, prefix_v = (each.float().double() for each in call.tensors)
    above = torch.ones(5, 5, dtype=torch.bool).triu(1)
    scores = torch.cat([q @ prefix_k.mT, (q @ k.mT).masked_fill(above, -math.inf)], dim=-1) / 8
    first, second = scores.topk(2, dim=-1).values.unbind(-1)
    clear = first - second > 1000
    assert clear.float().mean() > 0.8
    winners = scores.argmax(dim=-1)[..., None].expand(-1, -1, -1, 64)
    values = torch.cat([prefix_v, v], dim=2)
    assert torch.equal(out[clear].double(), values.gather(2, winners)[clear])
    # A score of -inf weighs nothing, also where it comes first.
    q, k, v, prefix_k, prefix_v = (
        torch.ones_like(each, dtype=torch.float32) for each in call.tensors
    )
    prefix_k[:, :, :2] = -math.inf
    out = ops.prefix_attention(q, k, 3 * v, prefix_k, prefix_v, impl=SIMULATED)
    # One key of value 1 and five of value 3, all of the same score: six roundings.
    torch.testing.assert_close(out, torch.full_like(out, 16 / 6), rtol=6 * 2**-24, atol=0)


def test_scores_far_below_zero(simulated):
    """Odd and even numbers of keys, where no key must not count as one of score 0."""
    call = calls.prefix_attention(2, 2, 1, 6, 3, 64, causal=True, blind=2)
    q, k, _, prefix_k, _ = call.tensors
    for each, mean in ((q, 10.0), (k, -10.0), (prefix_k, -10.0)):
        each.mul_(0.01).add_(mean)
    calls.assert_accurate(call, SIMULATED, torch.float32)


def test_only_what_is_needed_is_computed(simulated):
    tensors, options = arguments(case("text"))
    out, lse = torch.ops.lamp_fast.prefix_attention(*tensors, *options, SIMULATED)
    both, own, prefix = (
        torch.ops.lamp_fast.prefix_attention_backward(
            torch.ones_like(out), *tensors, out, lse, *options, *needs, SIMULATED
        )
        for needs in ((True, True), (True, False), (False, True))
    )
    assert all_equal(both, (*own[:3], *prefix[3:]))
    assert all(each.numel() == 0 for each in (*own[3:], *prefix[:3]))


def test_the_log_sum_exp_is_of_the_scores_that_a_row_sees(simulated):
    tensors, options = arguments(case("text"))
    _, lse = torch.ops.lamp_fast.prefix_attention(*tensors, *options, SIMULATED)
    q, k, _, prefix_k, _ = (each.double() for each in tensors)
    own = (q @ k.mT / 8).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    prefix = q @ prefix_k.repeat_interleave(3, dim=0).mT / 8
    prefix[:, :, 0] = -math.inf
    wanted = torch.cat([prefix, own], dim=-1).logsumexp(dim=-1)
    # Scores of size up to 5 from 64 products, in float32.
    assert (lse - wanted).abs().max() <= 5 * 66 * 2**-23


def test_gradients_of_a_long_group_are_summed_in_parts(simulated, monkeypatch):
    q, prefix_k = torch.empty(4, 1, 32, 8), torch.empty(1, 1, 2, 8)
    # 128 rows are two short walks.
    assert simulated._parts(q, prefix_k) == 2
    calls.assert_accurate(
        calls.prefix_attention(4, 1, 1, 32, 2, 8, causal=True), SIMULATED, torch.float32
    )
    monkeypatch.setattr(simulated, "_ENOUGH_WALKS", 1000)
    monkeypatch.setattr(simulated, "_SHORT_WALK", 2)
    assert simulated._parts(q, prefix_k) == 64
    for name in CASES:
        calls.assert_accurate(case(name), SIMULATED, torch.float32)


def test_prefix_attention_in_any_order_of_threads(simulated, in_orders, monkeypatch):
    monkeypatch.setattr(simulated, "_SHORT_WALK", 4)
    for name in ("text", "tree", "indexed"):
        one, *others = in_orders(lambda name=name: run(case(name)))
        assert all(all_equal(one, other) for other in others)


def test_blocks_beyond_a_grid_are_walked(native, simulated):
    """LAMP_MAX_BLOCKS is 3 there: what needs more blocks of work takes several rounds."""
    before = native.blocks()
    run(calls.prefix_attention(60, 2, 2, 4, 2, 32, causal=True))
    # Forward, gradients of queries, of keys, and of the prefix, where 2 * 2 * 2 rows fit one block.
    assert native.blocks() - before == 3 + 3 + 3 + 1


def test_an_index_out_of_range_ends_the_launch(simulated):
    tensors, options = arguments(calls.prefix_attention(2, 2, 1, 2, 1, 8, index=[0, 2]))
    with pytest.raises(RuntimeError, match=r"^prefix_attention: a kernel trapped"):
        torch.ops.lamp_fast.prefix_attention(*tensors, *options, SIMULATED)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_prefix_attention_writes_its_outputs_alone(simulated, needs):
    """Rows beside each other in one memory, with a guard before, between and behind them."""
    tensors, options = arguments(calls.prefix_attention(2, 1, 1, 3, 2, 20, causal=True))

    def guarded(like):
        sequences, heads, rows, width = like.shape
        room = torch.full((sequences, rows + 2, heads, width + 4), -77.0)
        return room, room[:, 1:-1, :, :width].transpose(1, 2)

    room, out = guarded(tensors[0])
    lse = torch.empty(2, 1, 3)
    simulated.prefix_attention(*tensors, *options, out, lse)
    rooms, gradients = zip(*(guarded(each) for each in tensors), strict=True)
    simulated.prefix_attention_backward(
        torch.ones_like(out), *tensors, out, lse, *options, *needs, *gradients
    )
    for memory in (room, *rooms):
        assert (memory[:, [0, -1]] == -77).all()
        assert (memory[..., -4:] == -77).all()
    for which, (memory, gradient) in enumerate(zip(rooms, gradients, strict=True)):
        if needs[which > 2]:
            assert not gradient.isnan().any()
            assert (gradient != -77).all()
        else:
            assert (memory == -77).all()


# The build.


def test_without_cuda_the_import_says_why():
    native = types.SimpleNamespace(
        build_info=lambda: {"cuda": False, "cuda_reason": "no nvcc in PATH"},
        RetrieveParams=object,
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
