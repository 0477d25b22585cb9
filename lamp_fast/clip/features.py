"""What the frozen image tower makes of pictures, computed once.

Kept are the rows before the projection, ``ln_post(cls)`` [V] a picture: half of what a method may
start from, and all of it, since the projection is one product (:meth:`VisionTower.project`).
"""

import json
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

from lamp_fast.clip.towers import FrozenClip, last_cls
from lamp_fast.data.decoded import DECODER
from lamp_fast.data.feature_cache import FeatureCache, as_keys
from lamp_fast.data.loading import (
    Batches,
    Transform,
    evaluation_batches,
    move_batches,
    view_batches,
)
from lamp_fast.data.pictures import Pictures

# Raised whenever the towers or the transforms make other features of the same pictures.
_REVISION = 1
# An interrupted run has kept all but this many pictures.
_PICTURES_A_SHARD = 8192


@torch.no_grad()
def unprojected_features(clip: FrozenClip, images: Tensor) -> Tensor:
    """The last cls rows behind ln_post: images [B, 3, S, S] to [B, V], in the tower's dtype.

    Such rows [B, V] in place of images are given back.
    """
    if images.ndim == 2:
        return images
    vision = clip.vision
    return vision.visual.ln_post(last_cls(vision.blocks, vision.embed(images)))


@torch.no_grad()
def up_to_layer(clip: FrozenClip, images: Tensor, layer: int) -> Tensor:
    """What the frozen image tower makes of pictures below a layer.

    Args:
        clip: the frozen CLIP.
        images: [B, 3, S, S].
        layer: from 1; one behind the last runs the whole tower.

    Returns:
        What enters it, [B, L, width]; behind the last layer :func:`unprojected_features`, [B, V].
    """
    if layer > len(clip.vision.blocks):
        return unprojected_features(clip, images)
    return clip.vision.entering(images, layer)


class FeatureReader:
    """Features of pictures: from the cache where it has them, else computed and kept.

    A picture is known by its content. The first features that were kept of it are what every
    reader gets, to the bit.

    Args:
        clip: the frozen CLIP.
        cache: None computes each time.
        batch: pictures encoded at once.
        workers: processes that load.
    """

    def __init__(
        self,
        clip: FrozenClip,
        cache: FeatureCache | None = None,
        batch: int = 100,
        workers: int = 0,
    ) -> None:
        self.clip, self.batch, self.workers = clip, batch, workers
        # Of a CLIP that was wrapped directly nothing is known that could name its features.
        self.cache = None if clip.identity is None else cache

    def read(self, pictures: Pictures, transform: Transform) -> Tensor:
        """Features before the projection of pictures under a transform, in order.

        Args:
            pictures: N of them.
            transform: to one view or to several, without anything that is drawn.

        Returns:
            [N, V] or [N, crops, V], on the CPU, in the tower's dtype.

        Raises:
            InputError: a picture that can no longer be read.
        """

        def load(rows: np.ndarray) -> Batches:
            some = pictures.select(rows)
            return evaluation_batches(some, transform, self.batch, workers=self.workers)

        return self._read(pictures.content_digests(), _shown(pictures, transform), load)

    def read_views(self, pictures: Pictures, transform: Transform, seed: int, views: int) -> Tensor:
        """The same of a random transform, in several views with draws of their own.

        What is drawn of a picture depends on ``seed``, the view and its content alone. A transform
        that changes from epoch to epoch shows epoch e in view e.

        Returns:
            [N, views, V], on the CPU.
        """
        each = tqdm(range(views), desc="views", leave=False, disable=None)
        every = [self.read_view(pictures, transform, seed, view) for view in each]
        return torch.stack(every, dim=1)

    def read_view(self, pictures: Pictures, transform: Transform, seed: int, view: int) -> Tensor:
        """One of these views, from 0: [N, V], on the CPU."""
        digests, seen = pictures.content_digests(), transform.for_epoch(view)

        def load(rows: np.ndarray) -> Batches:
            some, key = pictures.select(rows), (seed, view)
            return view_batches(some, seen, self.batch, digests[rows], key, self.workers)

        return self._read(digests, f"{_shown(pictures, seen)}, view {view} of seed {seed}", load)

    def _read(
        self, digests: np.ndarray, crops: str, load: Callable[[np.ndarray], Batches]
    ) -> Tensor:
        """Features by digests, uint8 [N, 32]; ``load`` gives the batches of some of N rows."""
        # Of equal pictures the first is encoded for all.
        _, first, group = np.unique(as_keys(digests), return_index=True, return_inverse=True)
        kind = self._kind(crops)
        known, features = self._kept(kind, digests[first])
        missing = np.flatnonzero(~known)
        if not len(missing):
            return features[group]
        bar = tqdm(total=len(missing), desc="encoding pictures", leave=False, disable=None)
        for start in range(0, len(missing), _PICTURES_A_SHARD):
            places = missing[start : start + _PICTURES_A_SHARD]
            encoded = []
            batches = load(first[places])
            device, dtype = next(self.clip.parameters()).device, self.clip.dtype
            for images, _, _ in move_batches(batches, device, dtype):
                encoded.append(self._encode(images.to(dtype)).cpu())
                bar.update(len(images))
            shard = torch.cat(encoded)
            if features is None:
                features = shard.new_empty((len(first), *shard.shape[1:]))
            features[places] = shard
            if self.cache is not None:
                self.cache.write(kind, digests[first[places]], shard)
        bar.close()
        # Another run may have been first to keep some of them.
        known, kept = self._kept(kind, digests[first[missing]])
        if known.any():
            features[missing[known]] = kept[known]
        return features[group]

    def _kept(self, kind: str, digests: np.ndarray) -> tuple[np.ndarray, Tensor | None]:
        if self.cache is None:
            return np.zeros(len(digests), dtype=bool), None
        return self.cache.read(kind, digests)

    def _encode(self, images: Tensor) -> Tensor:
        flat = unprojected_features(self.clip, images.flatten(0, -4))
        return flat.unflatten(0, images.shape[:-3])

    def _kind(self, crops: str) -> str:
        """Everything beside the picture that decides about its features."""
        if self.cache is None:
            return crops
        identity, device = self.clip.identity, next(self.clip.parameters()).device
        return json.dumps(
            {
                "revision": _REVISION,
                "fingerprint": identity.fingerprint,
                "activation": identity.activation,
                "preprocessing": asdict(identity.preprocessing),
                "dtype": str(self.clip.dtype),
                "device": device.type,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "decoder": DECODER.decode(),
                "crops": crops,
            },
            sort_keys=True,
        )


def _shown(pictures: Pictures, transform: Transform) -> str:
    """What a transform shows of pictures, in words that differ where that does."""
    small = "" if pictures.downscale is None else f"scaled down to {pictures.downscale}, "
    return f"{small}{type(transform).__name__}: {transform.views}, {transform.preprocessing}"
