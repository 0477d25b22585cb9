"""2SFS (Farina et al., CVPR 2025): LayerNorms of both towers first, then a classifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.prompts import ClassPrompts
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import Block, FrozenClip, at_least_float32, last_cls
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.methods.base import Criterion, Method, Step
from lamp_fast.methods.fixed import Sides, fixed_copy
from lamp_fast.methods.settings.two_stage import TWO_STAGE, TwoStageSettings
from lamp_fast.methods.surroundings import RunClasses, Surroundings
from lamp_fast.methods.text import encode, prepare_prompts

NORMS, CLASSIFIER = 0, 1


class Norm(nn.LayerNorm):
    """A LayerNorm that starts as CLIP's and is learned in float32, or float64."""

    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__(source.normalized_shape, eps=source.eps)
        self.weight, self.bias = (
            nn.Parameter(at_least_float32(each.detach()).clone())
            for each in (source.weight, source.bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of x [..., width], in its dtype."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class _Normed:
    """What a block reads of open_clip's, with other LayerNorms."""

    def __init__(self, attn: nn.Module, ln_1: Norm, ln_2: Norm) -> None:
        self.attn, self.ln_1, self.ln_2 = attn, ln_1, ln_2


class _NormedBlock(Block):
    """A frozen block with LayerNorms of its own."""

    def __init__(self, block: Block, norms: nn.ModuleList) -> None:
        first, second = norms
        vars(self).update(vars(block), source=_Normed(block.source.attn, first, second))

    def add_norm(self, x: Tensor, update: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        x = x + update
        return x, norm(x)


@dataclass(frozen=True)
class StagedClasses:
    """Classes as they are asked for.

    Attributes:
        prompts: of all C of them.
        others: of those that were not trained; None where all were.
        known, unknown: int64 [K] and [C - K], where trained and other ones stand in the list.
        columns: int64 [K], where each trained one stands among the trained classes.
    """

    prompts: ClassPrompts
    others: ClassPrompts | None
    known: Tensor
    unknown: Tensor
    columns: Tensor


class TwoStage(Method):
    """Logits s cos(f, w_c); f and t_c are features of towers whose LayerNorms are learned.

    Stage 1 trains the LayerNorms with w_c = t_c. Stage 2 freezes them, starts w_c at t_c and trains
    w_c alone: pictures and texts need no gradient there. A trained class is then scored with its
    w_c, in any list of names, and any other with the t_c of the learned text tower. Each stage has
    a rate curve and optimiser state of its own. A run of one epoch has the second stage alone.

    Args:
        clip: the frozen CLIP.
        config: which LayerNorms, and when.
        classes: of the run.
        trimming: what is left out.
    """

    entry = TWO_STAGE
    independent_names = True
    no_class_matrix = None

    def __init__(
        self, clip: FrozenClip, config: TwoStageSettings, classes: RunClasses, trimming: Trimming
    ) -> None:
        super().__init__(clip)
        self.config, self.trained, self.trimming = config, classes, trimming
        self.vision_norms, self.text_norms = (
            nn.ModuleList(
                nn.ModuleList([Norm(block.source.ln_1), Norm(block.source.ln_2)])
                for block in tower.blocks
            )
            for tower in (clip.vision, clip.text)
        )
        self.outer_norms = nn.ModuleDict()
        if config.outer_norms:
            visual, text = clip.vision.visual, clip.text.text
            outer = {"pre": visual.ln_pre, "post": visual.ln_post, "final": text.ln_final}
            self.outer_norms.update({name: Norm(norm) for name, norm in outer.items()})
        self.weight = nn.Parameter(torch.zeros(len(classes.base), clip.vision.visual.proj.shape[1]))
        self.stage = NORMS
        self.match_clip()

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: TwoStageSettings, surroundings: Surroundings
    ) -> "TwoStage":
        return cls(clip, settings, surroundings.classes, surroundings.trimming)

    def stages(self, epochs: int) -> tuple[int, int]:
        first = min(round(self.config.first_stage * epochs), epochs - 1)
        return first, epochs - first

    @torch.no_grad()
    def enter_stage(self, number: int, classes: StagedClasses, first_epoch: bool) -> None:
        """Train the stage's parameters alone; the classifier starts at the texts as they are."""
        self.stage = number
        for name, each in self.named_parameters():
            each.requires_grad_((name == "weight") == (number == CLASSIFIER))
        if number == CLASSIFIER and first_epoch:
            self.weight.copy_(self._texts(classes.prompts))

    def trainable_parameters(self) -> int:
        """Of both stages."""
        return sum(each.numel() for each in self.parameters())

    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> StagedClasses:
        prepare = partial(prepare_prompts, self.clip, template=template, trimming=self.trimming)
        known, columns = self.trained.placed(names)
        unknown = sorted(set(range(len(names))) - set(known))
        index = partial(torch.tensor, dtype=torch.int64, device=self.weight.device)
        return StagedClasses(
            prompts=prepare(names=names),
            others=prepare(names=[names[asked] for asked in unknown]) if unknown else None,
            known=index(known),
            unknown=index(unknown),
            columns=index(columns),
        )

    def step(
        self, images: Tensor, labels: Tensor, classes: StagedClasses, criterion: Criterion
    ) -> Step:
        """The loss of the stage that was entered."""
        rows = self._texts(classes.prompts) if self.stage == NORMS else self.weight
        logits = self._scores(self.image_features(images), F.normalize(rows, dim=-1))
        return Step(criterion(logits, labels), logits)

    @torch.no_grad()
    def logits(self, images: Tensor, classes: StagedClasses, adapted: bool = False) -> Tensor:
        compute = partial(self.class_features, classes)
        keep = self.trimming.cache_text
        rows = self._kept.get(classes, self.parameters(), compute) if keep else compute()
        return self._scores(self.image_features(images), rows)

    @torch.no_grad()
    def fixed_sides(self, clip: FrozenClip, classes: StagedClasses, adapted: bool = False) -> Sides:
        return Sides(fixed_copy(self, clip).image_features, self.class_features(classes))

    def class_features(self, classes: StagedClasses) -> Tensor:
        """What pictures are compared with in prediction: [C, Ds], normalised."""
        count = len(classes.known) + len(classes.unknown)
        rows = self.weight.new_zeros(count, self.weight.shape[1])
        rows = rows.index_copy(0, classes.known, self.weight[classes.columns])
        if classes.others is not None:
            rows = rows.index_copy(0, classes.unknown, self._texts(classes.others).to(rows))
        return F.normalize(rows, dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """[B, Ds], normalised."""
        vision = self.clip.vision
        blocks = map(_NormedBlock, vision.blocks, self.vision_norms)
        x = self._outer("pre", vision.visual.ln_pre)(vision.tokens(images))
        cls = last_cls(blocks, x, alone=self.trimming.only_cls)
        return vision.joint(self._outer("post", vision.visual.ln_post)(cls))

    def _texts(self, prompts: ClassPrompts) -> Tensor:
        """t_c of the learned text tower [C, Ds], normalised."""
        text = self.clip.text
        norm = self._outer("final", text.text.ln_final)
        features = encode(
            self.clip,
            prompts,
            blocks=list(map(_NormedBlock, text.blocks, self.text_norms)),
            last_row=self.trimming.last_row,
            readout=lambda rows: text.project(norm(rows)),
        )
        return F.normalize(features[0], dim=-1)

    def _outer(self, name: str, frozen: nn.Module) -> Any:
        return self.outer_norms[name] if self.config.outer_norms else frozen

    def _scores(self, features: Tensor, rows: Tensor) -> Tensor:
        return self.clip.logit_scale * features @ rows.T
