"""prefix_attention against a literal softmax in float64, one row at a time."""

import math

import calls
import pytest
import torch
import under_test

from lamp_fast import ops
from lamp_fast.errors import InputError
from lamp_fast.ops.prefix_attention import SHORT_ROWS

every_implementation = under_test.implementations("prefix_attention")
every_float64 = under_test.implementations("prefix_attention", torch.float64)


def attend(*tensors, impl, **options):
    """The op where the implementation runs; the result on the CPU."""
    device = under_test.device(impl)
    options = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    return ops.prefix_attention(*(each.to(device) for each in tensors), **options, impl=impl).cpu()


def draw(sequences, groups, heads, length, prefix, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    own = [normal(sequences, heads, length, width) for _ in range(3)]
    return [*own, normal(groups, heads, prefix, width), normal(groups, heads, prefix, width)]


def literal(q, k, v, prefix_k, prefix_v, prefix_index, causal, blind, scale):
    """Softmax over a list of visible keys, row by row."""
    sequences, heads, length, width = q.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    rows = []
    for n in range(sequences):
        group = n // (sequences // len(prefix_k)) if prefix_index is None else prefix_index[n]
        for h in range(heads):
            for i in range(length):
                seen = range(i + 1) if causal else range(length)
                keys = [k[n, h, j] for j in seen]
                values = [v[n, h, j] for j in seen]
                if i >= blind:
                    keys += list(prefix_k[group, h])
                    values += list(prefix_v[group, h])
                weights = torch.softmax(torch.stack(keys) @ q[n, h, i] * scale, dim=0)
                rows.append((weights[:, None] * torch.stack(values)).sum(dim=0))
    return torch.stack(rows).view(q.shape) if rows else torch.zeros_like(q)


CASES = [  # N, G, H, L, P, d, prefix_index, causal, blind, scale
    (4, 4, 2, 5, 3, 4, None, False, 0, None),
    (6, 2, 2, 4, 3, 5, None, False, 0, None),
    (6, 2, 1, 4, 3, 5, None, True, 1, None),
    (6, 1, 2, 3, 1, 4, None, True, 0, 0.7),
    (3, 3, 1, 5, 2, 3, None, False, 2, None),
    (3, 3, 2, 4, 2, 4, None, False, 9, None),
    (5, 3, 2, 4, 2, 4, [2, 0, 0, 2, 1], True, 1, None),
    (4, 7, 1, 3, 2, 2, [6, 6, 1, 0], False, 0, 1.3),
    (4, 2, 2, 5, 0, 4, None, True, 1, None),
    (4, 4, 2, 5, 0, 4, None, False, 0, None),
    (1, 1, 1, 1, 1, 1, None, True, 0, None),
    (0, 0, 2, 3, 2, 4, None, True, 1, None),
    (0, 3, 2, 3, 2, 4, None, False, 0, None),
    (0, 3, 2, 3, 2, 4, [], False, 0, None),
]


def as_options(case):
    *_, index, causal, blind, scale = case
    index = None if index is None else torch.tensor(index, dtype=torch.int64)
    return {"prefix_index": index, "causal": causal, "blind": blind, "scale": scale}


@under_test.cases("prefix_attention", torch.float64, torch.float32, torch.float16, torch.bfloat16)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_literal_softmax(impl, dtype, case):
    tensors, options = draw(*case[:6], dtype=dtype), as_options(case)
    out = attend(*tensors, **options, impl=impl)
    exact = [tensor.double() for tensor in tensors]
    wanted = literal(*exact, **options)
    assert out.shape == tensors[0].shape
    assert out.dtype == dtype
    if out.numel() == 0:
        return
    # With u of the compute dtype (at least float32 inside, probabilities rounded to the dtype):
    # a score errs by (d + 2) u |q||k| scale, which moves a weight by that ratio twice over; the
    # weighted sum adds (P + L + 2) u; the result is rounded once. All relative to max |v|.
    unit = torch.finfo(dtype).eps
    q, k, v, prefix_k, prefix_v, *_ = exact
    width, keys = q.shape[3], prefix_k.shape[2] + k.shape[2]
    scale = options["scale"] or width**-0.5
    longest = max(x.norm(dim=-1).max().item() for x in (k, prefix_k) if x.numel())
    largest = max(x.abs().max().item() for x in (v, prefix_v) if x.numel())
    score = q.norm(dim=-1).max().item() * longest * scale
    bound = (2 * (width + 2) * score + keys + 3) * unit * largest
    assert (out.double() - wanted).abs().max() <= bound


@every_float64
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_match_the_literal_ones(impl, case):
    options = as_options(case)
    ours = [tensor.requires_grad_() for tensor in draw(*case[:6])]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    out = attend(*ours, **options, impl=impl)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    if out.numel() == 0:
        assert all(x.grad is None or not x.grad.any() for x in ours)
        return
    (literal(*theirs, **options) * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        wanted = torch.zeros_like(b) if b.grad is None else b.grad
        got = torch.zeros_like(a) if a.grad is None else a.grad
        # float64, sums of a few hundred terms of size about 1.
        assert torch.allclose(got, wanted, rtol=0, atol=1e-12)


@every_float64
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[6]], ids=str)
def test_gradcheck(impl, case):
    tensors = [tensor.requires_grad_() for tensor in draw(*case[:6])]
    options = as_options(case)
    assert torch.autograd.gradcheck(lambda *inputs: attend(*inputs, **options, impl=impl), tensors)


