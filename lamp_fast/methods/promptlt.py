"""PromptLT (2025): prompts that both towers share, and one of a few class groups' beside them.

A likely predecessor of LAMP, known from public code that does not run as it is. Here is what of it
is well defined: the prompts and projectors, how deep they stand, and the retrieval that its blocks
hold. Left out, for reasons:

- a second way to choose, in its trainer, at odds with the first: extra prompts for the classes of
  the first 20 and behind the 60th of a hard-coded 100, by label order, mixed half and half with the
  shared ones; in training the picture's own label chooses;
- in testing, text prompts of one half of the class list that are mixed into the other half's by
  position, for shapes that no run of it has;
- the first 50 logits as those of the trained classes;
- a loss with logit adjustment that is imported and not used (here it is a flag of every method).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.prompts import ClassPrompts, TextForest
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.methods.base import Criterion, Step, TwoTowers
from lamp_fast.methods.lamp.prompts import LayerPrompts
from lamp_fast.methods.settings import cut_layers
from lamp_fast.methods.settings.promptlt import PROMPTLT, PromptLtSettings
from lamp_fast.methods.surroundings import Surroundings
from lamp_fast.methods.text import prepare_prompts


def chosen(extra: Tensor, queries: Tensor, mix: bool) -> Tensor:
    """One extra prompt a query: the one of largest dot product, or their mean by its softmax.

    The scores are raw: neither side is normalised. No gradient goes through the choice of one.

    Args:
        extra: projected prompts of one layer [G, width].
        queries: the first token's row as it enters the layer [N, width].
        mix: as in testing; else the one, as in training, the first of equal ones.

    Returns:
        [N, width].
    """
    scores = queries.to(extra.dtype) @ extra.T
    return scores.softmax(-1) @ extra if mix else extra[scores.argmax(-1)]


@dataclass(frozen=True)
class PromptedClasses:
    """A list of classes.

    Attributes:
        prompts: of all of them.
        bots: per text layer, bot's row [1, Dt] as it enters the layer.
    """

    prompts: ClassPrompts
    bots: Sequence[Tensor]


class PromptLt(TwoTowers):
    """In each layer of ``layers`` rows also see [phi(s), one of phi(e_1) .. phi(e_G)].

    s is the same for both towers, e and the perceptron phi are each tower's own. Prompts stand
    right behind the first token, cls or bot, and their outputs are dropped before the next layer.
    The first token, as it enters the layer, chooses among the extra ones, see :func:`chosen`. bot
    sees itself alone, so its choice is the same for every class, and texts depend on no picture.

    Trimmed, prompts are keys and values, text is cut behind eot, and what class prompts share is
    computed once.

    Args:
        clip: the frozen CLIP.
        settings: how many prompts, how wide, and in which layers; the published 3..12 are cut to
            the shallower tower.
        trimming: what is left out.

    Raises:
        InputError: other layers than the published ones beyond the shallower tower, or none left.
    """

    entry = PROMPTLT

    def __init__(self, clip: FrozenClip, settings: PromptLtSettings, trimming: Trimming) -> None:
        super().__init__(clip, keep_text=trimming.cache_text and not trimming.as_published)
        self.layers = cut_layers("layers", settings, clip.depth)
        self.settings, self.trimming = settings, trimming
        widths = clip.vision.width, clip.text.width
        self.prompts = nn.ModuleDict(
            {str(layer): LayerPrompts(settings.in_lamps_words(), *widths) for layer in self.layers}
        )
        first, *others = self.prompts.values()
        for each in others:
            each.phi_v.load_state_dict(first.phi_v.state_dict())
            each.phi_t.load_state_dict(first.phi_t.state_dict())
        self.match_clip()

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: PromptLtSettings, surroundings: Surroundings
    ) -> "PromptLt":
        return cls(clip, settings, surroundings.trimming)

    def resolved(self, settings: PromptLtSettings) -> PromptLtSettings:
        return replace(settings, layers=self.layers)

    @property
    def first_changed_layer(self) -> int:
        return self.layers[0]

    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> PromptedClasses:
        clip, first = self.clip, self.layers[0]
        prompts = prepare_prompts(clip, names, template, self.trimming, first, bot_row=False)
        return PromptedClasses(prompts, self.clip.text.bot_rows(prompts.tokens.ids[0, 0]))

    def step(
        self, images: Tensor, labels: Tensor, classes: PromptedClasses, criterion: Criterion
    ) -> Step:
        """Each picture, and bot, with the one extra prompt that it chooses."""
        text = self._text_features(classes, mix=False)
        logits = self._scores(self._image_features(images, mix=False), text)
        return Step(criterion(logits, labels), logits)

    def text_features(self, classes: PromptedClasses) -> Tensor:
        """For prediction, where the extra prompts are mixed."""
        return self._text_features(classes, mix=True)

    def image_features(self, images: Tensor) -> Tensor:
        """For prediction, where the extra prompts are mixed."""
        return self._image_features(images, mix=True)

    def _image_features(self, images: Tensor, mix: bool) -> Tensor:
        vision, first = self.clip.vision, self.first_changed_layer
        x = vision.entering(images, first)
        cls = torch.zeros(1, dtype=torch.int64, device=x.device)
        trimmed = not self.trimming.as_published
        for number, block in enumerate(vision.blocks[first - 1 :], first):
            prefix, count = None, 0
            if number in self.layers:
                rows = self.prompts[str(number)].visual_rows()
                inserted = self._inserted(rows, x[:, 0], mix).to(x.dtype)  # [B, S + 1, Dv]
                if trimmed:
                    prefix = block.prefix(inserted)
                else:
                    x, count = _insert(x, inserted), inserted.shape[1]
            only_cls = trimmed and self.trimming.last_row and number == len(vision.blocks)
            x = _drop(block(x, prefix, rows=cls if only_cls else None), count)
        return F.normalize(vision.readout(x[:, 0]), dim=-1)

    def _text_features(self, classes: PromptedClasses, mix: bool) -> Tensor:
        inserted = {
            number: self._inserted(
                self.prompts[str(number)].text_rows(), classes.bots[number - 1], mix
            )[0].to(classes.bots[0].dtype)
            for number in self.layers
        }  # [S + 1, Dt] each
        encode = self._whole if self.trimming.as_published else self._forest
        prompts = classes.prompts
        rows = torch.cat([encode(prompts, forest, inserted) for forest in prompts.forests])
        return F.normalize(self.clip.text.readout(rows[prompts.order]), dim=-1)

    def _inserted(self, rows: Tensor, queries: Tensor, mix: bool) -> Tensor:
        """Prompts [N, S + 1, width] of queries [N, width]; ``rows`` are the extra ones, then the
        shared ones, projected."""
        extra, shared = rows.split([self.settings.groups, self.settings.shared])
        own = chosen(extra, queries, mix)[:, None]
        return torch.cat([shared.expand(len(queries), -1, -1), own], dim=1)

    def _forest(
        self, prompts: ClassPrompts, forest: TextForest, inserted: Mapping[int, Tensor]
    ) -> Tensor:
        """Last rows [c, Dt] of a forest's classes; bot and prompts are keys and values."""
        blocks, x, update = self.clip.text.blocks, forest.states, None
        for number, block in enumerate(blocks[prompts.first_layer - 1 :], prompts.first_layer):
            prefix = prompts.bot[number - 1]
            if number in inserted:
                own = block.prefix(inserted[number])
                prefix = tuple(torch.cat(pair) for pair in zip(prefix, own, strict=True))
            count = len(prefix[0])
            how = {"mask": F.pad(forest.visible, (count, 0), value=True)}
            if number == len(blocks) and self.trimming.last_row:
                how = {"mask": how["mask"][forest.eot], "rows": forest.eot}
            x, normed = block.enter(x, update)
            x, update = block.advance(x, normed, tuple(each[None] for each in prefix), **how)
        x = x + update
        return x[0] if self.trimming.last_row else x[0, forest.eot]

    def _whole(
        self, prompts: ClassPrompts, forest: TextForest, inserted: Mapping[int, Tensor]
    ) -> Tensor:
        """The same of sequences whose prompts are rows."""
        x = forest.states
        for number, block in enumerate(self.clip.text.blocks, 1):
            own = inserted.get(number, x[0, :0])
            rows = _insert(x, own.expand(len(x), -1, -1))
            x = _drop(block(rows, causal=True), len(own))
        return x[forest.sequences, forest.eot]


def _insert(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [N, P, width] behind the first of x [N, L, width]."""
    return torch.cat([x[:, :1], rows, x[:, 1:]], dim=1)


def _drop(x: Tensor, count: int) -> Tensor:
    """The same without ``count`` rows behind the first."""
    return torch.cat([x[:, :1], x[:, 1 + count :]], dim=1) if count else x
