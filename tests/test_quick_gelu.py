"""quick_gelu: its values by the definition, its gradient by finite differences, its memory."""

import math

import pytest
import torch

from lamp_fast import ops
from lamp_fast.errors import InputError


def test_values_are_the_definition():
    x = torch.linspace(-8, 8, 65, dtype=torch.float64)
    wanted = [value / (1 + math.exp(-1.702 * value)) for value in x.tolist()]
    # A handful of float64 roundings of values up to 8.
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(ops.quick_gelu(x), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_gradient(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.quick_gelu, x)


def test_extreme_values_stay_finite():
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    ops.quick_gelu(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_only_the_input_is_kept_for_backward():
    kept = []
    x = torch.randn(4, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.quick_gelu(x)
    assert len(kept) == 1
    assert kept[0].data_ptr() == x.data_ptr()


def test_integers_are_refused():
    with pytest.raises(InputError, match=r"x: torch\.int64"):
        ops.quick_gelu(torch.arange(3))