ACCURATE = {  # N, G, H, L, P, d; options
    "one row": ((3, 3, 2, 1, 0, 32), {}),
    "one row, causal, shared": ((5, 1, 1, 1, 37, 128), {"causal": True, "blind": 0}),
    "few rows, many of a group": ((18, 2, 1, 7, 1, 20), {"causal": True, "blind": 1}),
    "not causal": ((6, 2, 1, 7, 4, 64), {"blind": 2}),
    "text": ((10, 2, 2, 12, 10, 64), {"causal": True, "blind": 1}),
    "text, last rows": ((10, 2, 1, 12, 9, 32), {"causal": True, "rows": 3}),
    "text, indexed": ((5, 3, 1, 12, 4, 32), {"causal": True, "blind": 1, "index": [2, 0, 0, 2, 0]}),
    "longest packed rows": ((3, 1, 1, 32, 16, 80), {"causal": True, "blind": 3}),
    "uncut text": ((1, 1, 1, 77, 37, 32), {"causal": True, "blind": 40, "scale": 0.3}),
    "tree": ((2, 1, 1, 77, 9, 104), {"tree": 0.05}),
    "tree, read out": ((2, 2, 1, 77, 0, 32), {"tree": 0.1, "rows": 5}),
    "vision": ((1, 1, 1, 197, 4, 64), {}),
    "vision, last row": ((1, 1, 1, 257, 16, 32), {"rows": 1}),
    "sharp": ((2, 1, 1, 40, 4, 32), {"size": 20.0}),
}


@under_test.cases("prefix_attention", torch.float32, torch.float16, torch.bfloat16)
@pytest.mark.parametrize("name", ACCURATE)
def test_as_accurate_as_eager(impl, dtype, name):
    """Outputs and gradients, in memory that holds NaN before it is written."""
    sizes, options = ACCURATE[name]
    call = calls.prefix_attention(*sizes, **options)
    with under_test.poisoned_memory():
        calls.assert_accurate(call, impl, dtype)


def saturated_bounds(call, above, dtype):
    """What the gradients of the scores' operands may be off by, where half precision enters only
    with the operands, once with each slope and once with the result.

    With u of the dtype and u' of float32, n keys and absolute values in products: a score errs by
    e = (d + 4) u' scale |q| |k|, and a weight p by r = e + sum p e + 4 u' (1 + |score| + |lse|),
    relatively. dp = grad v errs by a = d u' |grad| |v|. delta = sum p dp / sum p errs by
    D = sum p (a + r |dp - delta| + n u' |dp|). So a slope p (dp - delta) errs by
    p ((u + r) |dp - delta| + a + D + 2 u' (|dp| + |delta|)), or by half the smallest number. There
    is no u |delta|: one key has nearly all the weight, and its dp - delta is far below delta.
    """
    q, k, v, prefix_k, prefix_v = call.tensors
    keys, values = torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)
    count, width, scale = keys.shape[2], q.shape[3], q.shape[3] ** -0.5
    unit, unit32 = torch.finfo(dtype).eps / 2, calls.UNIT32 / 2
    scores = scale * q @ keys.mT
    weights, lse = scores.softmax(-1), scores.logsumexp(-1, keepdim=True)
    assert weights.amax(-1).median() > 0.999

    def mean(x):
        return (weights * x).sum(-1, keepdim=True)

    score = (width + 4) * unit32 * scale * (q.abs() @ keys.abs().mT)
    relative = score + mean(score) + 4 * unit32 * (1 + scores.abs() + lse.abs())
    raised = above @ values.mT
    delta = mean(raised)
    spread = (raised - delta).abs()
    product = width * unit32 * (above.abs() @ values.abs().mT)
    error = mean(product + relative * spread + count * unit32 * raised.abs())
    error = (unit + relative) * spread + product + error + 2 * unit32 * (raised.abs() + delta.abs())
    smallest = torch.finfo(dtype).smallest_normal * unit
    # A sum over keys, or over the rows of all sequences, adds as many roundings of its terms.
    error = error + (count + len(q) * q.shape[2]) * unit32 * spread
    slopes = scale * (weights * error + smallest)
    to_keys = slopes.mT @ q.abs()
    prefix = prefix_k.shape[2]
    return {
        "gradient 0": slopes @ keys.abs(),
        "gradient 1": to_keys[:, :, prefix:],
        "gradient 3": to_keys[:, :, :prefix].sum(0, keepdim=True),
    }


