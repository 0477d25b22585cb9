"""retrieve against a literal oracle in Python floats (float64), for every implementation."""

import math
import os

import calls
import pytest
import torch
import under_test

from lamp_fast import ops
from lamp_fast.errors import InputError

every_implementation = under_test.implementations("retrieve")
every_case = under_test.cases("retrieve", torch.float32, torch.float64)
every_float64 = under_test.implementations("retrieve", torch.float64)


def retrieve(query, keys, bias, k, *, impl):
    """The op where the implementation runs; results on the CPU."""
    device = under_test.device(impl)
    moved = (each.to(device) for each in (query, keys, bias))
    return tuple(each.cpu() for each in ops.retrieve(*moved, k, impl=impl))


SHAPES = [  # B, M, Dv, K
    (0, 5, 8, 2),
    (1, 1, 1, 1),
    (1, 20, 768, 2),
    (3, 5, 7, 5),
    (4, 20, 13, 6),
    (7, 64, 33, 32),
    (2, 256, 17, 32),
    (33, 20, 128, 4),
]


def cosines(query, keys):
    """Literal loops in float64: list of B lists of M cosines."""

    def cosine(a, b):
        if not any(a) or not any(b):
            return math.nan if any(map(math.isnan, a + b)) else 0.0
        dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
        return dot / (math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b)))

    return [[cosine(a, b) for b in keys.double().tolist()] for a in query.double().tolist()]


def choose(scores, k):
    """The k largest of a list, the lower index first, ascending."""
    remaining = list(range(len(scores)))
    chosen = []
    for _ in range(k):
        best = remaining[0]
        for candidate in remaining[1:]:
            if scores[candidate] > scores[best]:
                best = candidate
        remaining.remove(best)
        chosen.append(best)
    return sorted(chosen)


def error_bound(dtype, width):
    """How far a similarity may be from the exact cosine.

    Sums of `width` float64 terms err by at most width * u64 of the sum of their sizes, and a dot
    product of unit rows has sum of sizes at most 1 (Cauchy-Schwarz); two norms, a root, a division
    and a product add a few u64. Rounding to the dtype adds u of a number of at most 1.
    """
    unit64 = 2.0**-53
    return 2 * (width + 8) * unit64 + (2.0**-24 if dtype is torch.float32 else 0)


def assert_matches_oracle(result, query, keys, bias, k):
    indices, similarity, counts = result
    batch, pool_size = len(query), len(keys)
    assert indices.shape == similarity.shape == (batch, k)
    assert indices.dtype == counts.dtype == torch.int64
    assert similarity.dtype == torch.promote_types(query.dtype, torch.float32)
    bound = error_bound(similarity.dtype, query.shape[1])
    # A score is rounded once more when the bias is added, to a number of at most 1 + |b|.
    finite = bias[bias.isfinite()].abs().max().item() if bias.isfinite().any() else 0.0
    tie = 2 * (bound + (1 + finite) * torch.finfo(similarity.dtype).eps)
    for b, row in enumerate(cosines(query, keys)):
        scores = [s + x for s, x in zip(row, bias.tolist(), strict=True)]
        got = indices[b].tolist()
        assert got == sorted(set(got))
        wanted = choose(scores, k)
        if got != wanted:
            worst = min(scores[m] for m in got)
            best_left = max(scores[m] for m in range(pool_size) if m not in got)
            assert best_left - worst <= tie, (b, got, wanted)
        for j, m in enumerate(got):
            assert abs(similarity[b, j].item() - row[m]) <= bound
    literal = torch.zeros(pool_size, dtype=torch.int64)
    for m in indices.flatten().tolist():
        literal[m] += 1
    assert torch.equal(counts, literal)


def draw(batch, pool_size, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, width, generator=generator, dtype=dtype)
    keys = torch.randn(pool_size, width, generator=generator, dtype=dtype)
    bias = torch.randn(pool_size, generator=generator) * 0.01
    return query, keys, bias


