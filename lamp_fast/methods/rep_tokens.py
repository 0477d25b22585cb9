"""Tokens that both towers' upper layers share, and what they add to CLIP: MMRL's and MMRL++'s.

The tokens of layer i are images, in the tower's width, of the same few learned vectors R.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.prompts import ClassPrompts, TextForest
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import Block, FrozenClip, at_least_float32, last_cls
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.errors import InputError
from lamp_fast.fields import format_layers
from lamp_fast.methods.base import Criterion, Step, TwoTowers, frozen_image_features
from lamp_fast.methods.settings.rep_tokens import RepTokenSettings
from lamp_fast.methods.surroundings import RunClasses, Surroundings
from lamp_fast.methods.text import prepare_prompts, zero_shot_texts


@dataclass(frozen=True, eq=False)
class RepTokenClasses:
    """Class prompts, and how their classes are scored.

    Attributes:
        prompts: of the data set's template.
        share: [C], of the class token in the score: alpha of trained classes, 1 of others.
        plain: gives zero-shot text features [C, Ds], normalised, computed when training first asks.
    """

    prompts: ClassPrompts
    share: Tensor
    plain: Callable[[], Tensor]


class RepTokens(TwoTowers):
    """Tokens F_i(R), R [P, width], stand behind bot and cls in the layers i of both towers.

    With f CLIP's projection of the last cls, f_r Q of the mean over the last tokens (both behind
    the last LayerNorm), s CLIP's scale and w the text feature, logits are z = s <f, w> and
    z_r = s <f_r, w>. Loss: alpha CE(z) + (1 - alpha) CE(z_r) + weight (2 - mean cos(f, f0) - mean
    cos(w, w0)), f0 and w0 zero-shot CLIP's. A trained class scores alpha z + (1 - alpha) z_r; other
    classes, and every class of another data set, z. Subclasses say what F_i and Q are.

    Trimmed: f0 shares the layers below the first tokens. Where the next layer replaces what a layer
    makes of its tokens, they are keys and values alone, the same for every picture. Text tokens see
    only bot and each other, so that what becomes of them is the same for every class, and computed
    once.

    Args:
        clip: the frozen CLIP.
        config: tokens, layers and weights.
        classes: of the run.
        trimming: what is left out.

    Raises:
        InputError: other layers than the published ones beyond the shallower tower.
    """

    mixes = False
    """Whether tokens keep a part of what the layer before made of them."""

    def __init__(
        self, clip: FrozenClip, config: RepTokenSettings, classes: RunClasses, trimming: Trimming
    ) -> None:
        super().__init__(clip, keep_text=trimming.cache_text)
        self.layers = config.rep_layers
        if config.rep_layers == RepTokenSettings.rep_layers:
            self.layers = tuple(range(max(1, clip.depth // 2), clip.depth + 1))
        elif config.rep_layers[-1] > clip.depth:
            raise InputError(
                f"--rep-layers {format_layers(config.rep_layers)}: expected layers within"
                f" 1..{clip.depth}, the depth of the shallower tower"
            )
        self.config, self.trained, self.trimming = config, classes, trimming
        self.tokens = nn.Parameter(0.02 * torch.randn(config.rep_tokens, config.rep_width))
        self.textual = self.aligners(clip.text.width)
        self.visual = self.aligners(clip.vision.width)
        self.start_head()
        self.match_clip()

    @classmethod
    def build(cls, clip: FrozenClip, settings: Any, surroundings: Surroundings) -> "RepTokens":
        return cls(clip, settings, surroundings.classes, surroundings.trimming)

    def resolved(self, settings: RepTokenSettings) -> RepTokenSettings:
        return replace(settings, rep_layers=self.layers)

    @property
    def first_changed_layer(self) -> int:
        return self.layers[0]

    def aligners(self, wide: int) -> nn.Module:
        """F_i into a tower of that width: [P, width] to a list of each layer's [P, wide]."""
        raise NotImplementedError

    def start_head(self) -> None:
        """Make the parameters of Q."""
        raise NotImplementedError

    def project(self, rows: Tensor) -> Tensor:
        """Q, of the tokens' mean [B, Dv] to [B, Ds]."""
        raise NotImplementedError

    def mix(self, own: Tensor, before: Tensor) -> Tensor:
        """What enters a layer: of its own tokens [1, P, wide] and what the layer before made of
        its, [N, P, wide]."""
        return own

    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> RepTokenClasses:
        clip, first = self.clip, self.layers[0]
        prompts = prepare_prompts(clip, names, template, self.trimming, first, bot_row=False)
        fused = [column is not None and not origin.target for column in self.trained.columns(names)]
        alpha = self.tokens.new_tensor([self.config.rep_alpha if each else 1.0 for each in fused])
        plain = functools.partial(zero_shot_texts, clip, tuple(names), template)
        return RepTokenClasses(prompts, alpha, functools.cache(plain))

    def step(
        self, images: Tensor, labels: Tensor, classes: RepTokenClasses, criterion: Criterion
    ) -> Step:
        text = self.encode_text(classes.prompts)
        below = self.clip.vision.entering(images, self.first_changed_layer)
        whole, tokens = self._features(below).chunk(2, dim=-1)
        plain = self._plain_features(images, below)
        logits, token_logits = self._scores(whole, text), self._scores(tokens, text)
        alpha, weight = self.config.rep_alpha, self.config.reg_weight
        terms = {
            "cross_entropy": alpha * criterion(logits, labels),
            "token_cross_entropy": (1 - alpha) * criterion(token_logits, labels),
            "image_distance": weight * (1 - (whole * plain).sum(-1).mean()),
            "text_distance": weight * (1 - (text * classes.plain()).sum(-1).mean()),
        }
        fused = alpha * logits + (1 - alpha) * token_logits
        detached = {name: each.detach() for name, each in terms.items()}
        return Step(sum(terms.values()), fused, detached)

    def text_features(self, classes: RepTokenClasses) -> Tensor:
        """[C, 2 Ds]: w times the class token's share, then w times the tokens'; the product with
        :meth:`image_features` is the score."""
        text = self.encode_text(classes.prompts)
        share = classes.share[:, None].to(text.dtype)
        return torch.cat([share * text, (1 - share) * text], dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """[B, 2 Ds]: f, then f_r, each normalised."""
        return self._features(self.clip.vision.entering(images, self.first_changed_layer))

    def encode_text(self, prompts: ClassPrompts) -> Tensor:
        """w [C, Ds], normalised."""
        aligned = self._aligned(self.textual, prompts.forests[0].states.dtype)
        if self.trimming.as_published:
            ends = [self._published_text(forest, aligned) for forest in prompts.forests]
        else:
            prefixes = self._text_prefixes(prompts, aligned)
            ends = [self._trimmed_text(each, prompts, prefixes) for each in prompts.forests]
        text = self.clip.text.readout(torch.cat(ends)[prompts.order])
        return F.normalize(text, dim=-1)

    def _aligned(self, aligners: nn.Module, dtype: torch.dtype) -> dict[int, Tensor]:
        """A tower's own tokens [1, P, wide] by layer, from 1."""
        own = (each.to(dtype)[None] for each in aligners(self.tokens))
        return dict(zip(self.layers, own, strict=True))

    def _entering(self, own: Tensor | None, before: Tensor | None) -> Tensor | None:
        if own is None or before is None:
            return before if own is None else own
        return self.mix(own, before)

    def _passes_on(self, number: int, last: int) -> bool:
        """Whether anything is done with what a layer below the last makes of its tokens."""
        return number < last and (self.mixes or number + 1 not in self.layers)

    def _text_prefixes(
        self, prompts: ClassPrompts, aligned: Mapping[int, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each text layer the keys and values [1, 1 (+ P), H, d] of bot and, where there are
        any, of tokens: the same for every class, as neither sees a word."""
        blocks = self.clip.text.blocks
        tokens, prefixes = None, []
        for number, (block, pair) in enumerate(zip(blocks, prompts.bot, strict=True), 1):
            bot = tuple(each[None] for each in pair)
            tokens = self._entering(aligned.get(number), tokens)
            if tokens is None:
                prefixes.append(bot)
                continue
            both = zip(bot, block.prefix(tokens), strict=True)
            prefixes.append(tuple(torch.cat(each, dim=1) for each in both))
            if self._passes_on(number, len(blocks)):
                tokens = block(tokens, bot, causal=True)
        return prefixes

    def _trimmed_text(
        self,
        forest: TextForest,
        prompts: ClassPrompts,
        prefixes: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The last eot rows [c, Dt] of a forest."""
        blocks = self.clip.text.blocks
        x, update, rows = forest.states, None, None
        for number in range(prompts.first_layer, len(blocks) + 1):
            block, prefix = blocks[number - 1], prefixes[number - 1]
            seen = F.pad(forest.visible, (prefix[0].shape[1], 0), value=True)
            if number == len(blocks) and self.trimming.last_row:
                rows = forest.eot
                seen = seen[rows]
            x, normed = block.enter(x, update)
            x, update = block.advance(x, normed, prefix, mask=seen, rows=rows)
        x = x + update
        return x[0, forest.eot] if rows is None else x[0]

    def _published_text(self, forest: TextForest, aligned: Mapping[int, Tensor]) -> Tensor:
        """The same of whole sequences, tokens behind bot."""
        x = self._with_tokens(forest.states, self.clip.text.blocks, aligned, causal=True)
        return x[forest.sequences, forest.eot + len(self.tokens)]

    @torch.no_grad()
    def _plain_features(self, images: Tensor, below: Tensor) -> Tensor:
        """f0 [B, Ds], normalised."""
        if self.trimming.as_published:
            return frozen_image_features(self.clip, images)
        vision = self.clip.vision
        blocks = vision.blocks[self.layers[0] - 1 :]
        cls = last_cls(blocks, below, alone=self.trimming.last_row)
        return F.normalize(vision.readout(cls), dim=-1)

    def _features(self, below: Tensor) -> Tensor:
        """:meth:`image_features` of what enters the first layer with tokens, [B, L, Dv]."""
        vision = self.clip.vision
        aligned = self._aligned(self.visual, below.dtype)
        if self.trimming.as_published:
            # Layers count from the first with tokens.
            blocks = vision.blocks[self.layers[0] - 1 :]
            shifted = {number - self.layers[0] + 1: each for number, each in aligned.items()}
            rows = self._with_tokens(below, blocks, shifted)[:, : 1 + len(self.tokens)]
        else:
            rows = self._trimmed_rows(below, aligned)
        whole = vision.readout(rows[:, 0])
        tokens = at_least_float32(vision.visual.ln_post(rows[:, 1:])).mean(1)
        both = F.normalize(whole, dim=-1), F.normalize(self.project(tokens), dim=-1)
        return torch.cat(both, dim=-1)

    def _trimmed_rows(self, x: Tensor, aligned: Mapping[int, Tensor]) -> Tensor:
        """What the last layer makes of cls and tokens: [B, 1 + P, Dv].

        Rows of a picture see each other in whatever order: tokens stand behind the patches.
        """
        blocks, length, tokens = self.clip.vision.blocks, x.shape[1], None
        last = len(blocks)
        wanted = torch.arange(length - 1, length + len(self.tokens), device=x.device)
        wanted[0] = 0  # cls
        for number in range(self.layers[0], last):
            block = blocks[number - 1]
            tokens = self._entering(aligned.get(number), tokens)
            if self._passes_on(number, last):
                x = block(torch.cat([x, tokens.expand(len(x), -1, -1)], dim=1))
                x, tokens = x[:, :length], x[:, length:]
            else:
                x = block(x, block.prefix(tokens))
        tokens = self._entering(aligned.get(last), tokens).expand(len(x), -1, -1)
        x = torch.cat([x, tokens], dim=1)
        if self.trimming.last_row:
            return blocks[-1](x, rows=wanted)
        return blocks[-1](x)[:, wanted]

    def _with_tokens(
        self, x: Tensor, blocks: Sequence[Block], aligned: Mapping[int, Tensor], **options
    ) -> Tensor:
        """Rows [N, L, wide] through blocks, tokens behind the first row: [N, L + P, wide].

        Args:
            x: of bot or cls and all others.
            blocks: numbered from 1.
            aligned: own tokens by block.
            options: of the blocks.
        """
        count, before = len(self.tokens), None
        for number, block in enumerate(blocks, 1):
            if number in aligned:
                rest = x[:, 1:] if before is None else x[:, 1 + count :]
                tokens = self._entering(aligned[number], before).expand(len(x), -1, -1)
                x = torch.cat([x[:, :1], tokens, rest], dim=1)
            x = block(x, **options)
            if before is not None or number in aligned:
                before = x[:, 1 : 1 + count]
        return x
