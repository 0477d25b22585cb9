"""frozen_linear: values and gradients against float64, packed copies, and what is refused."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import under_test
from torch._subclasses.fake_tensor import FakeTensorMode

from lamp_fast import ops
from lamp_fast.errors import InputError
from lamp_fast.ops import dispatch

UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
packed = under_test.skipped("frozen_linear", "packed")
every_implementation = under_test.implementations("frozen_linear")
SHAPES = [
    ((1,), 1, 1),
    ((3,), 5, 7),
    ((2, 3), 64, 33),
    ((0,), 8, 4),
    ((4, 197), 128, 512),
    ((1, 1), 512, 3),
    ((17, 1, 3), 96, 288),
]


@pytest.fixture
def no_choice_kept():
    """What a test patches decides, and is forgotten after it."""
    kept = dispatch.pick, dispatch.load
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def linear(outputs, inputs, dtype=torch.float32, bias=True):
    return ops.FrozenLinear(
        draw(outputs, inputs, dtype=dtype, seed=1), draw(outputs, dtype=dtype) if bias else None
    )


@pytest.mark.parametrize("bias", [True, False])
def test_values_are_the_definition(bias):
    one, x = linear(3, 4, torch.float64, bias), draw(2, 4, dtype=torch.float64)
    got = one(x)
    for row in range(2):
        for out in range(3):
            wanted = [a * b for a, b in zip(x[row].tolist(), one.weight[out].tolist(), strict=True)]
            wanted.append(one.bias[out].item() if bias else 0)
            assert abs(got[row, out].item() - math.fsum(wanted)) <= 1e-14


def test_gradcheck():
    x = draw(2, 3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(linear(4, 5, torch.float64), x)
    assert torch.autograd.gradgradcheck(linear(4, 5, torch.float64), x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES, ids=str)
@under_test.cases("frozen_linear", torch.float32, torch.bfloat16)
def test_as_accurate_as_float64_allows(impl, dtype, rows, inputs, outputs, bias):
    one = linear(outputs, inputs, dtype, bias)
    x, above = draw(*rows, inputs, dtype=dtype), draw(*rows, outputs, dtype=dtype, seed=2)
    x.requires_grad_()
    with under_test.poisoned_memory():
        got = one(x, impl=impl)
        got.backward(above)
    assert got.dtype == x.grad.dtype == dtype
    weight = one.weight.double()
    exact = F.linear(x.detach().double(), weight, None if bias is False else one.bias.double())
    # Sums of K products in float32, in any order, and one rounding to the dtype.
    for result, right, left, factor, size in (
        (got, exact, x.detach(), weight.mT, inputs),
        (x.grad, above.double() @ weight, above, weight, outputs),
    ):
        terms = left.double().abs() @ factor.abs()
        if result is got and bias:
            terms = terms + one.bias.double().abs()
        bound = (size + 1) * 2**-24 * terms + UNIT[dtype] * right.abs()
        assert ((result.double() - right).abs() <= bound).all()


@every_implementation
def test_any_strides_and_a_gradient_of_one_number(impl):
    one, wide = linear(6, 8), draw(5, 4, 16)
    contiguous = wide[..., ::2].contiguous()
    for view in (wide[..., ::2], contiguous.mT.contiguous().mT, contiguous[:1].expand(5, -1, -1)):
        x, same = view.clone(memory_format=torch.preserve_format), view.contiguous().clone()
        # Eight or so float32 roundings of sums of order 10.
        torch.testing.assert_close(one(view, impl=impl), one(same, impl=impl), rtol=0, atol=2**-17)
        x.requires_grad_(), same.requires_grad_()
        one(x, impl=impl).sum().backward()
        one(same, impl=impl).backward(torch.ones(5, 4, 6))
        torch.testing.assert_close(x.grad, same.grad, rtol=0, atol=2**-17)


@packed
def test_a_weight_is_packed_once_a_direction_and_again_when_written_to(no_choice_kept, monkeypatch):
    from lamp_fast.ops import onednn

    packings = []
    monkeypatch.setattr(onednn, "pack", lambda w, real=onednn.pack: packings.append(1) or real(w))
    one, x = linear(6, 8), draw(5, 8).requires_grad_()
    one(x.detach(), impl="packed")
    one(x.detach(), impl="packed")
    assert len(packings) == 1
    for _ in range(2):
        one(x, impl="packed").sum().backward()
    assert len(packings) == 2
    one.weight.mul_(2)
    doubled = ops.FrozenLinear(one.weight.clone(), one.bias)
    assert torch.equal(one(x.detach(), impl="packed"), doubled(x.detach(), impl="packed"))
    assert len(packings) == 4
    one(x, impl="packed").sum().backward()
    assert len(packings) == 5


@packed
def test_a_weight_made_in_inference_mode_serves():
    with torch.inference_mode():
        one = linear(6, 8)
    assert one(draw(5, 8), impl="packed").shape == (5, 6)


@packed
def test_what_backward_keeps_is_the_weight_alone():
    one, x = linear(64, 64), draw(32, 64).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        one(x, impl="packed")
    assert kept == []


@every_implementation
def test_part_of_the_outputs(impl):
    one, x = linear(9, 8), draw(5, 8)
    whole = one(x, impl=impl)
    for first, last in ((0, 3), (3, None), (0, None), (2, 7)):
        part = one.outputs(first, last)(x, impl=impl)
        # Eight float32 roundings of terms of order 1.
        torch.testing.assert_close(part, whole[:, first:last], rtol=0, atol=2**-19)


def test_small_weights_are_left_to_torch(monkeypatch):
    chosen = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda op, *a: chosen.append(a[0]) or choose(op, *a))
    linear(128, 255)(draw(2, 255))
    linear(128, 256)(draw(2, 256))
    assert chosen == ["reference", None]


@packed
@pytest.mark.parametrize("how", ["compiled", "fake"])
def test_without_memory_or_under_the_compiler_torch_serves(how):
    one, x = linear(6, 8), draw(5, 8)
    if how == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert one(torch.empty(5, 8), impl="packed").shape == (5, 6)
        return
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: one(x, impl="packed"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), one(x, impl="reference"))


@packed
def test_second_derivatives_are_refused():
    x = draw(5, 8).requires_grad_()
    out = linear(6, 8)(x, impl="packed").square().sum()
    (first,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        first.sum().backward()


@packed
def test_a_copy_computes_the_same():
    one, x = linear(6, 8), draw(5, 8)
    before = one(x, impl="packed")
    other = copy.deepcopy(one)
    other.weight.zero_()
    assert torch.equal(one(x, impl="packed"), before)
    assert torch.equal(other(x, impl="packed"), other.bias.expand(5, -1))


def test_plain_torch_where_the_cpu_has_no_products_of_bfloat16(no_choice_kept, monkeypatch):
    monkeypatch.setattr(dispatch, "cpu_has", lambda name: False)
    one, x = linear(256, 256, torch.bfloat16), draw(2, 256, dtype=torch.bfloat16)
    assert torch.equal(one(x), F.linear(x, one.weight, one.bias))
    with pytest.raises(InputError, match="AVX512_BF16 or AMX"):
        one(x, impl="packed")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ops.FrozenLinear(draw(3)), "weight: shape"),
        (lambda: ops.FrozenLinear(draw(3, 4), draw(4)), "bias: shape"),
        (lambda: ops.FrozenLinear(draw(3, 4), draw(3).double()), "bias: torch.float64"),
        (lambda: ops.FrozenLinear(draw(3, 4).requires_grad_()), "requires a gradient"),
        (lambda: linear(3, 4)(draw(2, 5)), "x: shape"),
        (lambda: linear(3, 4)(draw(4).sum()), "x: shape"),
        (lambda: linear(3, 4)(draw(2, 4).double()), "x: torch.float64"),
        (lambda: linear(3, 4)(draw(2, 4), impl="cpp"), "impl='cpp'"),
        (lambda: linear(3, 4, torch.float64)(draw(2, 4).double(), impl="packed"), "float64"),
    ],
)
def test_what_does_not_fit_gets_one_line(make, words):
    with pytest.raises(InputError, match=words):
        make()