@every_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_literal_oracle(impl, dtype, shape):
    batch, pool_size, width, k = shape
    query, keys, bias = draw(batch, pool_size, width, dtype)
    assert_matches_oracle(retrieve(query, keys, bias, k, impl=impl), query, keys, bias, k)


@under_test.cases("retrieve", torch.float16, torch.bfloat16)
def test_half_precision_is_decided_in_float32(impl, dtype):
    query, keys, bias = draw(5, 20, 24, dtype)
    result = retrieve(query, keys, bias, 3, impl=impl)
    assert result[1].dtype == torch.float32
    assert_matches_oracle(result, query, keys, bias, 3)


@every_implementation
def test_autocast_changes_nothing(impl):
    query, keys, bias = draw(9, 20, 64)
    plain = gradients(query, keys, bias, 3, impl)
    with torch.autocast(under_test.device(impl).type, dtype=torch.bfloat16):
        cast = gradients(query, keys, bias, 3, impl)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@every_case
def test_ties_go_to_the_lower_index(impl, dtype):
    query = torch.ones(3, 6, dtype=dtype)
    keys = torch.ones(40, 6, dtype=dtype)
    indices, similarity, counts = retrieve(query, keys, torch.zeros(40), 7, impl=impl)
    assert indices.tolist() == [list(range(7))] * 3
    assert counts.tolist() == [3] * 7 + [0] * 33
    assert (similarity - 1).abs().max() <= error_bound(dtype, 6)
    bias = torch.zeros(40)
    bias[[5, 11, 30]] = 0.5
    assert retrieve(query, keys, bias, 4, impl=impl)[0].tolist() == [[0, 5, 11, 30]] * 3


@every_case
def test_zero_rows_have_cosine_zero_and_no_gradient(impl, dtype):
    query, keys, _ = draw(3, 4, 5, dtype)
    query[1] = 0
    keys[2] = 0
    bias = torch.zeros(4)
    assert_matches_oracle(retrieve(query, keys, bias, 4, impl=impl), query, keys, bias, 4)
    _, similarity, _, grad_query, grad_keys = gradients(query, keys, bias, 4, impl)
    assert similarity[1].tolist() == [0] * 4
    assert similarity[:, 2].tolist() == [0] * 3
    assert grad_query[1].tolist() == grad_keys[2].tolist() == [0] * 5
    assert grad_query.isfinite().all()
    assert grad_keys.isfinite().all()


@every_case
def test_infinite_bias_forces_in_and_out(impl, dtype):
    query, keys, _ = draw(6, 8, 5, dtype)
    bias = torch.zeros(8)
    bias[6] = math.inf
    bias[:4] = -math.inf
    for k, wanted in [(1, {6}), (4, {4, 5, 6, 7}), (6, {0, 1, 4, 5, 6, 7})]:
        result = retrieve(query, keys, bias, k, impl=impl)
        assert all(set(row) == wanted for row in result[0].tolist())
        assert result[1].isfinite().all()


@every_case
def test_nan_rows_count_nothing(impl, dtype):
    query, keys, bias = draw(4, 9, 5, dtype)
    query[1, 3] = math.nan
    query[2, 0] = math.inf
    indices, similarity, counts = retrieve(query, keys, bias, 3, impl=impl)
    assert indices[1:3].tolist() == [[0, 1, 2]] * 2
    assert similarity[1:3].isnan().all()
    healthy = retrieve(query[[0, 3]], keys, bias, 3, impl=impl)
    assert torch.equal(indices[[0, 3]], healthy[0])
    assert torch.equal(counts, healthy[2])
    for poisoned in (keys, bias):
        spoilt = poisoned.clone()
        spoilt[8] = math.nan
        inputs = (query, spoilt, bias) if poisoned is keys else (query, keys, spoilt)
        indices, similarity, counts = retrieve(*inputs, 3, impl=impl)
        assert indices.tolist() == [[0, 1, 2]] * 4
        assert similarity.isnan().all()
        assert counts.tolist() == [0] * 9


