"""CoOp (Zhou et al., IJCV 2022): context words learned in place of a template's.

One context is shared by all classes and stands before the name, as in the published tables of
base-to-new and transfer (4 words, from "a photo of a") and few-shot learning (16, drawn).
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.prompts import ClassPrompts
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.methods.base import TwoTowers
from lamp_fast.methods.settings.coop import COOP, ContextSettings
from lamp_fast.methods.surroundings import Surroundings
from lamp_fast.methods.text import (
    context_start,
    context_template,
    encode,
    prepare_prompts,
    put_words,
)


class CoOp(TwoTowers):
    """Every class prompt is [bot, v_1 .. v_m, name, "."], v learned; the image tower is CLIP's.

    Args:
        clip: the frozen CLIP.
        config: m and the first values of v.
        trimming: what is left out of the text side.
    """

    entry = COOP

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
