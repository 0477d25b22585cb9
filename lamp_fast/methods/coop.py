"""CoOp (Zhou et al., IJCV 2022): context words learned in place of a template's.

One context is shared by all classes and stands before the name, as in the published tables of
base-to-new and transfer (4 words, from "a photo of a") and few-shot learning (16, drawn).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip import ClassPrompts, FrozenClip, Trimming
from lamp_fast.data import NOWHERE, Origin
from lamp_fast.fields import Bounds, TextOrNone
from lamp_fast.methods.base import TwoTowers
from lamp_fast.methods.settings import MethodSettings, Preset, Surroundings, sgd
from lamp_fast.methods.text import (
    context_start,
    context_template,
    encode,
    prepare_prompts,
    put_words,
)


@dataclass(frozen=True)
class ContextSettings(MethodSettings):
    """Learned context words."""

    n_ctx: Annotated[int, Bounds(1, 1000)] = 4
    """How many tokens of the class prompt are learned, right behind bot."""
    ctx_init: TextOrNone = "a photo of a"
    """Words that the class prompt begins with and whose embeddings start the learned tokens; none
    draws them from N(0, 0.02^2)."""


_IMAGENET = {"imagenet": {"epochs": 50}}


class CoOp(TwoTowers):
    """Every class prompt is [bot, v_1 .. v_m, name, "."], v learned; the image tower is CLIP's.

    Args:
        clip: the frozen CLIP.
        config: m and the first values of v.
        trimming: what is left out of the text side.
    """

    title = "CoOp"
    Settings = ContextSettings
    own_prompt = True
    presets: ClassVar = {
        "coop": Preset(sgd(2e-3, 200, 32), by_data=_IMAGENET),
        "coop-all": Preset(
            sgd(2e-3, 200, 32),
            {"n_ctx": 16, "ctx_init": None},
            by_data=_IMAGENET,
            by_shots={1: {"epochs": 50}, 2: {"epochs": 100}, 4: {"epochs": 100}},
        ),
        "coop-source": Preset(sgd(2e-3, 50, 32)),
    }

    def __init__(self, clip: FrozenClip, config: ContextSettings, trimming: Trimming) -> None:
        super().__init__(clip, keep_text=trimming.cache_text and not trimming.as_published)
        self.config, self.trimming = config, trimming
        self.context = nn.Parameter(context_start(clip, config.ctx_init, config.n_ctx))
        self.match_clip()

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: ContextSettings, surroundings: Surroundings
    ) -> "CoOp":
        return cls(clip, settings, surroundings.trimming)

    def templates(self, template: str, origin: Origin = NOWHERE) -> tuple[str, ...]:
        return (context_template(self.config.ctx_init, self.config.n_ctx),)

    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> ClassPrompts:
        """The prompt is CoOp's own on every data set; ``template`` has no part in it."""
        return prepare_prompts(self.clip, names, *self.templates(template), self.trimming)

    def text_features(self, classes: ClassPrompts) -> Tensor:
        table = self.clip.text.text.positional_embedding
        words = self.context + table[1 : self.config.n_ctx + 1]
        changes = {1: partial(put_words, words=words)}
        text = encode(self.clip, classes, changes, last_row=self.trimming.last_row)
        return F.normalize(text[0], dim=-1)
