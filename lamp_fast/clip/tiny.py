"""The small CLIP that the package carries, on disk and in memory.

Only the token-embedding rows that pre-training saw are stored. Every other row is redrawn as it
stood before the first step, so that any class name has an embedding of its own.
"""

import functools
import importlib.resources
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import load, save
from torch import Tensor

TOKEN_STD = 0.02
"""Standard deviation of an untrained embedding row: open_clip's own."""

_TOKEN_SEED = 49408
_CONFIG, _WEIGHTS = "config.json", "weights.safetensors"
_TABLE, _ROW_IDS, _ROWS = "token_embedding.weight", "token_embedding.ids", "token_embedding.rows"
_STORED_DTYPE = torch.float16

_warned = False


def carried_folder() -> Path:
    """The package's own folder of the carried weights; installs with an extension are unpacked."""
    return Path(str(importlib.resources.files("lamp_fast"))) / "assets" / "tiny_clip"


def carried_config() -> dict[str, Any]:
    """The arguments of ``open_clip.CLIP`` that build the carried CLIP."""
    return json.loads((carried_folder() / _CONFIG).read_text())


def build_tiny(config: Mapping[str, Any]) -> open_clip.CLIP:
    """An untrained tiny CLIP, its token embeddings drawn by :func:`untrained_token_rows`.

    Args:
        config: arguments of ``open_clip.CLIP``. The rest of the weights comes from torch's global
            generator.
    """
    model = open_clip.CLIP(**config)
    table = model.token_embedding.weight
    with torch.no_grad():
        table.copy_(untrained_token_rows(*table.shape))
    return model


def load_tiny(folder: Path | None = None) -> open_clip.CLIP:
    """Load a tiny CLIP, float32 and in evaluation mode.

    Args:
        folder: where :func:`save_tiny` wrote it; the carried one by default.
    """
    folder = folder or carried_folder()
    state = load((folder / _WEIGHTS).read_bytes())
    # Initial weights are drawn only to be overwritten; the caller's random stream is not theirs.
    with torch.random.fork_rng(devices=[]):
        model = build_tiny(json.loads((folder / _CONFIG).read_text()))
    state = {name: value if name == _ROW_IDS else value.float() for name, value in state.items()}
    table = model.token_embedding.weight.detach().clone()
    table[state.pop(_ROW_IDS)] = state.pop(_ROWS)
    model.load_state_dict({**state, _TABLE: table})
    return model.eval()


def save_tiny(
    model: open_clip.CLIP, config: Mapping[str, Any], seen_token_ids: Iterable[int], folder: Path
) -> None:
    """Write ``config.json`` and ``weights.safetensors`` (float16) into ``folder``, made if absent.

    Args:
        model: what to store.
        config: the arguments of ``open_clip.CLIP`` that build it.
        seen_token_ids: the ids whose embedding rows are kept.
        folder: files of the same names there are replaced.
    """
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    ids = torch.tensor(sorted(set(seen_token_ids)), dtype=torch.int64)
    state[_ROWS] = state.pop(_TABLE)[ids]
    state = {name: value.to(_STORED_DTYPE).contiguous() for name, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _WEIGHTS).write_bytes(save({**state, _ROW_IDS: ids}))
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def untrained_token_rows(vocabulary: int, width: int) -> Tensor:
    """The token embeddings before the first step: float32 [vocabulary, width].

    Row i is the same whatever the vocabulary's size. Each value is the sum of four uniform
    16-bit integers, centred and scaled to ``TOKEN_STD``: near enough a normal, and it needs only
    PCG64's raw stream, which numpy promises never to change, so the rows (and a fingerprint over
    them) are the same bits on every machine.
    """
    raw = np.random.PCG64(_TOKEN_SEED).random_raw(vocabulary * width)
    total = sum((raw >> np.uint64(16 * part)) & np.uint64(0xFFFF) for part in range(4))
    centred = total.astype(np.float64) - 4 * (2**16 - 1) / 2
    variance = 4 * (2**32 - 1) / 12
    rows = (centred * (TOKEN_STD / variance**0.5)).astype(np.float32)
    return torch.from_numpy(rows.reshape(vocabulary, width))


def warn_unseen_tokens(token_ids: Tensor) -> None:
    """Warn, once a process, when texts use tokens that the carried CLIP's pre-training never saw.

    Args:
        token_ids: int64 [..., context], each row ending with its eot (the largest id) and padding.
    """
    global _warned
    if _warned:
        return
    rows = token_ids.reshape(-1, token_ids.shape[-1])
    behind_eot = torch.arange(rows.shape[-1]) > rows.argmax(dim=-1, keepdim=True)
    unseen = set(rows[~behind_eot].tolist()) - _seen_token_ids()
    if unseen:
        _warned = True
        warnings.warn(
            f"{len(unseen)} tokens of these texts were never seen in the tiny CLIP's pre-training;"
            " their embeddings are random",
            stacklevel=2,
        )


@functools.cache
def _seen_token_ids() -> frozenset[int]:
    return frozenset(load((carried_folder() / _WEIGHTS).read_bytes())[_ROW_IDS].tolist())
