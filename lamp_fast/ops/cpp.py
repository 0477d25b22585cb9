"""The C++ CPU implementations: torch tensors in and out of ``lamp_fast._C``."""

import torch
from torch import Tensor

from lamp_fast import _C


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
    query, keys = _contiguous_rows(query), _contiguous_rows(keys)
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


def _contiguous_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()
