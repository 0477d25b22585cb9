"""What is particular to the native CPU code: threads, memory, forks, precision, odd masks."""

import math
import os
from contextlib import contextmanager
from itertools import product

import pytest
import torch

from lamp_fast import ops

reason = ops.implementations("prefix_attention")["cpp"]
if reason is not None:
    pytest.skip(reason, allow_module_level=True)

from lamp_fast.ops import cpp  # noqa: E402  (it needs the extension)

INDEX = torch.tensor([2, 0, 0, 2, 2])


def draw(sequences, groups, heads, length, prefix, width, dtype=torch.float32, seed=0):
    """q, k and v as a fused projection leaves them, prefixes as [G, P, H, d] leaves them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    own = normal(sequences, length, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    return [*own, *(normal(groups, prefix, heads, width).transpose(1, 2) for _ in range(2))]


def with_gradients(tensors, impl="cpp", **options):
    """The output and the five gradients under a fixed direction."""
    leaves = [each.detach().requires_grad_() for each in tensors]
    out = ops.prefix_attention(*leaves, **options, impl=impl)
    generator = torch.Generator().manual_seed(9)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, leaves, direction, materialize_grads=True)
    return out.detach(), *gradients


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tree(rows, prefix, seed=0):
    """Each row sees some prefix rows, itself and up to eight rows before it; bool [R, P + R]."""
    generator = torch.Generator().manual_seed(seed)
    near = torch.rand(rows, prefix + rows, generator=generator) < 0.5
    near[:, prefix:] = near[:, prefix:].tril().triu(-8)
    near[:, prefix:].fill_diagonal_(True)
    return near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seen", ["tree", "causal", "dense"])
@pytest.mark.parametrize("indexed", [False, True])
def test_threads_change_no_bit(indexed, seen, dtype):
    tensors = draw(40, 4, 3, 24, 11, 52, dtype)
    options = {"tree": {"mask": tree(24, 11)}, "causal": {"causal": True, "blind": 1}, "dense": {}}
    options = options[seen]
    if indexed:
        options["prefix_index"] = torch.arange(40) * 7 % 3  # nobody reads the last prefix
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(with_gradients(tensors, **options))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    if indexed:
        assert not results[0][4][3].any()


def test_threads_change_no_bit_of_retrieves_gradient():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1031, 515, generator=generator, requires_grad=True)
    keys = torch.randn(61, 515, generator=generator, requires_grad=True)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            similarity = ops.retrieve(query, keys, torch.zeros(61), 6, impl="cpp")[1]
            results.append(torch.autograd.grad(similarity.sin().sum(), (query, keys)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Guarded:
    """Tensors of NaN between guards of NaN."""

    def __init__(self):
        self.buffers = []

    def like(self, x):
        rows_first = x.ndim == 4
        shape = x.transpose(1, 2).shape if rows_first else x.shape
        buffer = torch.full((x.numel() + 32,), math.nan, dtype=x.dtype)
        self.buffers.append(buffer)
        view = buffer[16 : 16 + x.numel()].view(shape)
        return view.transpose(1, 2) if rows_first else view

    def check(self):
        for buffer in self.buffers:
            assert buffer[:16].isnan().all()
            assert buffer[-16:].isnan().all()
            assert buffer[16:-16].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 5, 8, 64, 80])
def test_every_output_is_written_and_nothing_beside_it(width, dtype):
    tensors = draw(5, 3, 2, 7, 3, width, dtype)
    mask = tree(7, 3)
    mask[:, 2] = mask[:, 3 + 4] = False  # rows of prefix and sequence that nobody sees
    mask[4, 0] = True
    guarded = Guarded()
    precision = torch.promote_types(dtype, torch.float32)
    out, lse = guarded.like(tensors[0]), guarded.like(tensors[0][..., 0].to(precision))
    options = INDEX, mask, False, 0, 0.3
    cpp.prefix_attention(*tensors, *options, out, lse)
    gradients = [guarded.like(each) for each in tensors]
    cpp.prefix_attention_backward(
        torch.ones_like(out), *tensors, out, lse, *options, True, True, *gradients
    )
    guarded.check()
    assert not gradients[1][:, :, 4].any()
    assert not gradients[3][1].any()
    for own, prefix in ((True, False), (False, True)):
        some = [torch.empty_like(each) for each in gradients]
        some = [x if (own if i < 3 else prefix) else x.new_empty(0) for i, x in enumerate(some)]
        cpp.prefix_attention_backward(
            torch.ones_like(out), *tensors, out, lse, *options, own, prefix, *some
        )
        assert all(torch.equal(a, b) for a, b in zip(some, gradients, strict=True) if a.numel())


@pytest.mark.parametrize("rows", [1, 6, 7])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("width", [1, 15, 16, 72])
def test_dense_bfloat16_is_written_and_nothing_beside_it(width, prefix, rows):
    tensors = draw(5, 3, 2, 7, prefix, width, torch.bfloat16)
    tensors[0] = tensors[0][:, :, 7 - rows :]
    index = INDEX if prefix else torch.zeros_like(INDEX)
    guarded = Guarded()
    out, lse = guarded.like(tensors[0]), guarded.like(tensors[0][..., 0].float())
    options = index, None, False, 0, 0.3
    cpp.prefix_attention(*tensors, *options, out, lse)
    scores = 0.3 * tensors[0].float() @ torch.cat([tensors[3][index], tensors[1]], 2).float().mT
    # Sums of 72 products and more of some 4 in size, and a logarithm: a few float32 roundings.
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-4)
    gradients = [guarded.like(each) for each in tensors]
    backward = cpp.prefix_attention_backward
    backward(torch.ones_like(out), *tensors, out, lse, *options, True, True, *gradients)
    guarded.check()
    assert not gradients[3][1].any()  # nobody reads it
    for own, shared in ((True, False), (False, True)):
        some = [torch.empty_like(each) for each in gradients]
        some = [x if (own if i < 3 else shared) else x.new_empty(0) for i, x in enumerate(some)]
        backward(torch.ones_like(out), *tensors, out, lse, *options, own, shared, *some)
        assert all(torch.equal(a, b) for a, b in zip(some, gradients, strict=True) if a.numel())


@pytest.mark.parametrize(("scale", "size"), [(-0.5, 1), (0.0, 1), (0.2, 60.0)])
def test_dense_bfloat16_agrees_with_a_mask_of_all_keys(scale, size):
    """The mask takes another way, which has float32 inside."""
    q, k, v, prefix_k, prefix_v = draw(5, 5, 2, 21, 4, 24, torch.bfloat16)
    tensors = [q * size, k, v, prefix_k, prefix_v]
    mask = torch.ones(21, 25, dtype=torch.bool)
    got = with_gradients(tensors, scale=scale)
    wanted = with_gradients(tensors, scale=scale, mask=mask)
    q, k, v, prefix_k, prefix_v = (each.double() for each in tensors)
    # A weight, and the gradient of a score, is rounded to bfloat16 on one side, and each result on
    # both: three units of the sums of absolute products. |grad| is below 5, a slope below twice
    # |scale| |grad| |v| of the largest, and at most 25 keys or 21 rows are summed.
    unit = torch.finfo(torch.bfloat16).eps / 2
    largest_v = torch.cat([v, prefix_v], 2).abs().sum(-1).max()
    slope = 2 * abs(scale) * 5 * largest_v
    sizes = [largest_v, slope * torch.cat([k, prefix_k], 2).abs().max(), slope * q.abs().max(), 25]
    sizes = [*sizes, sizes[2], 25 * 5]
    for a, b, bound in zip(got, wanted, sizes, strict=True):
        assert (a.double() - b.double()).abs().max() <= 3 * unit * bound + 1e-30


@pytest.mark.parametrize("width", [1, 31, 33, 515])
def test_retrieves_gradient_is_written_and_nothing_beside_it(width):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, width, generator=generator)
    keys = torch.randn(7, width, generator=generator)
    indices, similarity, _ = ops.retrieve(query, keys, torch.zeros(7), 2, impl="cpp")
    guarded = Guarded()
    outputs = guarded.like(query), guarded.like(keys)
    cpp.retrieve_backward(query, keys, indices, similarity, similarity.clone(), *outputs)
    guarded.check()


def test_a_forked_child_of_a_threaded_parent():
    tensors = draw(40, 4, 3, 24, 11, 52)
    with threads(4):
        wanted = with_gradients(tensors, causal=True)
        child = os.fork()
        if child == 0:
            # Nothing of torch that takes its own threads, which a fork does not survive.
            out = ops.prefix_attention(*tensors, causal=True, impl="cpp")
            os._exit(0 if out.numpy().tobytes() == wanted[0].numpy().tobytes() else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_log_sum_exp():
    q, k, v, prefix_k, prefix_v = draw(4, 2, 2, 5, 3, 6, torch.float64)
    mask = tree(5, 3)
    options = None, mask, False, 0, 0.4
    _, lse = torch.ops.lamp_fast.prefix_attention(q, k, v, prefix_k, prefix_v, *options, "cpp")
    scores = q @ torch.cat([prefix_k.repeat_interleave(2, 0), k], dim=2).mT * 0.4
    wanted = scores.masked_fill(~mask, -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse, wanted, rtol=0, atol=1e-14)


SHAPES = list(product((0, 1, 37), (1, 7, 12, 32, 77), (0, 1, 4, 10, 16, 37)))


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_float32_errs_as_little_as_eager(masked):
    for sequences, length, prefix in SHAPES:
        tensors = draw(sequences, min(sequences, 1), 2, length, prefix, 40)
        options = {"mask": tree(length, prefix)} if masked else {"causal": True, "blind": 1}
        got = with_gradients(tensors, **options)
        eager = with_gradients(tensors, "reference", **options)
        exact = with_gradients([each.double() for each in tensors], "reference", **options)
        for ours, theirs, wanted in zip(got, eager, exact, strict=True):
            assert ours.shape == wanted.shape
            if not wanted.numel():
                continue
            # Both form the same sums in other orders: within twice of one another. A weight is off
            # by 2 u of its exponential and one u each of its division and its product, which eager
            # may be spared; a gradient has two such factors: 8 u of the largest.
            eager_error = (theirs - wanted).abs().max()
            budget = 8 * torch.finfo(torch.float32).eps / 2 * wanted.abs().max()
            assert (ours - wanted).abs().max() <= 2 * eager_error + budget, (
                sequences,
                length,
                prefix,
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(dtype):
    tensors = draw(6, 2, 2, 5, 3, 8, dtype)
    leaves = [each.detach().requires_grad_() for each in tensors]
    wide = [each.detach().float().requires_grad_() for each in tensors]
    out = ops.prefix_attention(*leaves, causal=True, impl="cpp")
    wanted = ops.prefix_attention(*wide, causal=True, impl="cpp")
    assert torch.equal(out, wanted.to(dtype))
    direction = torch.ones_like(out)
    for a, b in zip(
        torch.autograd.grad(out, leaves, direction),
        torch.autograd.grad(wanted, wide, direction.float()),
        strict=True,
    ):
        assert torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_keys_share_alike_whatever_their_size(dtype):
    q, k, v, prefix_k, prefix_v = draw(4, 2, 2, 6, 3, 16, dtype)
    k, prefix_k = torch.ones_like(k), torch.ones_like(prefix_k)
    for size in (1, 1e6):
        out, grad_q, _, grad_v, _, _ = with_gradients([q, k * size, v, prefix_k * size, prefix_v])
        mean = torch.cat([prefix_v.repeat_interleave(2, 0), v], dim=2).mean(dim=2, keepdim=True)
        # Equal scores in every row, so exact weights but for their division: nine terms.
        bound = 12 * torch.finfo(dtype).eps
        assert (out - mean).abs().max() <= bound * v.abs().max()
        generator = torch.Generator().manual_seed(9)
        direction = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
        wanted = direction.sum(dim=2, keepdim=True) / 9
        assert (grad_v - wanted).abs().max() <= bound * direction.abs().sum(dim=2).max()
        assert grad_q.isfinite().all()


def test_huge_scores_choose_the_largest():
    q, k, v, prefix_k, prefix_v = draw(4, 2, 2, 6, 3, 16)
    big = [q * 1e15, k * 1e15, v, prefix_k * 1e15, prefix_v]
    out = with_gradients(big)[0]
    keys = torch.cat([prefix_k.repeat_interleave(2, 0), k], dim=2)
    values = torch.cat([prefix_v.repeat_interleave(2, 0), v], dim=2)
    best = (q @ keys.mT).argmax(-1)
    assert torch.equal(out, values.gather(2, best[..., None].expand_as(q)))
    overflowing = ops.prefix_attention(q * 1e30, k * 1e30, v, prefix_k, prefix_v, impl="cpp")
    assert overflowing.isnan().any()


def test_nan_reaches_the_rows_that_see_it_and_no_other():
    tensors = draw(2, 1, 1, 20, 3, 16)
    mask = tree(20, 3)
    clean = with_gradients(tensors, mask=mask)
    tensors[1][1, 0, 7, 2] = math.nan
    out, grad_q, *_ = with_gradients(tensors, mask=mask)
    sees = mask[:, 3 + 7]
    assert sees.any()
    for spoilt, whole in ((out, clean[0]), (grad_q, clean[1])):
        assert spoilt[1, 0, sees].isnan().all()
        assert torch.equal(spoilt[1, 0, ~sees], whole[1, 0, ~sees])
        assert torch.equal(spoilt[0], whole[0])
    tensors[1][1, 0, 7, 2] = 0
    tensors[0][0, 0, 5, 0] = math.nan
    out = ops.prefix_attention(*tensors, mask=mask, impl="cpp")
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 0, 5]]


def test_a_row_that_sees_nothing_disturbs_no_other():
    tensors = draw(2, 1, 1, 9, 3, 8)
    mask = tree(9, 3)
    wanted = ops.prefix_attention(*tensors, mask=mask, impl="cpp")
    mask[4] = False
    got = with_gradients(tensors, mask=mask)[0]
    others = torch.arange(9) != 4
    assert torch.equal(got[:, :, others], wanted[:, :, others])


def test_an_index_out_of_range_is_refused_below_the_public_check():
    tensors = draw(2, 2, 1, 3, 2, 4)
    index = torch.tensor([0, 2])
    with pytest.raises(IndexError, match=r"prefix_index: holds 2, expected 0\.\.1"):
        torch.ops.lamp_fast.prefix_attention(*tensors, index, None, True, 0, 1.0, "cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    tensors = draw(5, 3, 2, 4, 3, 8, dtype)
    for index, mask, causal in ((INDEX, None, True), (INDEX, tree(4, 3), False)):
        options = index, mask, causal, 1 - int(mask is not None), 0.3
        torch.library.opcheck(torch.ops.lamp_fast.prefix_attention, (*tensors, *options, "cpp"))
        out, lse = torch.ops.lamp_fast.prefix_attention(*tensors, *options, "cpp")
        for needs in ((True, True), (False, True)):
            torch.library.opcheck(
                torch.ops.lamp_fast.prefix_attention_backward,
                (out.clone(), *tensors, out, lse, *options, *needs, "cpp"),
            )
