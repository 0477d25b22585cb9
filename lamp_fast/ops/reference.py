"""The eager oracles: every op in plain torch, differentiable by autograd, obvious before fast."""

import torch
import torch.nn.functional as F
from torch import Tensor


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :class:`lamp_fast.ops.FrozenLinear`."""
    return F.linear(x, weight, bias)


def retrieve(query: Tensor, keys: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`lamp_fast.ops.retrieve`."""
    # float64 is out of reach of autocast and TF32, and squares of float32 neither over- nor
    # underflow in it; scores are then formed in the dtype of the similarity.
    similarity = (_unit(query.double()) @ _unit(keys.double()).T).to(query.dtype)  # [B, M]
    scores = similarity.detach() + bias.to(query.dtype)
    unordered = scores.isnan().any(dim=1, keepdim=True)  # [B, 1]
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    first = torch.arange(k, device=query.device)
    indices = torch.where(unordered, first, best).sort(dim=1).values
    chosen = torch.zeros_like(scores, dtype=torch.int64)
    counts = chosen.scatter(1, indices, (~unordered).long().expand(-1, k)).sum(dim=0)
    return indices, similarity.gather(1, indices).masked_fill(unordered, float("nan")), counts


def retrieve_backward(
    query: Tensor,
    keys: Tensor,
    indices: Tensor,
    similarity: Tensor,
    grad: Tensor,
    grad_query: Tensor,
    grad_keys: Tensor,
) -> None:
    """The closed form of ``lamp_fast.ops.retrieve``, for forwards without their own.

    float64 for the reasons above; the sums run over Dv and over B.
    """
    unit_query, inverse_query = _unit_and_inverse_norm(query.double())
    unit_keys, inverse_keys = _unit_and_inverse_norm(keys.double())
    grad = grad.double()
    weighted = grad * similarity.double()  # [B, k]
    # A row chooses an entry at most once, so that no two of its gradients meet.
    spread = grad.new_zeros(len(query), len(keys))
    dense = spread.scatter(1, indices, grad)  # [B, M]
    along = weighted.sum(dim=1, keepdim=True)
    grad_query.copy_((dense @ unit_keys - along * unit_query) * inverse_query)
    along = spread.scatter(1, indices, weighted).sum(dim=0)[:, None]
    grad_keys.copy_((dense.T @ unit_query - along * unit_keys) * inverse_keys)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_index: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    blind: int,
    scale: float,
) -> Tensor:
    """See :func:`lamp_fast.ops.prefix_attention`."""
    sequences, rows, length, prefix_length = len(q), q.shape[2], k.shape[2], prefix_k.shape[2]
    if prefix_length:
        k = torch.cat([_per_sequence(prefix_k, prefix_index, sequences), k], dim=2)
        v = torch.cat([_per_sequence(prefix_v, prefix_index, sequences), v], dim=2)
    if mask is None and (causal or (blind and prefix_length)):
        # A mask costs torch its fastest path, so there is one only where a row is kept from a key.
        mask = q.new_ones(length, prefix_length + length, dtype=torch.bool)
        mask[:blind, :prefix_length] = False
        if causal:
            mask = mask.tril(prefix_length)
        mask = mask[length - rows :]
    if q.numel() == 0:
        return q @ k.mT @ v  # torch 2.11 divides by the number of heads, and the process dies
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def quick_gelu(x: Tensor) -> Tensor:
    """See :func:`lamp_fast.ops.quick_gelu`."""
    return x * torch.sigmoid(1.702 * x)


def gelu(x: Tensor) -> Tensor:
    """See :func:`lamp_fast.ops.gelu`."""
    return F.gelu(x)


def add_layer_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`lamp_fast.ops.add_layer_norm`."""
    total = x + update
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero and takes no gradient."""
    norm = rows.norm(dim=1, keepdim=True)
    zero = norm == 0
    return (rows / norm.masked_fill(zero, 1)).masked_fill(zero, 0)


def _per_sequence(prefix: Tensor, prefix_index: Tensor | None, sequences: int) -> Tensor:
    """[G, H, P, d] -> [N, H, P, d]."""
    if prefix_index is not None:
        return prefix[prefix_index]
    groups = prefix.shape[0]
    if groups == sequences:
        return prefix
    # An expanded view rather than an index: its gradient is a plain, ordered sum.
    return prefix[:, None].expand(-1, sequences // groups, -1, -1, -1).flatten(0, 1)


def _unit_and_inverse_norm(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[R, D] -> unit rows [R, D] and 1 / norm [R, 1]; zeros for a zero row."""
    norm = rows.norm(dim=1, keepdim=True)
    inverse = norm.reciprocal().masked_fill(norm == 0, 0)
    return rows * inverse, inverse
