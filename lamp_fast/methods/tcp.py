"""TCP (Yao et al., CVPR 2024): class-aware words from what zero-shot CLIP knows of a class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast import ops
from lamp_fast.clip.prompts import ClassPrompts, TextForest
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.errors import InputError
from lamp_fast.methods.base import TwoTowers
from lamp_fast.methods.settings.tcp import TCP, TcpSettings
from lamp_fast.methods.surroundings import Surroundings
from lamp_fast.methods.text import (
    context_start,
    context_template,
    prepare_prompts,
    put_words,
    run_layers,
    separate,
    zero_shot_texts,
)

# The data sets where TCP's prompts do not follow from the template: what its zero-shot features are
# taken of, and what follows its learned words.
KNOWLEDGE = {
    "dtd": "a photo of a {}, a type of texture.",
    "fgvc_aircraft": "a photo of an aircraft {}.",
}
BEHIND_CONTEXT = {"stanford_cars": "{}, a type of car", "ucf101": "person doing {}."}


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
        settings: m, the first values of v, the layer, published as 9 of 12 and otherwise two
            thirds down, and the weight.
        trimming: what is left out of the text side.

    Raises:
        InputError: another layer than the published one beyond the text tower.
    """

    entry = TCP

    def __init__(self, clip: FrozenClip, settings: TcpSettings, trimming: Trimming) -> None:
        super().__init__(clip, keep_text=trimming.cache_text and not trimming.as_published)
        depth = len(clip.text.blocks)
        self.layer = settings.knowledge_layer
        if self.layer == TcpSettings.knowledge_layer:
            self.layer = 2 * depth // 3 + 1
        elif self.layer > depth:
            raise InputError(
                f"--knowledge-layer {self.layer}: expected at most {depth}, the text tower's depth"
            )
        self.settings, self.trimming = settings, trimming
        self.context = nn.Parameter(context_start(clip, settings.ctx_init, settings.n_ctx))
        joint = clip.vision.visual.proj.shape[1]
        self.narrow = nn.Linear(joint, joint // 4)
        self.widen = nn.Linear(joint // 4, settings.n_ctx * clip.text.width)
        self.match_clip()

    @classmethod
    def build(cls, clip: FrozenClip, settings: TcpSettings, surroundings: Surroundings) -> "Tcp":
        return cls(clip, settings, surroundings.trimming)

    def resolved(self, settings: TcpSettings) -> TcpSettings:
        return replace(settings, knowledge_layer=self.layer)

    def templates(self, template: str, origin: Origin = NOWHERE) -> tuple[str, ...]:
        """Of the knowledge, and of the learned words."""
        rest = BEHIND_CONTEXT.get(origin.data, template[template.index("{}") :])
        learned = context_template(self.settings.ctx_init, self.settings.n_ctx, rest)
        return KNOWLEDGE.get(origin.data, template), learned

    def prepare(self, names: Sequence[str], template: str, origin: Origin = NOWHERE) -> TcpClasses:
        knowledge_template, words = self.templates(template, origin)
        knowledge = zero_shot_texts(self.clip, names, knowledge_template)
        prompts = prepare_prompts(self.clip, names, words, self.trimming)
        most_rows = self.trimming.most_rows
        separated = tuple(separate(forest, most_rows) for forest in prompts.forests)
        return TcpClasses(knowledge, prompts, separated)

    def text_features(self, classes: TcpClasses) -> Tensor:
        clip, last_row = self.clip, self.trimming.last_row
        table = clip.text.text.positional_embedding
        words = self.context + table[1 : self.settings.n_ctx + 1]
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
        return self.widen(hidden).unflatten(-1, (self.settings.n_ctx, -1))

    def regularisation(self, text: Tensor, classes: TcpClasses) -> dict[str, Tensor]:
        cosine = (text * classes.knowledge).sum(-1)
        return {"knowledge_loss": self.settings.knowledge_weight * (1 - cosine.mean())}


def _put_class_words(x: Tensor, forest: TextForest, words: Tensor) -> Tensor:
    """Replace the tokens behind bot by each class's own: words [C, P, Dt]."""
    words = words[forest.classes]
    if forest.visible is None:
        return put_words(x, forest, words)
    position = forest.positions - 1
    ours = (position >= 0) & (position < words.shape[1])
    placed = words.to(x.dtype)[forest.owner, position.clamp(0, words.shape[1] - 1)]
    return torch.where(ours[:, None], placed, x)
