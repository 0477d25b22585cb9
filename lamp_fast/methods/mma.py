"""MMA (Yang et al., CVPR 2024): adapters beside the upper layers of both towers, joined inside."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.prompts import ClassPrompts
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import Block, FrozenClip, last_cls
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.methods.base import TwoTowers
from lamp_fast.methods.settings import cut_layers
from lamp_fast.methods.settings.mma import MMA, MmaSettings
from lamp_fast.methods.surroundings import Surroundings
from lamp_fast.methods.text import encode, prepare_prompts

TEMPLATE = "a photo of a {}."


class _ScaleGradient(torch.autograd.Function):
    """The identity; its gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class Adapter(nn.Module):
    """s Up(relu(Shared(relu(Down(x))))), with weights that learn as if s were 1.

    Gradients grow by 1/s where they enter the adapter and shrink by s where they leave it, so its
    weights feel those of an unscaled adapter and what lies below the true ones.

    Args:
        width: of x.
        shared: the map between the two towers' bottlenecks.
        scale: s.
    """

    def __init__(self, width: int, shared: nn.Linear, scale: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, shared.in_features)
        self.up = nn.Linear(shared.in_features, width)
        for each in (self.down, self.up):
            start(each)
        # Both towers' adapters hold it; it belongs to the model.
        object.__setattr__(self, "shared", shared)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        inside = _ScaleGradient.apply(x.to(self.down.weight.dtype), self.scale)
        hidden = F.relu(self.shared(F.relu(self.down(inside))))
        return self.scale * _ScaleGradient.apply(self.up(hidden), 1 / self.scale)


def start(linear: nn.Linear) -> None:
    """Kaiming's normal initialisation over fan-out, bias 0."""
    nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(linear.bias)


class _AdaptedBlock(Block):
    """A frozen block with an adapter beside it; both read the same normed input."""

    def __init__(self, block: Block, adapter: Adapter) -> None:
        vars(self).update(vars(block), adapter=adapter)

    def advance(
        self, x: Tensor, normed: Tensor, *arguments, rows: Tensor | None = None, **options
    ) -> tuple[Tensor, Tensor]:
        x, update = super().advance(x, normed, *arguments, rows=rows, **options)
        own = normed if rows is None else normed[:, rows]
        return x, update + self.adapter(own).to(update.dtype)


class Mma(TwoTowers):
    """x + attention + MLP + adapter(ln_1(x)) in the selected layers of both towers.

    The bottlenecks of the two towers share one linear map a layer. Prompts are "a photo of a {}."
    on every data set. Text is computed once for a class set in evaluation, as their code does, but
    anew after every change of a weight, as it does not.

    Args:
        clip: the frozen CLIP.
        config: layers (the published 5..12 are cut to the shallower tower), width and scale.
        trimming: what is left out.

    Raises:
        InputError: other layers than the published ones beyond the shallower tower, or none left.
    """

    entry = MMA

    def __init__(self, clip: FrozenClip, config: MmaSettings, trimming: Trimming) -> None:
        super().__init__(clip, keep_text=trimming.cache_text)
        self.layers = cut_layers("adapter_layers", config, clip.depth)
        self.trimming = trimming
        width, scale = config.adapter_width, config.adapter_scale
        self.shared, self.visual, self.textual = (nn.ModuleDict() for _ in range(3))
        for layer in map(str, self.layers):
            self.shared[layer] = nn.Linear(width, width)
            start(self.shared[layer])
            self.visual[layer] = Adapter(clip.vision.width, self.shared[layer], scale)
            self.textual[layer] = Adapter(clip.text.width, self.shared[layer], scale)
        self.match_clip()

    @classmethod
    def build(cls, clip: FrozenClip, settings: MmaSettings, surroundings: Surroundings) -> "Mma":
        return cls(clip, settings, surroundings.trimming)

    def resolved(self, settings: MmaSettings) -> MmaSettings:
        return replace(settings, adapter_layers=self.layers)

    def templates(self, template: str, origin: Origin = NOWHERE) -> tuple[str, ...]:
        return (TEMPLATE,)

    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> ClassPrompts:
        """The prompt is MMA's own on every data set; ``template`` has no part in it."""
        return prepare_prompts(
            self.clip, names, TEMPLATE, self.trimming, first_layer=self.layers[0]
        )

    def text_features(self, classes: ClassPrompts) -> Tensor:
        blocks = self._with_adapters(self.clip.text.blocks, self.textual)
        text = encode(self.clip, classes, blocks=blocks, last_row=self.trimming.last_row)
        return F.normalize(text[0], dim=-1)

    @property
    def first_changed_layer(self) -> int:
        return self.layers[0]

    def image_features(self, images: Tensor) -> Tensor:
        vision, first = self.clip.vision, self.first_changed_layer
        blocks = self._with_adapters(vision.blocks, self.visual)[first - 1 :]
        cls = last_cls(blocks, vision.entering(images, first), alone=self.trimming.only_cls)
        return F.normalize(vision.readout(cls), dim=-1)

    def _with_adapters(self, blocks: Sequence[Block], adapters: nn.ModuleDict) -> list:
        return [
            _AdaptedBlock(block, adapters[str(number)]) if number in self.layers else block
            for number, block in enumerate(blocks, 1)
        ]
