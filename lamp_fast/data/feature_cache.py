"""Features of pictures on disk, so that a frozen tower sees a picture once and not once a run.

Features of one kind (a tower, what it is shown of a picture) lie in shards: safetensors files that
are written once, each with the features of some pictures and the sha256 of each picture. A shard's
name begins with a hash over its kind, so other weights, another crop or another decoder never meet
it; the rest of the name is a hash over its content, which finds what the disk damaged, and such a
shard is removed. Of a picture that is in two shards the first by name counts, for every reader.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lamp_fast.data.disk_cache import DiskCache

_PICTURES, _FEATURES = "pictures", "features"
_KIND_LETTERS = 32


class FeatureCache(DiskCache):
    """The features of one machine; see :class:`lamp_fast.data.disk_cache.DiskCache`."""

    subfolder = "features"

    def read(self, kind: str, digests: np.ndarray) -> tuple[np.ndarray, Tensor | None]:
        """What is kept of some pictures.

        Args:
            kind: everything beside the picture that decides about its features.
            digests: uint8 [N, 32], sha256 of each picture.

        Returns:
            bool [N], which are known; features [N, ...], whose other rows hold anything, None where
            none is known. A damaged shard is removed.
        """
        wanted = as_keys(digests)
        order = np.argsort(wanted)
        known = np.zeros(len(digests), dtype=bool)
        features: Tensor | None = None
        for file in self._shards(kind):
            shard = self._load(file)
            if shard is None:
                continue
            # Whatever pictures of the shard are asked for, and how often.
            held = as_keys(shard[_PICTURES].numpy())
            ranks = np.argsort(held)
            place = np.searchsorted(held[ranks], wanted[order]).clip(max=len(held) - 1)
            rows = ranks[place]
            found = (held[rows] == wanted[order]) & ~known[order]
            if not found.any():
                continue
            self._used(file)
            values = shard[_FEATURES]
            if features is None:
                features = values.new_empty((len(digests), *values.shape[1:]))
            features[order[found]] = values[rows[found]]
            known[order[found]] = True
        return known, features

    def write(self, kind: str, digests: np.ndarray, features: Tensor) -> None:
        """Keep the features of some pictures where there is room.

        Args:
            kind: as in :meth:`read`.
            digests: uint8 [N, 32], sha256 of each picture.
            features: [N, ...].
        """
        if not self._writes or not len(digests):
            return
        pictures = torch.from_numpy(np.array(digests))
        content = to_safetensors({_PICTURES: pictures, _FEATURES: features.contiguous().cpu()})
        name = _prefix(kind) + hashlib.sha256(content).hexdigest()[:_KIND_LETTERS]
        self._write(self.folder / name[:2] / name, content)

    def _shards(self, kind: str) -> Iterator[Path]:
        prefix = _prefix(kind)
        yield from sorted((self.folder / prefix[:2]).glob(f"{prefix}*"))

    def _load(self, file: Path) -> dict[str, Tensor] | None:
        try:
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest()[:_KIND_LETTERS] == file.name[_KIND_LETTERS:]:
                shard = from_safetensors(content)
                if len(shard[_PICTURES]) == len(shard[_FEATURES]) > 0:
                    return shard
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError):
            pass
        with contextlib.suppress(OSError):
            file.unlink()
        return None


def _prefix(kind: str) -> str:
    return hashlib.sha256(kind.encode()).hexdigest()[:_KIND_LETTERS]


def as_keys(digests: np.ndarray) -> np.ndarray:
    """Each digest as one value that sorts and compares: [N] of 32 bytes."""
    return np.ascontiguousarray(digests).view("S32")[:, 0]
