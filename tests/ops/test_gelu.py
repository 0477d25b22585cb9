"""quick_gelu and gelu: values by the definition, gradients, memory, every implementation."""

import math

import calls
import pytest
import torch
import under_test

from lamp_fast import ops
from lamp_fast.errors import InputError

DEFINITION = {
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
}
both = pytest.mark.parametrize("op", DEFINITION)
# The two have the same implementations.
every_implementation = under_test.implementations("gelu")


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
def test_extreme_values_stay_finite(op, impl):
    x = torch.tensor([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30], device=under_test.device(impl))
    x.requires_grad_()
    y = getattr(ops, op)(x, impl=impl)
    y.sum().backward()
    assert torch.equal(y.detach(), torch.where(x > 0, x, 0.0))
    assert x.grad.tolist() == [0, 0, 0, 0.5, 1, 1, 1]


@both
@every_implementation
def test_nan_stays_nan(op, impl):
    x = torch.tensor([1.0, math.nan, 2.0], device=under_test.device(impl), requires_grad=True)
    y = getattr(ops, op)(x, impl=impl)
    y.sum().backward()
    assert y.isnan().tolist() == x.grad.isnan().tolist() == [False, True, False]


@both
@every_implementation
def test_strided_views_and_expanded_gradients(op, impl):
    function = getattr(ops, op)
    wide = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    wide = wide.to(under_test.device(impl))
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
def test_only_the_input_is_kept_for_backward(op, impl):
    kept = []
    x = torch.randn(4, 5, device=under_test.device(impl), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        getattr(ops, op)(x, impl=impl)
    assert len(kept) == 1
    assert kept[0].data_ptr() == x.data_ptr()


@both
@every_implementation
def test_compiles_whole_forward_and_backward(op, impl):
    torch._dynamo.reset()
    function = getattr(ops, op)
    compiled = torch.compile(lambda x: function(x, impl=impl), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, device=under_test.device(impl))
    a, b = (x.clone().requires_grad_() for _ in "12")
    got, wanted = compiled(a), function(b, impl=impl)
    got.square().sum().backward()
    wanted.square().sum().backward()
    # Roundings of values up to 4, should the compiler order them otherwise.
    torch.testing.assert_close(got, wanted, rtol=0, atol=2**-20)
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=2**-18)


@both
@every_implementation
def test_opcheck(op, impl):
    if impl == "reference":
        pytest.skip("called as it is, without an op")
    for shape in ((3, 5), (0,)):
        x = torch.randn(shape, device=under_test.device(impl))
        torch.library.opcheck(getattr(torch.ops.lamp_fast, op), (x, impl))
        torch.library.opcheck(getattr(torch.ops.lamp_fast, f"{op}_backward"), (x, x.clone(), impl))


@both
def test_integers_are_refused(op):
    with pytest.raises(InputError, match=r"x: torch\.int64"):
        getattr(ops, op)(torch.arange(3))
