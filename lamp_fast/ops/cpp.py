"""The C++ CPU implementations: torch tensors in and out of ``lamp_fast._C``."""

import torch
from torch import Tensor

from lamp_fast import _C


def retrieve(query: Tensor, keys: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`lamp_fast.ops.retrieve`; float32 or float64, without gradient."""
    query, keys = _contiguous_rows(query), _contiguous_rows(keys)
    bias = bias.to(query.dtype).contiguous()
    batch, width = query.shape
    pool_size = keys.shape[0]
    indices = torch.empty((batch, k), dtype=torch.int64)
    similarity = torch.empty((batch, k), dtype=query.dtype)
    counts = torch.empty(pool_size, dtype=torch.int64)
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
        batch,
        pool_size,
        width,
        k,
        torch.get_num_threads(),
    )
    return indices, similarity, counts


def _contiguous_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()
