"""What the public ops accept: one check each, one line for what does not fit."""

import torch
from torch import Tensor

from lamp_fast.errors import InputError


def check_retrieve(query: Tensor, keys: Tensor, bias: Tensor, k: int) -> None:
    """Refuse what :func:`lamp_fast.ops.retrieve` does not take."""
    _check_like("query", query, "keys", keys)
    for name, rows in (("query", query), ("keys", keys)):
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise InputError(f"{name}: shape {_shape(rows)}, expected [rows, Dv] with Dv >= 1")
    if keys.shape[1] != query.shape[1]:
        raise InputError(
            f"keys: shape {_shape(keys)}, expected [M, {query.shape[1]}] as query is "
            f"{_shape(query)}"
        )
    if keys.shape[0] == 0:
        raise InputError(f"keys: shape {_shape(keys)}, expected at least one row")
    if bias.shape != keys.shape[:1] or not bias.is_floating_point():
        raise InputError(
            f"bias: {bias.dtype} {_shape(bias)}, expected floating point [{keys.shape[0]}], "
            "one for every row of keys"
        )
    if bias.device != query.device:
        raise InputError(f"bias: on {bias.device}, expected {query.device} as query")
    if not 1 <= k <= keys.shape[0]:
        raise InputError(f"k={k}: expected 1..{keys.shape[0]}, the rows of keys")


def check_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_index: Tensor | None,
    blind: int,
) -> None:
    """Refuse what :func:`lamp_fast.ops.prefix_attention` does not take, its mask apart."""
    if q.ndim != 4 or q.shape[3] == 0:
        raise InputError(f"q: shape {_shape(q)}, expected [N, H, L, d] with d >= 1")
    _check_like("q", q, "k", k)
    _check_like("q", q, "v", v)
    if k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise InputError(
            f"k: shape {_shape(k)}, expected [{q.shape[0]}, {q.shape[1]}, L, {q.shape[3]}] as q is "
            f"{_shape(q)}"
        )
    if k.shape[2] < q.shape[2]:
        raise InputError(f"k: {k.shape[2]} rows, expected at least the {q.shape[2]} of q")
    if v.shape != k.shape:
        raise InputError(f"v: shape {_shape(v)}, expected {_shape(k)} as k")
    _check_like("q", q, "prefix_k", prefix_k)
    _check_like("q", q, "prefix_v", prefix_v)
    sequences, heads, _, width = q.shape
    if prefix_k.ndim != 4 or prefix_k.shape[1] != heads or prefix_k.shape[3] != width:
        raise InputError(
            f"prefix_k: shape {_shape(prefix_k)}, expected [G, {heads}, P, {width}] as q is "
            f"{_shape(q)}"
        )
    if prefix_v.shape != prefix_k.shape:
        raise InputError(
            f"prefix_v: shape {_shape(prefix_v)}, expected {_shape(prefix_k)} as prefix_k"
        )
    if blind < 0:
        raise InputError(f"blind={blind}: expected 0 or more rows")
    groups = prefix_k.shape[0]
    if prefix_index is None:
        if sequences and (groups == 0 or sequences % groups):
            raise InputError(
                f"prefix_k: {groups} prefixes for {sequences} sequences, expected a divisor of "
                f"{sequences}, or prefix_index"
            )
        return
    if prefix_index.shape != q.shape[:1] or prefix_index.dtype != torch.int64:
        raise InputError(
            f"prefix_index: {prefix_index.dtype} {_shape(prefix_index)}, expected torch.int64 "
            f"[{sequences}], one for every sequence of q"
        )
    if prefix_index.device != q.device:
        raise InputError(f"prefix_index: on {prefix_index.device}, expected {q.device} as q")
    # Reading values would wait for a GPU and cannot be traced.
    if sequences and q.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in prefix_index.aminmax())
        if low < 0 or high >= groups:
            wrong = low if low < 0 else high
            raise InputError(f"prefix_index: holds {wrong}, expected 0..{groups - 1}")


def check_mask(
    mask: Tensor, q: Tensor, k: Tensor, prefix_k: Tensor, causal: bool, blind: int
) -> None:
    """Refuse a mask that does not fit."""
    expected = [q.shape[2], prefix_k.shape[2] + k.shape[2]]
    if mask.dtype != torch.bool or _shape(mask) != expected:
        raise InputError(f"mask: {mask.dtype} {_shape(mask)}, expected torch.bool {expected}")
    if mask.device != q.device:
        raise InputError(f"mask: on {mask.device}, expected {q.device} as q")
    if causal or blind:
        raise InputError(f"mask: given with causal={causal}, blind={blind}; expected one or other")


def check_add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Refuse what :func:`lamp_fast.ops.add_layer_norm` does not take."""
    for name, tensor in (("update", update), ("weight", weight), ("bias", bias)):
        _check_like("x", x, name, tensor)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise InputError(f"x: shape {_shape(x)}, expected [..., D] with D >= 1")
    if update.shape != x.shape:
        raise InputError(f"update: shape {_shape(update)}, expected {_shape(x)} as x")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[-1:]:
            raise InputError(f"{name}: shape {_shape(tensor)}, expected {_shape(x)[-1:]}, x's last")
        if tensor.requires_grad:
            raise InputError(f"{name}: requires a gradient, expected a frozen LayerNorm")


def _check_like(first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    if not first.is_floating_point():
        raise InputError(f"{first_name}: {first.dtype}, expected floating point")
    if tensor.dtype != first.dtype:
        raise InputError(f"{name}: {tensor.dtype}, expected {first.dtype} as {first_name}")
    if tensor.device != first.device:
        raise InputError(f"{name}: on {tensor.device}, expected {first.device} as {first_name}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