@every_implementation
def test_float32_of_any_size(impl):
    query, keys, bias = draw(4, 6, 5)
    wanted = retrieve(query, keys, bias, 2, impl=impl)
    # Powers of two change no digit; the squares leave float32 on both sides.
    scaled = retrieve(query * 2.0**100, keys * 2.0**-90, bias, 2, impl=impl)
    for a, b in zip(wanted, scaled, strict=True):
        assert torch.equal(a, b)


@every_case
def test_strided_and_expanded_views(impl, dtype):
    query, keys, bias = draw(6, 10, 8, dtype)
    sequence = torch.full((6, 3, 8), math.nan, dtype=dtype)
    sequence[:, 0] = query
    columns = torch.full((10, 16), math.nan, dtype=dtype)
    columns[:, ::2] = keys
    wide_bias = torch.full((10, 2), math.nan)
    wide_bias[:, 1] = bias
    wanted = retrieve(query, keys, bias, 4, impl=impl)
    got = retrieve(sequence[:, 0], columns[:, ::2], wide_bias[:, 1], 4, impl=impl)
    assert_matches_oracle(got, query, keys, bias, 4)
    assert torch.equal(got[0], wanted[0])
    one = retrieve(query[:1].expand(6, -1), keys, bias[:1].expand(10), 4, impl=impl)
    same = retrieve(query[:1].repeat(6, 1), keys, bias[:1].repeat(10), 4, impl=impl)
    for a, b in zip(one, same, strict=True):
        assert torch.equal(a, b)
    transposed = retrieve(query, keys.T.contiguous().T, bias, 4, impl=impl)
    assert torch.equal(transposed[0], wanted[0])


@every_implementation
def test_inputs_are_not_changed(impl):
    inputs = draw(3, 5, 4)
    copies = [tensor.clone() for tensor in inputs]
    retrieve(*inputs, 2, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def gradients(query, keys, bias, k, impl):
    query, keys = query.clone().requires_grad_(), keys.clone().requires_grad_()
    indices, similarity, counts = retrieve(query, keys, bias, k, impl=impl)
    weights = torch.linspace(-1, 2, similarity.numel(), dtype=similarity.dtype)
    (similarity * weights.view_as(similarity)).sum().backward()
    return indices, similarity.detach(), counts, query.grad, keys.grad


@every_implementation
def test_as_accurate_as_eager_and_alike_in_two_runs(impl):
    """Outputs and gradients, in memory that holds NaN before it is written."""
    call = calls.retrieve(9, 20, 77, 6)
    with under_test.poisoned_memory():
        calls.assert_accurate(call, impl, torch.float32)
        one, other = (calls.run(call, impl, torch.float32, under_test.device(impl)) for _ in "12")
    assert all(torch.equal(one[name], other[name]) for name in one)


@every_float64
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (4, 6, 5, 3), (3, 4, 7, 4)], ids=str)
def test_gradcheck(impl, shape):
    batch, pool_size, width, k = shape
    query, keys, bias = draw(batch, pool_size, width, torch.float64)
    query.requires_grad_()
    keys.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, x: retrieve(q, x, bias, k, impl=impl)[1], (query, keys)
    )


