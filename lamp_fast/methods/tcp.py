"""TCP (Yao et al., CVPR 2024): class-aware words from what zero-shot CLIP knows of a class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast import ops
from lamp_fast.clip import ClassPrompts, FrozenClip, TextForest
from lamp_fast.errors import InputError
from lamp_fast.methods.base import RunClasses, TwoTowers, plain_text_features
from lamp_fast.methods.text import (
    context_start,
    context_template,
    prepare_prompts,
    put_words,
    run_layers,
    separate,
)
from lamp_fast.runs.config import ContextConfig, TcpConfig, TrainConfig, Trimming

# Where TCP's prompts are not those of other methods for the data set with a template: what its
# zero-shot features are taken of, and what follows its learned words.
KNOWLEDGE = {
    "{} texture.": "a photo of a {}, a type of texture.",
    "a photo of a {}, a type of aircraft.": "a photo of an aircraft {}.",
    "a photo of {}, a type of food.": "a photo of a {}, a type of food.",
}
BEHIND_CONTEXT = {"a photo of a person doing {}.": "person doing {}."}


@dataclass(frozen=True)
class TcpClasses:
    """Class prompts with what zero-shot CLIP knows of each class.

    Attributes:
        knowledge: zero-shot text features [C, Ds], normalised.
        prompts: for the layers below the class-aware words.
        separated: of each forest, for the layers above; see :func:`separate`.
    """

    knowledge: Tensor
    prompts: ClassPrompts
    separated: tuple[Sequence[tuple[TextForest, Tensor]], ...]


class Tcp(TwoTowers):
    """Words v [m, Dt] at the input; before one layer the embedded knowledge of a class takes their
    place.

    T(w0_c) = Linear(QuickGELU(Linear(w0_c))) [m, Dt] with w0_c the zero-shot feature, through a
    quarter of its width. The image tower is CLIP's. The loss is cross-entropy + weight *
    (1 - mean_c cos(w_c, w0_c)). Prompts are the data set's template with v in place of its words
    before the name.

    Args:
        clip: the frozen CLIP.
        context: m and the first values of v.
        config: the layer, published as 9 of 12 and otherwise two thirds down, and the weight.
        trimming: what is left out of the text side.

    Raises:
        InputError: another layer than the published one beyond the text tower.
    """

    title = "TCP"

    def __init__(
        self, clip: FrozenClip, context: ContextConfig, config: TcpConfig, trimming: Trimming
    ) -> None:
        super().__init__(clip, keep_text=trimming.cache_text and not trimming.as_published)
        depth = len(clip.text.blocks)
        self.layer = config.knowledge_layer
        if self.layer == TcpConfig().knowledge_layer:
            self.layer = 2 * depth // 3 + 1
        elif self.layer > depth:
            raise InputError(
                f"--knowledge-layer {self.layer}: expected at most {depth}, the text tower's depth"
            )
        self.config, self.n_ctx, self.trimming = config, context.n_ctx, trimming
        self.ctx_init = context.ctx_init
        self.context = nn.Parameter(context_start(clip, context.ctx_init, context.n_ctx))
        joint = clip.vision.visual.proj.shape[1]
        self.narrow = nn.Linear(joint, joint // 4)
        self.widen = nn.Linear(joint // 4, context.n_ctx * clip.text.width)
        self.match_clip()

    @classmethod
    def build(cls, clip: FrozenClip, config: TrainConfig, classes: RunClasses) -> "Tcp":
        return cls(clip, config.context, config.tcp, config.trim)

    def decided(self, config: TrainConfig, names: Sequence[str], template: str) -> TrainConfig:
        return replace(config, tcp=replace(config.tcp, knowledge_layer=self.layer))

    def prepare(self, names: Sequence[str], template: str) -> TcpClasses:
        knowledge = plain_text_features(self.clip, names, KNOWLEDGE.get(template, template))
        rest = BEHIND_CONTEXT.get(template, template[template.index("{}") :])
        words = context_template(self.ctx_init, self.n_ctx, rest)
        prompts = prepare_prompts(self.clip, names, words, self.trimming)
        most_rows = self.trimming.most_rows
        separated = tuple(separate(forest, most_rows) for forest in prompts.forests)
        return TcpClasses(F.normalize(knowledge, dim=-1), prompts, separated)

    def text_features(self, classes: TcpClasses) -> Tensor:
        clip, last_row = self.clip, self.trimming.last_row
        table = clip.text.text.positional_embedding
        words = self.context + table[1 : self.n_ctx + 1]
        class_words = self.class_words(classes.knowledge)
        learned = {1: partial(put_words, words=words)}
        class_aware = {self.layer: partial(_put_class_words, words=class_words)}
        features = []
        for forest, separated in zip(classes.prompts.forests, classes.separated, strict=True):
            x = forest.states
            if self.layer > 1:
                x = run_layers(clip, forest, x, 1, learned, last=self.layer - 1)
            for own, rows in separated:
                end = run_layers(clip, own, x[:, rows], self.layer, class_aware, last_row=last_row)
                features.append(clip.text.readout(end)[0])
        return F.normalize(torch.cat(features)[classes.prompts.order], dim=-1)

    def class_words(self, knowledge: Tensor) -> Tensor:
        """[C, m, Dt] of zero-shot features [C, Ds]."""
        hidden = ops.quick_gelu(self.narrow(knowledge))
        return self.widen(hidden).unflatten(-1, (self.n_ctx, -1))

    def regularisation(self, text: Tensor, classes: TcpClasses) -> dict[str, Tensor]:
        cosine = (text * classes.knowledge).sum(-1)
        return {"knowledge_loss": self.config.knowledge_weight * (1 - cosine.mean())}


def _put_class_words(x: Tensor, forest: TextForest, words: Tensor) -> Tensor:
    """Replace the tokens behind bot by each class's own: words [C, P, Dt]."""
    words = words[forest.classes]
    if forest.visible is None:
        return put_words(x, forest, words)
    position = forest.positions - 1
    ours = (position >= 0) & (position < words.shape[1])
    placed = words.to(x.dtype)[forest.owner, position.clamp(0, words.shape[1] - 1)]
    return torch.where(ours[:, None], placed, x)
