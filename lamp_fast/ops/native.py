"""What crosses to ``lamp_fast._C``: tensors as the structs of csrc/lamp.h, and the CUDA stream.

Structs hold addresses, so the caller keeps the tensors alive. Alike for C++ and CUDA.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lamp_fast import _C


def retrieve_params(
    query: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    k: int,
    indices: Tensor,
    similarity: Tensor,
    counts: Tensor | None,
    threads: int = 0,
) -> _C.RetrieveParams:
    """The first two are contiguous in their last dimension, the others wholly."""
    return _C.RetrieveParams(
        _dtype(query),
        (query.data_ptr(), query.stride(0)),
        (keys.data_ptr(), keys.stride(0)),
        *(address(each) for each in (bias, indices, similarity, counts)),
        query.shape[0],
        *keys.shape,
        k,
        threads,
    )


def prefix_attention_params(
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
    threads: int = 0,
) -> _C.PrefixAttentionParams:
    """For the forward; the first six are contiguous in their last dimension, the others wholly."""
    sequences, heads, rows, width = q.shape
    groups, prefix_length = prefix_k.shape[0], prefix_k.shape[2]
    return _C.PrefixAttentionParams(
        _dtype(q),
        *(_rows(each) for each in (q, k, v, prefix_k, prefix_v, out)),
        *(address(each) for each in (lse, prefix_index, mask)),
        (sequences, groups, heads, rows, k.shape[2], prefix_length, width),
        causal,
        blind,
        scale,
        threads,
    )


def prefix_attention_backward_params(
    forward: _C.PrefixAttentionParams,
    grad: Tensor,
    gradients: tuple[Tensor, ...],
    needs_own: bool,
    needs_prefix: bool,
) -> _C.PrefixAttentionBackwardParams:
    """For the backward: gradients of q, k, v, prefix_k and prefix_v, of which some are unwanted."""
    wanted = (needs_own,) * 3 + (needs_prefix,) * 2
    nothing = (0, 0, 0, 0)
    return _C.PrefixAttentionBackwardParams(
        forward,
        _rows(grad),
        *(_rows(x) if want else nothing for x, want in zip(gradients, wanted, strict=True)),
    )


def enqueue(function: Callable[..., None], *arguments) -> None:
    """Call a CUDA function with the current stream as the last argument."""
    function(*arguments, torch.cuda.current_stream().cuda_stream)


def address(x: Tensor | None) -> int:
    """Where a tensor begins; 0 for none."""
    return 0 if x is None else x.data_ptr()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def contiguous_rows(x: Tensor) -> Tensor:
    """Contiguous in its last dimension, by a copy if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of [N or G, H, rows, d]."""
    return x.data_ptr(), *x.stride()[:3]
