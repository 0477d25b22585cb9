"""LIFT (Shi et al., ICML 2024) and LIFT+ (2025): adapters in every image block, a cosine head.

The strongest published long-tail methods on CLIP, and two of the simplest: the text tower starts
the head and is not used again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import Block, FrozenClip, at_least_float32, last_cls
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.methods.base import Criterion, Method, Step
from lamp_fast.methods.settings.lift import LIFT, LIFT_PLUS, LiftSettings
from lamp_fast.methods.surroundings import RunClasses, Surroundings
from lamp_fast.methods.text import plain_text_features
from lamp_fast.methods.training_set import TrainingSet

TEMPLATE = "a photo of a {}."
# What cosines are multiplied by, in place of CLIP's 100.
SCALE = 25.0


def tuner_width(classes: int, layers: int) -> int:
    """The published width: 2^floor(log2(C / (2 layers))), at least 1."""
    return 1 << max(0, (classes // (2 * layers)).bit_length() - 1)


class Adapter(nn.Module):
    """AdaptFormer: g Up(relu(Down(LN(x)))), g one learned number that starts at 1; 0 at the start.

    Args:
        width: of x.
        inner: between the projections.
        start_down: draws Down's weight, in place.
    """

    def __init__(self, width: int, inner: int, start_down: Callable[..., Any]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        self.scale = nn.Parameter(torch.ones(1))
        start_down(self.down.weight, a=5**0.5)
        for each in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(each)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.to(self.norm.weight.dtype))
        return self.scale * self.up(F.relu(self.down(x)))


class _AdaptedBlock(Block):
    """A frozen block with an adapter beside its MLP, which reads the stream after attention."""

    def __init__(self, block: Block, adapter: Adapter) -> None:
        vars(self).update(vars(block), adapter=adapter)

    def advance(self, *arguments, **options) -> tuple[Tensor, Tensor]:
        x, update = super().advance(*arguments, **options)
        return x, update + self.adapter(x).to(update.dtype)


class Lift(Method):
    """x + attention, then x + MLP(ln_2(x)) + adapter(x) in every image block; logits 25 cos(f, W).

    f is cls behind the last LayerNorm, V wide, before CLIP's projection P [V, Ds], and W [C, V] has
    no bias. W starts at W_c = norm(P t_c), t_c the text feature of "a photo of a {}.": with
    adapters that start at 0 that is zero-shot CLIP but for a factor a class. The text tower has no
    part in training and prediction, so classes that were not trained have no score.

    Args:
        clip: the frozen CLIP.
        config: the adapters' width.
        classes: of the run.
        trimming: whether the last block computes cls alone.
    """

    entry = LIFT
    # Of the same variance: of the two public codes one draws normal numbers, the other uniform.
    start_down = staticmethod(nn.init.kaiming_normal_)

    def __init__(
        self, clip: FrozenClip, config: LiftSettings, classes: RunClasses, trimming: Trimming
    ) -> None:
        super().__init__(clip)
        self.trained = classes
        self.only_cls = trimming.only_cls
        blocks, width = clip.vision.blocks, clip.vision.width
        inner = config.tuner_width or tuner_width(len(classes.base), len(blocks))
        self.adapters = nn.ModuleList(Adapter(width, inner, self.start_down) for _ in blocks)
        self.head = nn.Parameter(torch.zeros(len(classes.base), width))
        self.match_clip()

    @classmethod
    def build(cls, clip: FrozenClip, settings: LiftSettings, surroundings: Surroundings) -> "Lift":
        return cls(clip, settings, surroundings.classes, surroundings.trimming)

    @property
    def cosine_scale(self) -> float:
        return SCALE

    @torch.no_grad()
    def read_training_set(self, training: TrainingSet) -> None:
        """Start the head from the class names; of the pictures nothing is read."""
        names = [name.replace("_", " ") for name in self.trained.base]
        projection = self.clip.vision.visual.proj
        text = plain_text_features(self.clip, names, TEMPLATE)
        self.head.copy_(F.normalize(text @ projection.T.to(text.dtype), dim=-1))

    def templates(self, template: str, origin: Origin = NOWHERE) -> tuple[str, ...]:
        return (TEMPLATE,)

    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> Tensor | slice:
        """Rows of W, int64 [C], or all of them; of equal names each is one class.

        Raises:
            InputError: a name that was not trained.
        """
        rows = self.trained.trained_columns(names, self.entry.no_new_names)
        if rows == list(range(len(self.head))):
            return slice(None)
        return torch.tensor(rows, dtype=torch.int64, device=self.head.device)

    def step(
        self, images: Tensor, labels: Tensor, classes: Tensor | slice, criterion: Criterion
    ) -> Step:
        logits = self._scores(images, classes)
        return Step(criterion(logits, labels), logits)

    @torch.no_grad()
    def logits(self, images: Tensor, classes: Tensor | slice, adapted: bool = False) -> Tensor:
        return self._scores(images, classes)

    def _scores(self, images: Tensor, rows: Tensor | slice) -> Tensor:
        head = F.normalize(self.head[rows], dim=-1)
        return SCALE * F.normalize(self._features(images), dim=-1) @ head.T

    def _features(self, images: Tensor) -> Tensor:
        """[B, V], at least float32."""
        vision = self.clip.vision
        blocks = map(_AdaptedBlock, vision.blocks, self.adapters)
        cls = last_cls(blocks, vision.embed(images), alone=self.only_cls)
        return at_least_float32(vision.visual.ln_post(cls))


class LiftPlus(Lift):
    """LIFT, trained in half the epochs at twice the rate on squares that show more and more."""

    entry = LIFT_PLUS
    start_down = staticmethod(nn.init.kaiming_uniform_)