@under_test.cases("prefix_attention", torch.float16, torch.bfloat16)
@pytest.mark.parametrize("length", [12, 40])
def test_gradients_of_a_saturated_softmax(impl, dtype, length):
    """An output that was rounded to half precision does not tell a row's sum of p dp."""
    if impl == "reference":
        pytest.skip("has the numerics of torch's attention")
    call = calls.prefix_attention(3, 1, 2, length, 4, 32, size=6.0)
    call.tensors = [each.to(dtype).double() for each in call.tensors]
    # The prefix once a sequence, so that its keys broadcast.
    whole = [each.expand(3, -1, -1, -1) for each in call.tensors[3:]]
    (above,) = calls.gradients_from_above(call, [call.tensors[0]])
    above = above.to(dtype).double()
    call.rounding = dtype
    got = calls.run(call, impl, dtype, under_test.device(impl))
    exact = calls.run(call, "reference", torch.float64, torch.device("cpu"))
    call.tensors = [*call.tensors[:3], *whole]
    unit, smallest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
    for name, bound in saturated_bounds(call, above, dtype).items():
        bound = bound + unit * exact[name].abs() + smallest * unit
        excess = ((got[name].double() - exact[name]).abs() / bound).max()
        assert excess <= 1, f"{name}: {excess:.2f} times the bound"


@every_implementation
@pytest.mark.parametrize("options", [{}, {"index": [1, 0, 0, 1, 1]}, {"tree": 0.2}], ids=str)
def test_two_runs_give_the_same_bits(impl, options):
    if impl == "reference" and "index" in options:
        pytest.skip("sums a shared prefix as torch indexes")
    groups = 2 if "index" in options else 1
    call = calls.prefix_attention(5, groups, 1, 12, 9, 16, **options)
    first, second = (calls.run(call, impl, torch.float32, under_test.device(impl)) for _ in "12")
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_implementation
@pytest.mark.parametrize("length", [6, 17])
def test_equal_keys_weigh_all_values_alike(impl, length):
    _, k, v, prefix_k, prefix_v = draw(4, 2, 1, length, 3, 8, torch.float32)
    q = torch.ones_like(k)
    out = attend(q, q, v, torch.ones_like(prefix_k), prefix_v, impl=impl)
    values = torch.cat([prefix_v.repeat_interleave(2, 0), v], dim=2).double()
    # A mean of L + 3 values in float32.
    bound = (length + 3) * torch.finfo(torch.float32).eps * values.abs().max()
    assert (out.double() - values.mean(dim=2, keepdim=True)).abs().max() <= bound


@every_implementation
@pytest.mark.parametrize("length", [6, 17])
def test_huge_logits_choose_one_value(impl, length):
    """Scores of some 1e8, of which the largest is far ahead of the next."""
    _, _, v, prefix_k, prefix_v = draw(2, 1, 1, length, 2, 64, torch.float32)
    prefix_k = torch.zeros_like(prefix_k)
    q = torch.eye(64)[:length].expand(2, 1, -1, -1) * 1e4
    k = torch.eye(64)[torch.arange(length).flip(0)].expand(2, 1, -1, -1) * 1e5
    out = attend(q, k, v, prefix_k, prefix_v, impl=impl)
    # exp(-1e8) is 0: the weights are 0 and 1.
    assert torch.equal(out, v.flip(2))


