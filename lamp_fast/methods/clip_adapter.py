"""CLIP-Adapter (Gao et al., IJCV 2024): a bottleneck beside the image feature."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.data.feature_batches import FeatureBatches
from lamp_fast.methods.base import Criterion, Method, Step
from lamp_fast.methods.settings.clip_adapter import CLIP_ADAPTER, ClipAdapterSettings
from lamp_fast.methods.text import zero_shot_texts
from lamp_fast.methods.training_set import TrainingSet

# The bottleneck is this many times narrower than the feature.
REDUCTION = 4


class ClipAdapter(Method):
    """Logits s cos(f', t_c), f' = r relu(W_2 relu(W_1 f)) + (1 - r) f, on the projected feature f
    before it is normalised; W_1 [Ds / 4, Ds], W_2 [Ds, Ds / 4], without biases.

    Texts are CLIP's own, so names that were not trained are scored alike. ``classes`` is the
    normalised text features [C, Ds].

    Args:
        clip: the frozen CLIP.
        config: r and the views.
    """

    entry = CLIP_ADAPTER
    reads_features = True

    def __init__(self, clip: FrozenClip, config: ClipAdapterSettings) -> None:
        super().__init__(clip)
        self.config = config
        width = clip.vision.visual.proj.shape[1]
        self.narrow = nn.Linear(width, max(1, width // REDUCTION), bias=False)
        self.widen = nn.Linear(max(1, width // REDUCTION), width, bias=False)
        self.match_clip()

    @torch.no_grad()
    def read_training_set(self, training: TrainingSet) -> FeatureBatches:
        """Train on features of crops."""
        views = training.views(self.config.adapter_views)
        return training.batches(self.clip.vision.project(views), views="in turn")

    @torch.no_grad()
    def prepare(self, names: Sequence[str], template: str, origin: Origin = NOWHERE) -> Tensor:
        return zero_shot_texts(self.clip, names, template, origin.words)

    def step(self, images: Tensor, labels: Tensor, classes: Tensor, criterion: Criterion) -> Step:
        """``images`` are projected features [B, Ds]."""
        logits = self._scores(images.to(self.narrow.weight.dtype), classes)
        return Step(criterion(logits, labels), logits)

    @torch.no_grad()
    def feature_logits(self, features: Tensor, classes: Tensor, adapted: bool = False) -> Tensor:
        return self._scores(self.clip.vision.project(features), classes)

    def _scores(self, features: Tensor, texts: Tensor) -> Tensor:
        added = F.relu(self.widen(F.relu(self.narrow(features))))
        features = torch.lerp(features, added, self.config.adapter_ratio)
        return self.clip.logit_scale * F.normalize(features, dim=-1) @ texts.T
