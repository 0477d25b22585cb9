"""The C++ CPU implementations: torch tensors in and out of ``lamp_fast._C``."""

import torch
from torch import Tensor

from lamp_fast import _C
from lamp_fast.ops.native import (
    contiguous,
    contiguous_rows,
    prefix_attention_backward_params,
    prefix_attention_params,
)


def retrieve(
    query: Tensor,
    keys: Tensor,
    bias: Tensor,
    k: int,
    indices: Tensor,
    similarity: Tensor,
    counts: Tensor,
) -> None:
    """See :func:`lamp_fast.ops.retrieve`; float32 or float64."""
    query, keys = contiguous_rows(query), contiguous_rows(keys)
    bias = bias.to(query.dtype).contiguous()
    _C.retrieve(
        query.dtype == torch.float64,
        query.data_ptr(),
        keys.data_ptr(),
        bias.data_ptr(),
        indices.data_ptr(),
        similarity.data_ptr(),
        counts.data_ptr(),
        query.stride(0),
        keys.stride(0),
        query.shape[0],
        keys.shape[0],
        query.shape[1],
        k,
        torch.get_num_threads(),
    )


def retrieve_backward(
    query: Tensor,
    keys: Tensor,
    indices: Tensor,
    similarity: Tensor,
    grad: Tensor,
    grad_query: Tensor,
    grad_keys: Tensor,
) -> None:
    """The closed form of ``lamp_fast.ops.retrieve``, summed in float64."""
    query, keys = contiguous_rows(query), contiguous_rows(keys)
    indices, similarity, grad = indices.contiguous(), similarity.contiguous(), grad.contiguous()
    _C.retrieve_backward(
        query.dtype == torch.float64,
        query.data_ptr(),
        keys.data_ptr(),
        indices.data_ptr(),
        similarity.data_ptr(),
        grad.data_ptr(),
        grad_query.data_ptr(),
        grad_keys.data_ptr(),
        query.stride(0),
        keys.stride(0),
        query.shape[0],
        keys.shape[0],
        query.shape[1],
        indices.shape[1],
        torch.get_num_threads(),
    )


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
    """See :func:`lamp_fast.ops.prefix_attention`; half precision through a float32 copy."""
    tensors = [_native(each) for each in (q, k, v, prefix_k, prefix_v)]
    prefix_index, mask = contiguous(prefix_index), contiguous(mask)
    computed = _computed(out)
    _C.prefix_attention(
        prefix_attention_params(
            *(*tensors, computed, lse, prefix_index, mask, causal, blind, scale),
            torch.get_num_threads(),
        )
    )
    _round_once(computed, out)


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
    """The gradients of q, k, v, prefix_k and prefix_v; reads neither ``out`` nor ``lse``."""
    tensors = [_native(each) for each in (q, k, v, prefix_k, prefix_v)]
    prefix_index, mask = contiguous(prefix_index), contiguous(mask)
    grad = _native(grad)
    computed = [_computed(each) for each in gradients]
    forward = prefix_attention_params(
        *(*tensors, out, lse, prefix_index, mask, causal, blind, scale), torch.get_num_threads()
    )
    _C.prefix_attention_backward(
        prefix_attention_backward_params(forward, grad, computed, needs_own, needs_prefix)
    )
    for source, target in zip(computed, gradients, strict=True):
        _round_once(source, target)


def _native(x: Tensor) -> Tensor:
    """Contiguous in its last dimension, float32 or float64."""
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    return contiguous_rows(x)


def _computed(out: Tensor) -> Tensor:
    """Where the native code writes what ``out`` is to hold."""
    native = out.dtype in (torch.float32, torch.float64)
    return out if native else torch.empty_like(out, dtype=torch.float32)


def _round_once(computed: Tensor, out: Tensor) -> None:
    if computed is not out:
        out.copy_(computed)
