"""quick_gelu and gelu: values by the definition, gradients, memory, every implementation."""

import math

import calls
import pytest
import torch
import under_test

from lamp_fast import ops
from lamp_fast.errors import InputError
from lamp_fast.ops import dispatch

DEFINITION = {
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
}
both = pytest.mark.parametrize("op", DEFINITION)
# The two have the same implementations.
every_implementation = pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        pytest.param(impl, dtype, marks=under_test.skipped("gelu", impl), id=impl)
        for impl in dispatch.IMPLEMENTATIONS["gelu"]
        for dtype in [torch.bfloat16 if impl == "cpp" else torch.float32]
    ],
)


@both
def test_values_are_the_definition(op):
    x = torch.linspace(-8, 8, 65, dtype=torch.float64)
    wanted = [DEFINITION[op](value) for value in x.tolist()]
    # A handful of float64 roundings of values up to 8.
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(getattr(ops, op)(x), wanted, rtol=0, atol=1e-14)


@both
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_gradient(op, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(getattr(ops, op), x)


@both
@under_test.cases("gelu", torch.float32, torch.float16, torch.bfloat16)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 5), (2, 1024), (1025,)], ids=str)
def test_as_accurate_as_eager(op, impl, dtype, shape):
    for size in (0.1, 3.0, 30.0):
        with under_test.poisoned_memory():
            calls.assert_accurate(calls.gelu(op, *shape, size=size), impl, dtype)


@both
@every_implementation
def test_extreme_values_stay_finite(op, impl, dtype):
    x = torch.tensor([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30])
    x = x.to(under_test.device(impl), dtype)
    x.requires_grad_()
    y = getattr(ops, op)(x, impl=impl)
    y.sum().backward()
    assert torch.equal(y.detach(), torch.where(x > 0, x, 0.0))
    assert x.grad.tolist() == [0, 0, 0, 0.5, 1, 1, 1]


@both
@every_implementation
def test_nan_stays_nan(op, impl, dtype):
    x = torch.tensor([1.0, math.nan, 2.0], dtype=dtype, device=under_test.device(impl))
    x.requires_grad_()
    y = getattr(ops, op)(x, impl=impl)
    y.sum().backward()
    assert y.isnan().tolist() == x.grad.isnan().tolist() == [False, True, False]


@both
@every_implementation
def test_strided_views_and_expanded_gradients(op, impl, dtype):
    function = getattr(ops, op)
    wide = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    wide = wide.to(under_test.device(impl), dtype)
    for view in (wide[:, ::2], wide.T, wide[1:, 3:], wide[:1].expand(4, -1)):
        a, b = (each.detach().requires_grad_() for each in (view, view.contiguous()))
        got, wanted = function(a, impl=impl), function(b, impl=impl)
        got.sum().backward()
        wanted.backward(torch.ones_like(wanted))
        # The same scalar function, in vectors or not: an ulp of values up to 4.
        torch.testing.assert_close(got, wanted, rtol=0, atol=2**-20)
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=2**-20)


@both
@every_implementation
def test_only_the_input_is_kept_for_backward(op, impl, dtype):
    kept = []
    x = torch.randn(4, 5, device=under_test.device(impl), dtype=dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        getattr(ops, op)(x, impl=impl)
    assert len(kept) == 1
    assert kept[0].data_ptr() == x.data_ptr()


@both
@every_implementation
def test_compiles_whole_forward_and_backward(op, impl, dtype):
    torch._dynamo.reset()
    function = getattr(ops, op)
    compiled = torch.compile(lambda x: function(x, impl=impl), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, device=under_test.device(impl), dtype=dtype)
    a, b = (x.clone().requires_grad_() for _ in "12")
    got, wanted = compiled(a), function(b, impl=impl)
    got.square().sum().backward()
    wanted.square().sum().backward()
    # Roundings of values up to 4, should the compiler order them otherwise.
    torch.testing.assert_close(got, wanted, rtol=0, atol=2**-20)
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=2**-18)


@both
@every_implementation
def test_opcheck(op, impl, dtype):
    if impl == "reference":
        pytest.skip("called as it is, without an op")
    for shape in ((3, 5), (0,)):
        x = torch.randn(shape, device=under_test.device(impl), dtype=dtype)
        torch.library.opcheck(getattr(torch.ops.lamp_fast, op), (x, impl))
        torch.library.opcheck(getattr(torch.ops.lamp_fast, f"{op}_backward"), (x, x.clone(), impl))


SLOPE = {
    "quick_gelu": lambda x: (s := 1 / (1 + math.exp(-1.702 * x))) * (1 + 1.702 * x * (1 - s)),
    "gelu": lambda x: (
        0.5 * math.erfc(-x / math.sqrt(2)) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    ),
}
native = pytest.mark.skipif(
    ops.implementations("gelu")["cpp"] is not None, reason="the extension is not built"
)


@native
@both
def test_every_bfloat16_is_the_definition_rounded_once(op):
    """By way of float32, whose rounding may cross a tie by 2^-16 of a step, and in the gradient of
    a slope that was rounded to float32 and a product that is."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.abs() <= 300].requires_grad_()  # no exponential overflows in Python
    y = getattr(ops, op)(x, impl="cpp")
    above = torch.tensor([1.0, -3.25]).bfloat16().repeat(len(x))[: len(x)]
    y.backward(above)
    values = x.detach().double().tolist()
    half, least = 2.0**-8 * (1 + 2**-14), torch.finfo(torch.bfloat16).smallest_normal
    for got, function, factor in ((y.detach(), DEFINITION, 1), (x.grad, SLOPE, above.double())):
        wanted = torch.tensor([function[op](value) for value in values]).double() * factor
        # Below the normal numbers a step is 2^-7 of the smallest.
        allowed = half * wanted.abs().clamp(min=least)
        assert ((got.double() - wanted).abs() <= allowed).all()


@native
@both
def test_threads_change_no_bit_of_the_native_code(op):
    """More numbers than one part holds, and not whole vectors of them."""
    generator = torch.Generator().manual_seed(0)
    x, above = (torch.randn(700_001, generator=generator).bfloat16() for _ in "12")
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            a = x.clone().requires_grad_()
            y = getattr(ops, op)(a, impl="cpp")
            results.append((y.detach(), *torch.autograd.grad(y, a, above)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@native
def test_the_native_code_has_bfloat16_alone():
    with pytest.raises(InputError, match=r"impl='cpp': quick_gelu: expected bfloat16, .*float32"):
        ops.quick_gelu(torch.ones(3), impl="cpp")


@both
def test_integers_are_refused(op):
    with pytest.raises(InputError, match=r"x: torch\.int64"):
        getattr(ops, op)(torch.arange(3))