@under_test.cases("retrieve", torch.float16, torch.float32, torch.float64)
def test_gradient_matches_the_written_formula(impl, dtype):
    query, keys, bias = draw(5, 8, 6, dtype)
    indices, _, _, grad_query, grad_keys = gradients(query, keys, bias, 3, impl)
    weights = torch.linspace(-1, 2, 15, dtype=torch.float64).view(5, 3)
    if dtype is not torch.float64:
        weights = torch.linspace(-1, 2, 15, dtype=torch.float32).view(5, 3).double()
    x, y = query.double(), keys.double()
    wanted_query, wanted_keys = torch.zeros_like(x), torch.zeros_like(y)
    size = 0.0
    for b in range(5):
        for j in range(3):
            m = indices[b, j]
            nx, ny = x[b].norm(), y[m].norm()
            s = x[b] @ y[m] / (nx * ny)
            wanted_query[b] += weights[b, j] * (y[m] / ny - s * x[b] / nx) / nx
            wanted_keys[m] += weights[b, j] * (x[b] / nx - s * y[m] / ny) / ny
            size = max(size, (weights[b, j].abs() * 2 / min(nx, ny)).item())
    # At most 15 terms of at most `size`: the saved similarity is off by eps and the result is
    # rounded to the dtype once.
    bound = 15 * size * torch.finfo(dtype).eps
    assert grad_query.dtype == grad_keys.dtype == dtype
    assert (grad_query.double() - wanted_query).abs().max() <= bound
    assert (grad_keys.double() - wanted_keys).abs().max() <= bound


@every_float64
def test_gradient_of_one_side_and_of_an_empty_batch(impl):
    query, keys, bias = draw(4, 5, 6, torch.float64)
    both = gradients(query, keys, bias, 2, impl)
    weights = torch.linspace(-1, 2, 8, dtype=torch.float64).view(4, 2)
    for side, wanted in ((query, both[3]), (keys, both[4])):
        leaf = side.clone().requires_grad_()
        inputs = (leaf, keys) if side is query else (query, leaf)
        (retrieve(*inputs, bias, 2, impl=impl)[1] * weights).sum().backward()
        assert torch.equal(leaf.grad, wanted)
    empty = gradients(query[:0], keys, bias, 2, impl)
    assert empty[3].shape == (0, 6)
    assert torch.equal(empty[4], torch.zeros_like(keys))


@every_implementation
def test_bias_takes_no_gradient(impl):
    query, keys, bias = draw(4, 5, 6)
    bias.requires_grad_()
    outputs = retrieve(query, keys, bias, 2, impl=impl)
    assert not any(output.requires_grad for output in outputs)
    keys.requires_grad_()
    retrieve(query, keys, bias, 2, impl=impl)[1].sum().backward()
    assert bias.grad is None


def test_cpp_gives_the_bits_of_the_reference():
    _needs_cpp()
    for seed in range(20):
        query, keys, bias = draw(64, 20, 96, seed=seed)
        reference = ops.retrieve(query, keys, bias, 4, impl="reference")
        native = ops.retrieve(query, keys, bias, 4, impl="cpp")
        # Both round a float64 cosine that is off by some 1e-14; the roundings differ only where
        # the cosine is that close to the middle of two float32, one time in about 1e6.
        assert (reference[1] != native[1]).sum() <= 2
        same = reference[1] == native[1]
        assert torch.equal(reference[0][same], native[0][same])