@every_implementation
@pytest.mark.parametrize("length", [5, 17])
def test_nan_stays_in_its_rows_and_sequence(impl, length):
    tensors = draw(4, 2, 1, length, 3, 8, torch.float32)
    options = {"causal": True, "blind": 1, "impl": impl}
    healthy = attend(*tensors, **options)
    for spoilt in range(3):
        inputs = [each.clone() for each in tensors]
        inputs[spoilt][1, 0, 2, 3] = math.nan
        out = attend(*inputs, **options)
        assert out[1, 0, 2 : 3 if spoilt == 0 else None].isnan().any(dim=-1).all()
        assert torch.equal(out[[0, 2, 3]], healthy[[0, 2, 3]])
        # A weight of 0 times NaN is NaN; and torch's kernels, behind the reference, mask by adding.
        if spoilt < 2 and impl != "reference":
            assert torch.equal(out[1, 0, :2], healthy[1, 0, :2])
    inputs = [each.clone() for each in tensors]
    inputs[3][0, 0, 0, 0] = math.nan
    out = attend(*inputs, **options)
    assert out[:2, 0, 1:].isnan().all()
    assert torch.equal(out[2:], healthy[2:])
    if impl != "reference":
        assert torch.equal(out[:2, :, 0], healthy[:2, :, 0])


def literal_masked(q, k, v, prefix_k, prefix_v, mask):
    """Softmax over what each row sees, row by row; sequence n reads prefix n // (N // G)."""
    share = len(q) // len(prefix_k)
    keys = torch.cat([prefix_k.repeat_interleave(share, 0), k], dim=2)
    values = torch.cat([prefix_v.repeat_interleave(share, 0), v], dim=2)
    out = torch.zeros_like(q)
    for n in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                weights = (keys[n, h, mask[i]] @ q[n, h, i] / math.sqrt(q.shape[3])).softmax(0)
                out[n, h, i] = weights @ values[n, h, mask[i]]
    return out


@every_float64
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("prefix", [0, 2])
def test_a_mask_says_what_each_row_sees(impl, rows, prefix):
    """A random tree-like visibility, also with fewer query rows than keys; forward and gradient."""
    q, k, v, prefix_k, prefix_v = draw(4, 2, 2, 6, prefix, 3)
    mask = torch.rand(rows, prefix + 6, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, prefix] = True
    tensors = [q[:, :, :rows].contiguous(), k, v, prefix_k, prefix_v]
    ours = [each.clone().requires_grad_() for each in tensors]
    theirs = [each.clone().requires_grad_() for each in tensors]
    out = attend(*ours, mask=mask, impl=impl)
    wanted = literal_masked(*theirs, mask)
    # Some twenty float64 roundings of values of order 1.
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-14)
    direction = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(out, ours, direction, materialize_grads=True),
        torch.autograd.grad(wanted, theirs, direction, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@every_float64
@pytest.mark.parametrize("causal", [False, True])
def test_fewer_query_rows_are_the_last_ones(impl, causal):
    q, k, v, prefix_k, prefix_v = draw(4, 2, 2, 6, 3, 3)
    options = {"causal": causal, "blind": 2, "impl": impl}
    whole = attend(q, k, v, prefix_k, prefix_v, **options)
    last = attend(q[:, :, 4:], k, v, prefix_k, prefix_v, **options)
    torch.testing.assert_close(last, whole[:, :, 4:], rtol=0, atol=1e-15)


@every_float64
def test_blind_rows_are_bit_for_bit_deaf_to_the_prefix(impl):
    q, k, v, prefix_k, prefix_v = draw(4, 2, 2, 5, 3, 4)
    before = attend(q, k, v, prefix_k, prefix_v, causal=True, blind=2, impl=impl)
    other = attend(q, k, v, prefix_k.flip(0) * 3, prefix_v - 9, causal=True, blind=2, impl=impl)
    assert torch.equal(before[:, :, :2], other[:, :, :2])
    assert not torch.isclose(before[:, :, 2:], other[:, :, 2:]).all(dim=-1).any()


@every_float64
def test_prefix_order_does_not_matter(impl):
    q, k, v, prefix_k, prefix_v = draw(4, 2, 2, 5, 6, 4)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    a = attend(q, k, v, prefix_k, prefix_v, impl=impl)
    b = attend(q, k, v, prefix_k[:, :, order], prefix_v[:, :, order], impl=impl)
    assert torch.allclose(a, b, rtol=0, atol=1e-13)


@every_float64
def test_default_grouping_is_the_written_index(impl):
    tensors = draw(6, 3, 2, 4, 3, 4)
    index = torch.tensor([0, 0, 1, 1, 2, 2])
    a = attend(*tensors, causal=True, blind=1, impl=impl)
    b = attend(*tensors, prefix_index=index, causal=True, blind=1, impl=impl)
    assert torch.equal(a, b)


@every_float64
def test_strided_and_expanded_views(impl):
    q, k, v, prefix_k, prefix_v = draw(4, 1, 2, 5, 3, 4)
    wanted = attend(q, k, v, prefix_k, prefix_v, impl=impl)
    # [N, L, 3, H, d], as a fused projection lays q, k and v out.
    fused = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous()
    a, b, c = fused.permute(2, 0, 3, 1, 4)
    assert not a.is_contiguous()
    keys, values = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (prefix_k, prefix_v))
    got = attend(a, b, c, keys, values, impl=impl)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-13)
    spread = prefix_k.expand(4, -1, -1, -1), prefix_v.expand(4, -1, -1, -1)
    assert torch.allclose(attend(q, k, v, *spread, impl=impl), wanted, atol=1e-13)


