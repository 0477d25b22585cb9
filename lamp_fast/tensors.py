"""Tensors with facts in one safetensors file: whole or not there, and known to be as written."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lamp_fast.errors import InputError
from lamp_fast.files import parse_json, read_regular, reason_of, write_bytes


def save_tensors(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write named tensors with JSON facts, and a digest of both, in one safetensors file."""
    held = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    # One entry for both: safetensors writes several in no order, and equal files shall be equal.
    entry = json.dumps([facts, digest_tensors(held, facts)])
    write_bytes(file, to_safetensors(held, metadata={"facts": entry}))


def load_tensors(file: Path) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`save_tensors` wrote, in this version or one that kept no digest.

    Raises:
        InputError: naming a file that is missing or damaged, or holds values that are not finite.
    """
    if not file.is_file():
        read_regular(file)
    try:
        with safe_open(file, framework="pt") as archive:
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            facts = parse_json((archive.metadata() or {}).get("facts", "{}"))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{file}: damaged ({reason_of(error)})") from None
    if isinstance(facts, list):  # a dictionary where there is no digest yet
        if len(facts) != 2 or facts[1] != digest_tensors(tensors, facts[0]):
            raise InputError(f"{file}: damaged (its content is not that of its sha256)")
        facts = facts[0]
    for name, each in tensors.items():
        if each.is_floating_point() and not bool(torch.isfinite(each).all()):
            raise InputError(f"{file}: {name} holds values that are not finite")
    return tensors, facts


def digest_tensors(tensors: Mapping[str, Tensor], facts: Any = None) -> str:
    """sha256 over the facts as JSON and the names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, each in sorted(tensors.items()):
        digest.update(f"\n{name} {each.dtype} {tuple(each.shape)}\n".encode())
        held = each.detach().cpu().contiguous()
        digest.update(held.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
