"""CLIP as it comes: cosine between a picture and each class prompt (Eq. 3)."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.methods.base import Method, frozen_image_features
from lamp_fast.methods.fixed import Sides
from lamp_fast.methods.settings import MethodSettings
from lamp_fast.methods.settings.zeroshot import ZEROSHOT
from lamp_fast.methods.surroundings import Surroundings
from lamp_fast.methods.text import zero_shot_texts


class ZeroShot(Method):
    """No parameters; ``classes`` is the normalised text features [C, Ds]."""

    entry = ZEROSHOT
    reads_features = True
    no_class_matrix = None

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: MethodSettings, surroundings: Surroundings
    ) -> "ZeroShot":
        return cls(clip)

    def prepare(self, names: Sequence[str], template: str, origin: Origin = NOWHERE) -> Tensor:
        return zero_shot_texts(self.clip, names, template, origin.words)

    def implied_prior(self, counts: np.ndarray) -> np.ndarray:
        return np.ones(len(counts))

    @torch.no_grad()
    def feature_logits(self, features: Tensor, classes: Tensor, adapted: bool = False) -> Tensor:
        return self.clip.logit_scale * self.clip.vision.joint(features) @ classes.T

    def fixed_sides(self, clip: FrozenClip, classes: Tensor, adapted: bool = False) -> Sides:
        return Sides(partial(frozen_image_features, clip), classes)