@every_implementation
@pytest.mark.parametrize("length", [5, 17])
def test_views_of_a_fused_projection_give_the_same_bits(impl, length):
    q, k, v, prefix_k, prefix_v = draw(4, 2, 2, length, 3, 16, torch.float32)
    wanted = attend(q, k, v, prefix_k, prefix_v, causal=True, impl=impl)
    fused = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)
    spread = prefix_k.mT.contiguous().mT, prefix_v.mT.contiguous().mT
    got = attend(*fused, *spread, causal=True, impl=impl)
    # The reference may take another path of torch for other strides: a few float32 roundings.
    torch.testing.assert_close(got, wanted, rtol=0, atol=0 if impl == "triton" else 1e-6)


@every_implementation
def test_empty_heads_and_rows(impl):
    for heads, length in ((0, 3), (2, 0)):
        tensors = [x.requires_grad_() for x in draw(4, 2, heads, length, 3, 4, torch.float32)]
        out = attend(*tensors, causal=True, blind=1, impl=impl)
        assert out.shape == (4, heads, length, 4)
        out.sum().backward()
        assert not any(each.grad.any() for each in tensors if each.grad is not None)


@every_implementation
def test_only_what_is_asked_for_gets_a_gradient(impl):
    for length in (5, 17):
        call = calls.prefix_attention(4, 2, 1, length, 3, 16, causal=True, blind=1)
        whole = calls.run(call, impl, torch.float32, under_test.device(impl))
        above = calls.gradients_from_above(call, [whole["output 0"]])[0]
        for wanted in ({0, 1, 2}, {3, 4}, {0}, {4}):
            tensors = [x.float().requires_grad_(i in wanted) for i, x in enumerate(call.tensors)]
            attend(*tensors, **call.options, impl=impl).backward(above)
            for index, tensor in enumerate(tensors):
                assert (tensor.grad is not None) == (index in wanted)
                if index in wanted:
                    # The reference's kernels may differ by what they leave out: roundings.
                    torch.testing.assert_close(
                        tensor.grad, whole[f"gradient {index}"], rtol=0, atol=1e-5
                    )


@every_implementation
def test_opcheck(impl):
    if impl == "reference":
        pytest.skip("called as it is, without an op")
    device = under_test.device(impl)
    for options in ({"causal": True}, {"index": [1, 0, 1]}, {"tree": 0.5, "rows": 2}):
        call = calls.prefix_attention(3, 3, 1, 4, 2, 8, **options)
        tensors = [each.float().to(device) for each in call.tensors]
        index, mask = (call.options.get(name) for name in ("prefix_index", "mask"))
        routes = [None if each is None else each.to(device) for each in (index, mask)]
        rest = *routes, call.options.get("causal", False), 0, 0.5
        # One test alone of the fake: the others trace the op many times over.
        checks = {"test_utils": ("test_schema", "test_faketensor")}
        torch.library.opcheck(
            torch.ops.lamp_fast.prefix_attention, (*tensors, *rest, impl), **checks
        )
        out, lse = torch.ops.lamp_fast.prefix_attention(*tensors, *rest, impl)
        arguments = (out.clone(), *tensors, out, lse, *rest, True, True, impl)
        torch.library.opcheck(torch.ops.lamp_fast.prefix_attention_backward, arguments, **checks)


