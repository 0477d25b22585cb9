"""add_layer_norm: values by the definition, gradients, every implementation."""

import math

import calls
import pytest
import torch
import under_test

from lamp_fast import ops
from lamp_fast.errors import InputError

every_implementation = under_test.implementations("add_layer_norm")


def draw(*shape, dtype=torch.float32, device="cpu"):
    call = calls.add_layer_norm(*shape)
    return [each.to(dtype).to(device) for each in call.tensors]


def test_values_are_the_definition():
    x, update, weight, bias = draw(3, 2, 7, dtype=torch.float64)
    total, normed = ops.add_layer_norm(x, update, weight, bias, 1e-3)
    for i in range(3):
        for j in range(2):
            row = [a + b for a, b in zip(x[i, j].tolist(), update[i, j].tolist(), strict=True)]
            assert total[i, j].tolist() == row
            mean = math.fsum(row) / 7
            variance = math.fsum((value - mean) ** 2 for value in row) / 7
            for d, value in enumerate(row):
                wanted = (value - mean) / math.sqrt(variance + 1e-3)
                wanted = wanted * weight[d].item() + bias[d].item()
                # Some ten float64 roundings of values of order 1.
                assert abs(normed[i, j, d].item() - wanted) <= 1e-14


def test_gradcheck():
    x, update, weight, bias = draw(2, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, update: ops.add_layer_norm(x, update, weight, bias, 1e-5),
        (x.requires_grad_(), update.requires_grad_()),
    )


SHAPES = [(1, 1), (5, 2), (2, 3, 32), (0, 4, 8), (17, 80), (3, 513), (2, 768), (1, 4096), (1, 5000)]


@under_test.cases("add_layer_norm", torch.float32, torch.float16, torch.bfloat16)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(impl, dtype, shape):
    for size in (0.1, 20.0):
        with under_test.poisoned_memory():
            calls.assert_accurate(calls.add_layer_norm(*shape, size=size), impl, dtype)


@every_implementation
def test_constant_rows_are_the_bias(impl):
    _, _, weight, bias = draw(1, 96, device=under_test.device(impl))
    x = torch.full((2, 96), 1e4, device=weight.device, requires_grad=True)
    _, normed = ops.add_layer_norm(x, torch.zeros_like(x), weight, bias, 1e-5, impl=impl)
    # The mean of equal numbers may be off by an ulp of 1e4, 2^-10, and 1/deviation is 316.
    bound = 2**-10 * 317 * weight.abs().max()
    assert (normed - bias).abs().max() <= bound
    normed.sum().backward()
    assert x.grad.isfinite().all()


@every_implementation
def test_nan_stays_in_its_row(impl):
    x, update, weight, bias = draw(9, 20, device=under_test.device(impl))
    healthy = ops.add_layer_norm(x, update, weight, bias, 1e-5, impl=impl)
    for poison in (math.nan, math.inf):
        spoilt = update.clone()
        spoilt[4, 3] = poison
        total, normed = ops.add_layer_norm(x, spoilt, weight, bias, 1e-5, impl=impl)
        others = [row for row in range(9) if row != 4]
        assert torch.equal(normed[others], healthy[1][others])
        assert torch.equal(total[others], healthy[0][others])
        assert normed[4].isnan().all()


@every_implementation
def test_each_output_alone_takes_a_gradient(impl):
    """What is not used sends no gradient; x and update share theirs."""
    x, update, weight, bias = draw(4, 3, 16, device=under_test.device(impl))
    above = torch.randn(2, 4, 3, 16, device=x.device)
    grads = []
    for used in ((True, False), (False, True), (True, True)):
        a, b = x.clone().requires_grad_(), update.clone().requires_grad_()
        outputs = ops.add_layer_norm(a, b, weight, bias, 1e-5, impl=impl)
        sum(
            (out * each).sum() for out, each, use in zip(outputs, above, used, strict=True) if use
        ).backward()
        assert torch.equal(a.grad, b.grad)
        grads.append(a.grad)
    assert torch.equal(grads[0], above[0])
    # One float32 rounding of a sum of order 10.
    torch.testing.assert_close(grads[0] + grads[1], grads[2], rtol=0, atol=2**-19)
    frozen = x.clone().requires_grad_()
    ops.add_layer_norm(frozen, update, weight, bias, 1e-5, impl=impl)[1].sum().backward()
    assert update.grad is None


@every_implementation
def test_strided_views(impl):
    x, update, weight, bias = draw(4, 6, 16, device=under_test.device(impl))
    views = x[:, 1:4], update[:, ::2], torch.stack([weight] * 2, 1)[:, 0], bias.flip(0).flip(0)
    other = x[:, :3].mT.contiguous().mT, update[:1, :3].expand(4, -1, -1)
    for tensors in (views, (*other, weight, bias)):
        got, wanted = (
            [each.clone() if copy else each for each in tensors] for copy in (False, True)
        )
        a = ops.add_layer_norm(*got, 1e-5, impl=impl)
        b = ops.add_layer_norm(*(each.contiguous() for each in wanted), 1e-5, impl=impl)
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@every_implementation
def test_compiles_whole_forward_and_backward(impl):
    torch._dynamo.reset()
    x, update, weight, bias = draw(3, 16, device=under_test.device(impl))

    def both(x, update):
        total, normed = ops.add_layer_norm(x, update, weight, bias, 1e-5, impl=impl)
        return total * normed

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    ours, theirs = ([x.clone().requires_grad_(), update.clone().requires_grad_()] for _ in "12")
    got, wanted = compiled(*ours), both(*theirs)
    got.sum().backward()
    wanted.sum().backward()
    # Roundings of values of order 10, should the compiler order them otherwise.
    torch.testing.assert_close(got, wanted, rtol=0, atol=2**-17)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=2**-17)


@every_implementation
def test_opcheck(impl):
    if impl == "reference":
        pytest.skip("called as it is, without an op")
    for rows in (3, 0):
        x, update, weight, bias = draw(rows, 8, device=under_test.device(impl))
        torch.library.opcheck(
            torch.ops.lamp_fast.add_layer_norm, (x, update, weight, bias, 1e-5, impl)
        )
        total, normed, *statistics = torch.ops.lamp_fast.add_layer_norm(
            x, update, weight, bias, 1e-5, impl
        )
        for above in (None, total.clone()):
            arguments = normed.clone(), above, total, weight, *statistics, impl
            torch.library.opcheck(torch.ops.lamp_fast.add_layer_norm_backward, arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.ones(3, 4).long()}, ["x", "int64"]),
        ({"update": torch.ones(4)}, ["update", "[4]", "[3, 4]"]),
        ({"update": torch.ones(3, 4).half()}, ["update", "float16", "float32"]),
        ({"weight": torch.ones(3)}, ["weight", "[3]", "[4]"]),
        ({"weight": torch.ones(4, requires_grad=True)}, ["weight", "frozen"]),
        ({"bias": torch.ones(4, device="meta")}, ["bias", "meta", "cpu"]),
        ({"impl": "cpp"}, ["impl='cpp'", "add_layer_norm", "reference"]),
    ],
)
def test_bad_input_is_one_line(changes, words):
    arguments = {
        "x": torch.ones(3, 4),
        "update": torch.ones(3, 4),
        "weight": torch.ones(4),
        "bias": torch.ones(4),
        "eps": 1e-5,
    }
    with pytest.raises(InputError) as caught:
        ops.add_layer_norm(**(arguments | changes))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
