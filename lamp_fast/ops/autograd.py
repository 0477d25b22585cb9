"""Gradients of the ops' implementations: autograd around :mod:`lamp_fast.ops.contracts`.

A backward calls ops alone, never autograd, so that torch.compile traces it. ``name`` is always the
implementation.
"""

import torch
from torch import Tensor

from lamp_fast.ops import contracts, reference


def _backward_name(op: str, name: str) -> str:
    return contracts.IMPLEMENTATIONS[op][name].backward or name


class Retrieve(torch.autograd.Function):
    """The gradient of every fused retrieve, in closed form.

    With unit rows q^ and k^, and s the chosen similarities with gradient g:
    dq_b = sum_j g_bj (k^_bj - s_bj q^_b) / |q_b|, and alike for every key over the rows that
    chose it.
    """

    @staticmethod
    def forward(ctx, query: Tensor, keys: Tensor, bias: Tensor, k: int, name: str):
        indices, similarity, counts = contracts.retrieve(query, keys, bias, k, name)
        ctx.save_for_backward(query, keys, indices, similarity)
        ctx.name = name
        ctx.mark_non_differentiable(indices, counts)
        return indices, similarity, counts

    @staticmethod
    def backward(ctx, _indices, gradient: Tensor, _counts):
        query, keys, indices, similarity = ctx.saved_tensors
        grad_query, grad_keys = contracts.retrieve_backward(
            query, keys, indices, similarity, gradient, _backward_name("retrieve", ctx.name)
        )
        needs_query, needs_keys = ctx.needs_input_grad[:2]
        return (
            grad_query if needs_query else None,
            grad_keys if needs_keys else None,
            None,
            None,
            None,
        )


class PrefixAttention(torch.autograd.Function):
    """Softmax attention, formed again in backward from each row's log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, prefix_index, mask, causal, blind, scale, name):
        out, lse = contracts.prefix_attention(
            q, k, v, prefix_k, prefix_v, prefix_index, mask, causal, blind, scale, name
        )
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, out, lse, prefix_index, mask)
        ctx.options = causal, blind, scale
        ctx.name = name
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        *tensors, prefix_index, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        gradients = contracts.prefix_attention_backward(
            gradient,
            *tensors,
            prefix_index,
            mask,
            *ctx.options,
            any(needs[:3]),
            any(needs[3:]),
            _backward_name("prefix_attention", ctx.name),
        )
        wanted = (each if need else None for each, need in zip(gradients, needs, strict=True))
        return (*wanted, None, None, None, None, None, None)


class Gelu(torch.autograd.Function):
    """quick_gelu or gelu of an implementation; keeps the pre-activation alone."""

    @staticmethod
    def forward(ctx, x: Tensor, op: str, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.op, ctx.name = op, name
        return contracts.pointwise[op](x, name)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (x,) = ctx.saved_tensors
        return contracts.pointwise_backward[ctx.op](gradient, x, ctx.name), None, None


class ReferenceQuickGelu(torch.autograd.Function):
    """d/dx x s = s (1 + 1.702 x (1 - s)) with s = sigmoid(1.702 x), formed again from x.

    Left to autograd the reference would keep two more tensors; gelu's own keeps x alone.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return reference.quick_gelu(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(1.702 * x)
        return gradient * (gate * (1 + 1.702 * x * (1 - gate)))


class AddLayerNorm(torch.autograd.Function):
    """LayerNorm of a sum; both summands share one gradient, the sum's own added in the kernel."""

    @staticmethod
    def forward(ctx, x, update, weight, bias, eps: float, name: str):
        ctx.set_materialize_grads(False)
        total, normed, mean, rstd = contracts.add_layer_norm(x, update, weight, bias, eps, name)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.name = name
        return total, normed

    @staticmethod
    def backward(ctx, grad_total: Tensor | None, grad_normed: Tensor | None):
        total, weight, mean, rstd = ctx.saved_tensors
        grad = grad_total
        if grad_normed is not None:
            grad = contracts.add_layer_norm_backward(
                grad_normed, grad_total, total, weight, mean, rstd, ctx.name
            )
        needs_x, needs_update = ctx.needs_input_grad[:2]
        return grad if needs_x else None, grad if needs_update else None, None, None, None, None