@every_implementation
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_whole_forward_and_backward(impl, indexed, dynamic):
    """At several lengths, on both sides of what counts as short: sizes become symbols."""
    torch._dynamo.reset()
    index = torch.tensor([1, 1, 0, 0]) if indexed else None

    def causal(*tensors):
        return attend(*tensors, prefix_index=index, causal=True, blind=1, impl=impl)

    compiled = torch.compile(causal, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    dtype = (
        torch.float64
        if under_test.serves("prefix_attention", impl, torch.float64)
        else torch.float32
    )
    for length in (5, 7, SHORT_ROWS + 1):
        ours = [tensor.requires_grad_() for tensor in draw(4, 2, 1, length, 3, 4, dtype)]
        theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
        out, wanted = compiled(*ours), causal(*theirs)
        # A few hundred roundings of values of order 1, should the compiler order them otherwise.
        atol = 1e3 * torch.finfo(dtype).eps
        assert torch.allclose(out, wanted, rtol=0, atol=atol)
        out.pow(2).sum().backward()
        wanted.pow(2).sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=0, atol=10 * atol)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.ones(4, 2, 5)}, ["q", "[4, 2, 5]"]),
        ({"q": torch.ones(4, 2, 5, 3).long()}, ["q", "int64"]),
        ({"k": torch.ones(4, 1, 5, 3)}, ["k", "[4, 1, 5, 3]", "[4, 2, L, 3]"]),
        ({"k": torch.ones(4, 2, 4, 3)}, ["k", "4 rows", "5 of q"]),
        ({"k": torch.ones(4, 2, 6, 3)}, ["v", "[4, 2, 5, 3]", "[4, 2, 6, 3]"]),
        ({"mask": torch.ones(5, 11)}, ["mask", "float32", "bool"]),
        ({"mask": torch.ones(5, 12).bool()}, ["mask", "[5, 12]", "[5, 11]"]),
        ({"mask": torch.ones(5, 11).bool(), "causal": True}, ["mask", "causal=True"]),
        ({"v": torch.ones(4, 2, 5, 3).double()}, ["v", "float64", "float32"]),
        ({"v": torch.ones(4, 2, 5, 3, device="meta")}, ["v", "meta", "cpu"]),
        ({"prefix_k": torch.ones(2, 1, 6, 3)}, ["prefix_k", "[2, 1, 6, 3]", "[G, 2, P, 3]"]),
        ({"prefix_v": torch.ones(2, 2, 7, 3)}, ["prefix_v", "[2, 2, 7, 3]", "[2, 2, 6, 3]"]),
        ({"prefix_v": torch.ones(2, 2, 6, 3).half()}, ["prefix_v", "float16", "float32"]),
        ({"blind": -1}, ["blind=-1"]),
        (
            {"prefix_k": torch.ones(3, 2, 6, 3), "prefix_v": torch.ones(3, 2, 6, 3)},
            ["prefix_k", "3 prefixes", "4 sequences", "prefix_index"],
        ),
        (
            {"prefix_k": torch.ones(0, 2, 6, 3), "prefix_v": torch.ones(0, 2, 6, 3)},
            ["prefix_k", "0 prefixes", "4 sequences"],
        ),
        ({"prefix_index": torch.tensor([0, 1, 2, 0])}, ["prefix_index", "2", "0..1"]),
        ({"prefix_index": torch.tensor([0, -1, 1, 0])}, ["prefix_index", "-1", "0..1"]),
        ({"prefix_index": torch.tensor([0, 1])}, ["prefix_index", "[2]", "[4]"]),
        ({"prefix_index": torch.tensor([0, 1, 1, 0]).int()}, ["prefix_index", "int32", "int64"]),
        ({"impl": "fast"}, ["impl='fast'", "prefix_attention", "reference"]),
    ],
)
def test_bad_input_is_one_line(changes, words):
    names = ("q", "k", "v", "prefix_k", "prefix_v")
    tensors = [torch.ones(4, 2, 5, 3)] * 3 + [torch.ones(2, 2, 6, 3)] * 2
    arguments = dict(zip(names, tensors, strict=True)) | changes
    with pytest.raises(InputError) as caught:
        ops.prefix_attention(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
