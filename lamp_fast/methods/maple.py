"""MaPLe (Khattak et al., CVPR 2023): deep prompts in both towers, the visual ones projected."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip import ClassPrompts, FrozenClip, Trimming
from lamp_fast.data import NOWHERE, Origin
from lamp_fast.errors import InputError
from lamp_fast.fields import MAX_LAYER, Bounds
from lamp_fast.methods.base import TwoTowers
from lamp_fast.methods.coop import ContextSettings
from lamp_fast.methods.settings import Preset, Surroundings, sgd
from lamp_fast.methods.text import (
    context_start,
    context_template,
    encode,
    prepare_prompts,
    put_words,
)


@dataclass(frozen=True)
class MapleSettings(ContextSettings):
    """MaPLe."""

    depth: Annotated[int, Bounds(1, MAX_LAYER)] = 9
    """Layers with prompts of their own, from the first; cut to the shallower tower."""


class MaPLe(TwoTowers):
    """Layer i of the first ``depth`` has text words P_i [m, Dt] and visual ones F_i(P_i).

    Text: P_1 (from "a photo") stands for the first words of "a photo of a {}."; in layers 2..depth
    P_i replaces what became of them. Images: F_1(P_1) comes behind the patches, after the position
    embedding and before the first LayerNorm; F_i(P_i) replaces it in layers 2..depth. Deeper layers
    carry both on. F_2.. start alike.

    Trimmed, visual prompts are rows from layer ``depth`` on; before it their outputs are replaced,
    so they are keys and values alone, the same for every image.

    Args:
        clip: the frozen CLIP.
        settings: m, the first values of P_1, and ``depth``; the published 9 is cut to the
            shallower tower.
        trimming: what is left out.

    Raises:
        InputError: another depth than the published one beyond the shallower tower.
    """

    title = "MaPLe"
    Settings = MapleSettings
    own_prompt = True
    presets: ClassVar = {
        "maple": Preset(sgd(3.5e-3, 5, 4), {"n_ctx": 2}),
        "maple-source": Preset(sgd(2.6e-3, 2, 4), {"n_ctx": 2, "depth": 3}),
    }

    def __init__(self, clip: FrozenClip, settings: MapleSettings, trimming: Trimming) -> None:
        super().__init__(clip, keep_text=trimming.cache_text and not trimming.as_published)
        published = settings.depth == MapleSettings.depth
        if settings.depth > clip.depth and not published:
            raise InputError(
                f"--depth {settings.depth}: expected at most {clip.depth}, the depth of the"
                " shallower tower"
            )
        self.depth = min(settings.depth, clip.depth)
        self.settings, self.trimming = settings, trimming
        drawn = (context_start(clip, None, settings.n_ctx) for _ in range(1, self.depth))
        first = context_start(clip, settings.ctx_init, settings.n_ctx)
        self.words = nn.ParameterList([first, *drawn])
        widths = clip.text.width, clip.vision.width
        self.projections = nn.ModuleList(nn.Linear(*widths) for _ in range(self.depth))
        for each in self.projections[2:]:
            each.load_state_dict(self.projections[1].state_dict())
        self.match_clip()

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: MapleSettings, surroundings: Surroundings
    ) -> "MaPLe":
        return cls(clip, settings, surroundings.trimming)

    def resolved(self, settings: MapleSettings) -> MapleSettings:
        return replace(settings, depth=self.depth)

    def templates(self, template: str, origin: Origin = NOWHERE) -> tuple[str, ...]:
        return (context_template(self.settings.ctx_init, self.settings.n_ctx),)

    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> ClassPrompts:
        """The prompt is MaPLe's own on every data set; ``template`` has no part in it."""
        return prepare_prompts(self.clip, names, *self.templates(template), self.trimming)

    def text_features(self, classes: ClassPrompts) -> Tensor:
        table = self.clip.text.text.positional_embedding
        words = [self.words[0] + table[1 : self.settings.n_ctx + 1], *self.words[1:]]
        changes = {number: partial(put_words, words=each) for number, each in enumerate(words, 1)}
        text = encode(self.clip, classes, changes, last_row=self.trimming.last_row)
        return F.normalize(text[0], dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        vision = self.clip.vision
        x = vision.embed(images)
        length, trimmed = x.shape[1], not self.trimming.as_published
        cls = torch.zeros(1, dtype=torch.int64, device=x.device)
        for number, block in enumerate(vision.blocks, 1):
            last = number == len(vision.blocks)
            prefix = None
            if number <= self.depth:
                prompts = self.visual_prompts(number).to(x.dtype)
                if trimmed and (number < self.depth or last):
                    prefix = tuple(each[None] for each in block.prefix(prompts))
                else:
                    rows = prompts.expand(len(x), -1, -1)
                    x = torch.cat([x[:, :length], rows], dim=1)
            only_cls = last and trimmed and self.trimming.last_row
            x = block(x, prefix, rows=cls if only_cls else None)
        return F.normalize(vision.readout(x[:, 0]), dim=-1)

    def visual_prompts(self, layer: int) -> Tensor:
        """What enters a layer, from 1, beside the image: [m, Dv]."""
        projected = self.projections[layer - 1](self.words[layer - 1])
        if layer > 1:
            return projected
        norm = self.clip.vision.visual.ln_pre
        return norm(projected.to(norm.weight.dtype))
