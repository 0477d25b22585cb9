"""CLIP-LoRA (Zanella and Ben Ayed, CVPR 2024 workshops): low-rank changes of every attention."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.prompts import ClassPrompts, whole_prompts
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import Block, FrozenClip, TextTower, VisionTower, last_cls
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.methods.base import Criterion, Step, TwoTowers
from lamp_fast.methods.fixed import Sides
from lamp_fast.methods.settings.clip_lora import CLIP_LORA, ClipLoraSettings
from lamp_fast.methods.surroundings import Surroundings
from lamp_fast.methods.text import encode, prepare_prompts

Drop = Callable[[Tensor], Tensor]


class Dropout:
    """Drops numbers of one pass and scales the others by 1 / (1 - rate).

    Masks are drawn on the device from a seed of the CPU's generator, whose state a checkpoint
    holds, so that a resumed run draws the same ones on every device.

    Args:
        rate: share that is dropped.
        device: of what it is called with.
    """

    def __init__(self, rate: float, device: torch.device) -> None:
        self.rate = rate
        if rate:
            seed = int(torch.randint(2**62, ()))
            self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.rate:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.rate, generator=self.generator)
        return x * kept.div_(1 - self.rate)


class LowRank(nn.Module):
    """scale B A of a block's query, key and value projections; 0 at the start.

    Args:
        width: of the block.
        rank: r; A is ``narrow`` [3, r, width], B ``widen`` [3, width, r].
        scale: what B A is multiplied by.
    """

    def __init__(self, width: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.narrow = nn.Parameter(torch.empty(3, rank, width))
        self.widen = nn.Parameter(torch.zeros(3, width, rank))
        with torch.no_grad():
            for each in self.narrow:
                nn.init.kaiming_uniform_(each, a=5**0.5)

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        """What is added to q, k and v of rows x [N, L, width]: [3, N, L, width].

        Each of the three drops inputs of its own.
        """
        inputs = drop(x.to(self.narrow.dtype).expand(3, *x.shape))
        hidden = inputs @ self.narrow[:, None].mT
        return self.scale * (hidden @ self.widen[:, None].mT)

    def product(self) -> Tensor:
        """What is added to the projections' weights [3 width, width]."""
        return self.scale * (self.widen @ self.narrow).flatten(0, 1)


class _TrainedBlock(Block):
    """A frozen block whose projections are changed beside it."""

    def __init__(self, block: Block, low_rank: LowRank, drop: Drop) -> None:
        vars(self).update(vars(block), low_rank=low_rank, drop=drop)

    def _project(self, normed: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        own = super()._project(normed, rows)
        added = self.low_rank(normed, self.drop).unflatten(-1, (self.heads, -1)).transpose(2, 3)
        q, k, v = added.to(own[0].dtype)
        q = q if rows is None else q[:, :, rows]
        return tuple(one + other for one, other in zip(own, (q, k, v), strict=True))


class _MergedBlock(Block):
    """The same for prediction: the changes are in its weights."""

    def __init__(self, block: Block, low_rank: LowRank) -> None:
        vars(self).update(vars(block))
        weight, added = block.qkv.weight, low_rank.product().detach()
        merged = weight.to(torch.promote_types(weight.dtype, added.dtype)) + added
        self.project_by(merged.to(weight), block.qkv.bias)


class ClipLora(TwoTowers):
    """W + (alpha / sqrt(r)) B A for W_q, W_k and W_v of every block, A [r, width], B [width, r].

    In training the change is computed beside the frozen product, with dropout before A, each of the
    three with its own; for prediction and export it is merged into the weights, so that pictures
    cost what they cost CLIP. Texts change with it, so any name has a score.

    Dropout falls on every row of every class's text alone, so classes share no row while there is
    any: each is one sequence, cut behind the last eot, which nothing in front of it sees. Without
    dropout what class prompts share is computed once.

    Args:
        clip: the frozen CLIP.
        config: r, alpha and dropout.
        trimming: what is left out.
    """

    entry = CLIP_LORA

    def __init__(self, clip: FrozenClip, config: ClipLoraSettings, trimming: Trimming) -> None:
        super().__init__(clip, keep_text=trimming.cache_text)
        self.config, self.trimming = config, trimming
        scale = config.lora_alpha / config.lora_rank**0.5
        self.vision, self.text = (
            nn.ModuleList(LowRank(tower.width, config.lora_rank, scale) for _ in tower.blocks)
            for tower in (clip.vision, clip.text)
        )
        self.match_clip()

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: ClipLoraSettings, surroundings: Surroundings
    ) -> "ClipLora":
        return cls(clip, settings, surroundings.trimming)

    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> ClassPrompts:
        if self.config.lora_dropout and not self.trimming.as_published:
            return whole_prompts(self.clip, names, template, cut=True)
        return prepare_prompts(self.clip, names, template, self.trimming)

    def step(
        self, images: Tensor, labels: Tensor, classes: ClassPrompts, criterion: Criterion
    ) -> Step:
        drop = Dropout(self.config.lora_dropout, images.device)
        build = partial(_TrainedBlock, drop=drop)
        text = self._encoded_text(classes, list(map(build, self.clip.text.blocks, self.text)))
        blocks = list(map(build, self.clip.vision.blocks, self.vision))
        logits = self._scores(self._encoded(self.clip.vision, images, blocks), text)
        return Step(criterion(logits, labels), logits)

    @torch.no_grad()
    def text_features(self, classes: ClassPrompts) -> Tensor:
        """Of the merged tower, for prediction."""
        return self._encoded_text(classes, self._merged(self.clip.text, self.text))

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Of the merged tower, for prediction."""
        return self._encoded(self.clip.vision, images, self._merged(self.clip.vision, self.vision))

    @torch.no_grad()
    def fixed_sides(self, clip: FrozenClip, classes: ClassPrompts, adapted: bool = False) -> Sides:
        blocks = list(map(_MergedBlock, clip.vision.blocks, self.vision))
        return Sides(
            lambda images: self._encoded(clip.vision, images, blocks), self.text_features(classes)
        )

    def _merged(
        self, tower: VisionTower | TextTower, changes: Sequence[LowRank]
    ) -> Sequence[Block]:
        """The tower's blocks with the changes in their weights, kept until one moves."""
        parameters = [each for change in changes for each in change.parameters()]
        compute = partial(list, map(_MergedBlock, tower.blocks, changes))
        return self._kept.get(tower, parameters, compute)

    def _encoded_text(self, classes: ClassPrompts, blocks: Sequence[Block]) -> Tensor:
        text = encode(self.clip, classes, blocks=blocks, last_row=self.trimming.last_row)
        return F.normalize(text[0], dim=-1)

    def _encoded(self, tower: VisionTower, images: Tensor, blocks: Sequence[Block]) -> Tensor:
        cls = last_cls(blocks, tower.embed(images), alone=self.trimming.only_cls)
        return F.normalize(tower.readout(cls), dim=-1)
