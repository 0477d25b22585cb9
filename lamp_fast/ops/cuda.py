"""The CUDA implementations: torch tensors in and out of ``lamp_fast._C``.

The caller makes the tensors' device the current one. Everything is enqueued on its current stream
and nothing waits, so a CUDA graph can capture it.
"""

import torch
from torch import Tensor

from lamp_fast import _C
from lamp_fast.ops.native import (
    address,
    contiguous,
    contiguous_rows,
    enqueue,
    prefix_attention_backward_params,
    prefix_attention_params,
    retrieve_params,
)

if not _C.build_info()["cuda"]:
    raise ImportError(f"lamp_fast._C has no CUDA: {_C.build_info()['cuda_reason']}")

# Each gradient of a prefix row is one walk over the rows that see it. Fewer walks than fill a large
# GPU are cut into parts, though never shorter than is worth a second pass. Fixed numbers, so that
# every GPU sums in the same order.
_ENOUGH_WALKS = 8192
_SHORT_WALK = 64


def retrieve(
    query: Tensor,
    keys: Tensor,
    bias: Tensor,
    k: int,
    indices: Tensor,
    similarity: Tensor,
    counts: Tensor,
) -> None:
    """See :func:`lamp_fast.ops.retrieve`; float32."""
    query, keys = contiguous_rows(query), contiguous_rows(keys)
    bias = bias.to(torch.float32).contiguous()
    enqueue(_C.retrieve_cuda, retrieve_params(query, keys, bias, k, indices, similarity, counts))


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
    out: Tensor,
    lse: Tensor,
) -> None:
    """See :func:`lamp_fast.ops.prefix_attention`."""
    tensors = [contiguous_rows(each) for each in (q, k, v, prefix_k, prefix_v)]
    prefix_index, mask = contiguous(prefix_index), contiguous(mask)
    params = prefix_attention_params(*tensors, out, lse, prefix_index, mask, causal, blind, scale)
    seen_keys = None if mask is None else _lists(*mask.shape, q.device)
    enqueue(_C.prefix_attention_cuda, params, address(seen_keys))


def prefix_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    out: Tensor,
    lse: Tensor,
    prefix_index: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    blind: int,
    scale: float,
    needs_own: bool,
    needs_prefix: bool,
    *gradients: Tensor,
) -> None:
    """The gradients of q, k, v, prefix_k and prefix_v, from the forward's results."""
    tensors = [contiguous_rows(each) for each in (q, k, v, prefix_k, prefix_v)]
    out, grad, lse = contiguous_rows(out), contiguous_rows(grad), lse.contiguous()
    prefix_index, mask = contiguous(prefix_index), contiguous(mask)
    forward = prefix_attention_params(*tensors, out, lse, prefix_index, mask, causal, blind, scale)
    params = prefix_attention_backward_params(forward, grad, gradients, needs_own, needs_prefix)

    seen_keys = seeing_rows = order = offsets = partial = None
    if mask is not None:
        seen_keys, seeing_rows = _lists(*mask.shape, q.device), _lists(*mask.T.shape, q.device)
    parts = 1
    if needs_prefix:
        if prefix_index is not None:
            order, offsets = _by_group(prefix_index, len(prefix_k))
        parts = _parts(q, prefix_k)
        if parts > 1:
            partial = lse.new_empty((parts, *prefix_k.shape[:3], 2, q.shape[3]))
    delta = torch.empty_like(lse)
    enqueue(
        _C.prefix_attention_backward_cuda,
        params,
        *(address(each) for each in (seen_keys, seeing_rows, delta, order, offsets, partial)),
        parts,
    )


def _lists(entries: int, longest: int, device: torch.device) -> Tensor:
    """Room for a list an entry, each after its length."""
    return torch.empty((entries, 1 + longest), dtype=torch.int32, device=device)


def _by_group(prefix_index: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The sequences stably sorted by group [N], and where each group begins [G + 1]."""
    ordered, order = prefix_index.sort(stable=True)
    bounds = torch.arange(groups + 1, device=prefix_index.device)
    return order, torch.searchsorted(ordered, bounds)


def _parts(q: Tensor, prefix_k: Tensor) -> int:
    sequences, _, rows, _ = q.shape
    groups, heads, prefix_length, _ = prefix_k.shape
    walks = groups * heads * prefix_length
    if walks == 0:
        return 1
    return max(1, min(_ENOUGH_WALKS // walks, sequences * rows // groups // _SHORT_WALK))
