"""The ops of LAMP, each behind one function with a choice of implementations, in a file of its own.

``impl=None`` takes what serves the tensors best in this installation, by the table in the op's
file. An implementation that is asked for by name runs or is refused with the reason; it is never
replaced silently.
"""

from lamp_fast.ops.add_layer_norm import add_layer_norm
from lamp_fast.ops.dispatch import implementations, prefer
from lamp_fast.ops.frozen_linear import FrozenLinear
from lamp_fast.ops.prefix_attention import prefix_attention
from lamp_fast.ops.quick_gelu import gelu, quick_gelu
from lamp_fast.ops.retrieve import retrieve

__all__ = [
    "FrozenLinear",
    "add_layer_norm",
    "gelu",
    "implementations",
    "prefer",
    "prefix_attention",
    "quick_gelu",
    "retrieve",
]
