"""The C++ CPU implementations: torch tensors in and out of ``lamp_fast._C``."""

from collections.abc import Callable

import torch
from torch import Tensor

from lamp_fast import _C
from lamp_fast.ops.native import (
    address,
    contiguous,
    contiguous_rows,
    prefix_attention_backward_params,
    prefix_attention_params,
    retrieve_params,
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
    outputs = indices, similarity, counts
    _C.retrieve(retrieve_params(query, keys, bias, k, *outputs, torch.get_num_threads()))


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
    forward = retrieve_params(
        *(query, keys, None, indices.shape[1], indices, similarity, None), torch.get_num_threads()
    )
    results = (address(each) for each in (grad, grad_query, grad_keys))
    _C.retrieve_backward(_C.RetrieveBackwardParams(forward, *results))


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
    """See :func:`lamp_fast.ops.prefix_attention`; float16 through a float32 copy."""
    tensors = [contiguous_rows(_native(each)) for each in (q, k, v, prefix_k, prefix_v)]
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
    tensors = [contiguous_rows(_native(each)) for each in (q, k, v, prefix_k, prefix_v)]
    prefix_index, mask = contiguous(prefix_index), contiguous(mask)
    grad = contiguous_rows(_native(grad))
    computed = [_computed(each) for each in gradients[:3]]
    # A prefix's gradients are sums over all sequences that read it.
    computed += [_computed(each, sums=True) for each in gradients[3:]]
    forward = prefix_attention_params(
        *(*tensors, out, lse, prefix_index, mask, causal, blind, scale), torch.get_num_threads()
    )
    _C.prefix_attention_backward(
        prefix_attention_backward_params(forward, grad, computed, needs_own, needs_prefix)
    )
    for source, target in zip(computed, gradients, strict=True):
        _round_once(source, target)


def quick_gelu(x: Tensor, out: Tensor) -> None:
    """See :func:`lamp_fast.ops.quick_gelu`; bfloat16."""
    _activate(_C.quick_gelu_bf16, x, out=out)


def quick_gelu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    """The gradient of x."""
    _activate(_C.quick_gelu_bf16_backward, grad, x, out=out)


def gelu(x: Tensor, out: Tensor) -> None:
    """See :func:`lamp_fast.ops.gelu`; bfloat16."""
    _activate(_C.gelu_bf16, x, out=out)


def gelu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    """The gradient of x."""
    _activate(_C.gelu_bf16_backward, grad, x, out=out)


def _activate(function: Callable[..., None], *inputs: Tensor, out: Tensor) -> None:
    inputs = [each.contiguous() for each in inputs]
    addresses = (address(each) for each in (*inputs, out))
    function(*addresses, out.numel(), torch.get_num_threads())


_NATIVE = torch.float32, torch.float64, torch.bfloat16


def _native(x: Tensor) -> Tensor:
    """In a dtype that the native code reads."""
    return x if x.dtype in _NATIVE else x.float()


def _computed(out: Tensor, *, sums: bool = False) -> Tensor:
    """Where the native code writes what ``out`` is to hold; sums are not in half precision."""
    native = out.dtype in (_NATIVE[:2] if sums else _NATIVE)
    return out if native else torch.empty_like(out, dtype=torch.float32)


def _round_once(computed: Tensor, out: Tensor) -> None:
    if computed is not out:
        out.copy_(computed)
