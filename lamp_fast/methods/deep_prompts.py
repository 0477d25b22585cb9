"""Prompts of their own in the first layers of both towers: what MaPLe and PromptSRC share."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.prompts import ClassPrompts
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.errors import InputError
from lamp_fast.methods.base import TwoTowers
from lamp_fast.methods.settings.deep_prompts import DeepPromptSettings
from lamp_fast.methods.text import (
    context_start,
    context_template,
    encode,
    prepare_prompts,
    put_words,
)


class DeepPrompts(TwoTowers):
    """Layer i of the first ``depth`` has text words P_i [m, Dt] and visual prompts V_i [m, Dv].

    Text: P_1 (from "a photo ...") stands for the first words of "a photo of a {}."; in layers
    2..depth P_i replaces what became of them. Images: V_1 comes behind the patches, after the
    position embedding and before the first LayerNorm; V_i replaces it in layers 2..depth. Deeper
    layers carry both on. Subclasses say what V_i is (:meth:`image_prompts_of`).

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

    def __init__(self, clip: FrozenClip, settings: DeepPromptSettings, trimming: Trimming) -> None:
        super().__init__(clip, keep_text=trimming.cache_text and not trimming.as_published)
        published = settings.depth == type(settings).depth
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

    def image_prompts_of(self, layer: int) -> Tensor:
        """V_i [m, Dv] of a layer, from 1."""
        raise NotImplementedError

    def resolved(self, settings: DeepPromptSettings) -> DeepPromptSettings:
        return replace(settings, depth=self.depth)

    def templates(self, template: str, origin: Origin = NOWHERE) -> tuple[str, ...]:
        return (context_template(self.settings.ctx_init, self.settings.n_ctx),)

    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> ClassPrompts:
        """The prompt is the method's own on every data set; ``template`` has no part in it."""
        own = context_template(self.settings.ctx_init, self.settings.n_ctx)
        return prepare_prompts(self.clip, names, own, self.trimming)

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
                prompts = self._entering(number).to(x.dtype)
                if trimmed and (number < self.depth or last):
                    prefix = tuple(each[None] for each in block.prefix(prompts))
                else:
                    rows = prompts.expand(len(x), -1, -1)
                    x = torch.cat([x[:, :length], rows], dim=1)
            only_cls = last and trimmed and self.trimming.last_row
            x = block(x, prefix, rows=cls if only_cls else None)
        return F.normalize(vision.readout(x[:, 0]), dim=-1)

    def _entering(self, layer: int) -> Tensor:
        """What enters a layer, from 1, beside the image: [m, Dv]."""
        prompts = self.image_prompts_of(layer)
        if layer > 1:
            return prompts
        norm = self.clip.vision.visual.ln_pre
        return norm(prompts.to(norm.weight.dtype))