def test_threads_change_no_bit():
    _needs_cpp()
    query, keys, bias = draw(1031, 61, 515)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.retrieve(query, keys, bias, 3, impl="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_native_writes_every_output_and_nothing_beside_it():
    _needs_cpp()
    from lamp_fast.ops import cpp

    query, keys, bias = draw(5, 7, 3)
    guard = -77
    indices = torch.full((7, 2), guard)
    similarity = torch.full((7, 2), math.nan)
    counts = torch.full((9,), guard)
    outputs = indices[1:6], similarity[1:6], counts[1:8]
    cpp.retrieve(query, keys, bias, 2, *outputs)
    assert_matches_oracle(outputs, query, keys, bias, 2)
    assert indices[[0, 6]].tolist() == [[guard] * 2] * 2
    assert similarity[[0, 6]].isnan().all()
    assert counts[[0, 8]].tolist() == [guard] * 2


def test_native_works_in_a_forked_child_of_a_threaded_parent():
    _needs_cpp()
    query, keys, bias = draw(2048, 40, 256)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        wanted = ops.retrieve(query, keys, bias, 2, impl="cpp")
        child = os.fork()
        if child == 0:
            got = ops.retrieve(query, keys, bias, 2, impl="cpp")
            os._exit(0 if torch.equal(got[0], wanted[0]) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@every_case
def test_opcheck(impl, dtype):
    if impl == "reference":
        pytest.skip("called as it is, without an op")
    for batch in (0, 1, 6):
        query, keys, bias = (x.to(under_test.device(impl)) for x in draw(batch, 9, 5, dtype))
        torch.library.opcheck(torch.ops.lamp_fast.retrieve, (query, keys, bias, 3, impl))
        indices, similarity, _ = torch.ops.lamp_fast.retrieve(query, keys, bias, 3, impl)
        torch.library.opcheck(
            torch.ops.lamp_fast.retrieve_backward,
            (query, keys, indices, similarity, similarity.clone(), impl),
        )


@every_implementation
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_forward_and_backward(impl, dynamic):
    torch._dynamo.reset()
    query, keys, bias = draw(6, 9, 5)
    compiled = torch.compile(
        lambda *inputs: retrieve(*inputs, 3, impl=impl),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    eager = gradients(query, keys, bias, 3, impl)
    for batch in (6, 4):
        x, y = query[:batch].clone().requires_grad_(), keys.clone().requires_grad_()
        indices, similarity, counts = compiled(x, y, bias)
        assert torch.equal(indices, eager[0][:batch])
        torch.testing.assert_close(similarity, eager[1][:batch], rtol=0, atol=2**-23)
        if batch == 6:
            weights = torch.linspace(-1, 2, 18).view(6, 3)
            (similarity * weights).sum().backward()
            assert torch.equal(counts, eager[2])
            torch.testing.assert_close(x.grad, eager[3])
            torch.testing.assert_close(y.grad, eager[4])


def test_the_default_compiles_too():
    torch._dynamo.reset()
    query, keys, bias = draw(6, 9, 5)
    compiled = torch.compile(ops.retrieve, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, keys, bias, 3)[0], ops.retrieve(query, keys, bias, 3)[0])


def _valid():
    return {"query": torch.ones(2, 3), "keys": torch.ones(4, 3), "bias": torch.zeros(4), "k": 2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": torch.ones(3)}, ["query", "[3]"]),
        ({"query": torch.ones(2, 5)}, ["keys", "[4, 3]", "[2, 5]"]),
        ({"query": torch.ones(2, 3).long()}, ["query", "int64"]),
        ({"query": torch.ones(2, 0), "keys": torch.ones(4, 0)}, ["query", "[2, 0]"]),
        ({"keys": torch.ones(4, 3).double()}, ["keys", "float64", "float32"]),
        ({"keys": torch.ones(4, 3, device="meta")}, ["keys", "meta", "cpu"]),
        ({"keys": torch.ones(0, 3), "bias": torch.ones(0)}, ["keys", "[0, 3]"]),
        ({"bias": torch.zeros(5)}, ["bias", "[5]", "[4]"]),
        ({"bias": torch.zeros(4).long()}, ["bias", "int64"]),
        ({"bias": torch.zeros(4, device="meta")}, ["bias", "meta", "cpu"]),
        ({"k": 0}, ["k=0", "1..4"]),
        ({"k": 5}, ["k=5", "1..4"]),
        ({"impl": "triton9"}, ["impl='triton9'", "reference", "cpp"]),
    ],
)
def test_bad_input_is_one_line(changes, words):
    with pytest.raises(InputError) as caught:
        ops.retrieve(**(_valid() | changes))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_an_explicit_choice_for_another_device_is_refused():
    inputs = {name: x.to("meta") for name, x in _valid().items() if name != "k"}
    with pytest.raises(InputError, match=r"impl='cpp'.*cpu.*meta"):
        ops.retrieve(**inputs, k=2, impl="cpp")


def _needs_cpp():
    reason = ops.implementations("retrieve")["cpp"]
    if reason is not None:
        pytest.skip(reason)
