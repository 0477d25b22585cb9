"""Products with weights that are packed once, by the oneDNN that torch carries.

torch packs a weight into oneDNN's blocks again in every product, or hands float32 to MKL. The two
functions of torch used here are not public; torch.compile's CPU code stands on them.
"""

import torch
from torch import Tensor

try:
    _pack = torch.ops.mkldnn._reorder_linear_weight.default
    _product = torch.ops.mkldnn._linear_pointwise.default
except AttributeError:
    raise ImportError(f"torch {torch.__version__} was built without oneDNN's products") from None


def pack(weight: Tensor) -> Tensor:
    """A weight [N, K] in oneDNN's blocks: as large, of use to :func:`frozen_linear` alone."""
    return _pack(weight.detach().contiguous())


def frozen_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times a packed weight's transpose, plus bias [N]: [..., N]."""
    return _product(x, packed, bias, "none", [], "")
