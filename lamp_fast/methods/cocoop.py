"""CoCoOp (Zhou et al., CVPR 2022): CoOp whose context words every image shifts."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.prompts import ClassPrompts
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.methods.base import Criterion, Method, Step, frozen_image_features
from lamp_fast.methods.fixed import cast_floating, fixed_copy
from lamp_fast.methods.settings.cocoop import COCOOP
from lamp_fast.methods.settings.coop import ContextSettings
from lamp_fast.methods.surroundings import Surroundings
from lamp_fast.methods.text import (
    context_start,
    context_template,
    encode,
    prepare_prompts,
    put_words,
)

# Memory of a pass: text rows grow with images times classes.
PAIRS_AT_ONCE = 2048


class CoCoOp(Method):
    """The words of image b are v_i + pi(f_b), f_b its normalised feature, pi a bottleneck of two
    layers; every (image, class) pair has a text feature of its own.

    The public code loops over images. Here the images of a batch go through the text tower
    together, each with one row a word, whatever the number of classes.

    Args:
        clip: the frozen CLIP.
        config: m and the first values of v.
        trimming: what is left out of the text side; ``block`` bounds the pairs encoded at once.
    """

    entry = COCOOP
    independent_names = True
    text_per_picture = True
    no_class_matrix = "every picture has its own text"

    def __init__(self, clip: FrozenClip, config: ContextSettings, trimming: Trimming) -> None:
        super().__init__(clip)
        self.config, self.trimming, self.block = config, trimming, trimming.block
        self.context = nn.Parameter(context_start(clip, config.ctx_init, config.n_ctx))
        joint = clip.vision.visual.proj.shape[1]
        hidden = max(1, joint // 16)
        self.meta_net = nn.Sequential(
            nn.Linear(joint, hidden), nn.ReLU(), nn.Linear(hidden, clip.text.width)
        )
        self.match_clip()

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: ContextSettings, surroundings: Surroundings
    ) -> "CoCoOp":
        return cls(clip, settings, surroundings.trimming)

    @property
    def first_changed_layer(self) -> int:
        return len(self.clip.vision.blocks) + 1

    def templates(self, template: str, origin: Origin = NOWHERE) -> tuple[str, ...]:
        return (context_template(self.config.ctx_init, self.config.n_ctx),)

    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> ClassPrompts:
        """The prompt is CoOp's own on every data set; ``template`` has no part in it."""
        return prepare_prompts(self.clip, names, *self.templates(template), self.trimming)

    def step(
        self, images: Tensor, labels: Tensor, classes: ClassPrompts, criterion: Criterion
    ) -> Step:
        logits = self(images, classes)
        return Step(criterion(logits, labels), logits)

    @torch.no_grad()
    def logits(self, images: Tensor, classes: ClassPrompts, adapted: bool = False) -> Tensor:
        return self(images, classes)

    def fixed_logits(
        self, clip: FrozenClip, classes: ClassPrompts, adapted: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """In one piece: the number of pieces depends on B."""
        fixed, classes = fixed_copy(self, clip), cast_floating(classes, clip.dtype)

        def logits(images: Tensor) -> Tensor:
            features = frozen_image_features(clip, images)
            return clip.logit_scale * fixed._cosine(features, classes)

        return logits

    def forward(self, images: Tensor, classes: ClassPrompts) -> Tensor:
        """Class scores [B, C]."""
        features = frozen_image_features(self.clip, images)
        at_once = max(1, (self.block or PAIRS_AT_ONCE) // len(classes))
        if self.trimming.as_published:
            at_once = 1
        parts = [self._cosine(some, classes) for some in features.split(at_once)]
        return self.clip.logit_scale * torch.cat(parts)

    def _cosine(self, features: Tensor, classes: ClassPrompts) -> Tensor:
        """[b, C] of normalised image features [b, Ds] and their own text features."""
        shift = self.meta_net(features)  # [b, Dt]
        table = self.clip.text.text.positional_embedding
        words = self.context + shift[:, None] + table[1 : self.config.n_ctx + 1]
        changes = {1: partial(put_words, words=words)}
        text = encode(self.clip, classes, changes, last_row=self.trimming.last_row)  # [b, C, Ds]
        return torch.einsum("bd,bcd->bc", features, F.normalize(text, dim=-1))
