"""MMRL (Guo & Gu, CVPR 2025) and MMRL++: representation tokens in both towers' upper layers.

MMRL puts tokens there anew in every layer; in MMRL++ they also keep a part of what the layer before
made of them.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.fields import Bounds
from lamp_fast.methods.rep_tokens import RepTokens, RepTokenSettings
from lamp_fast.methods.settings import Preset, sgd


@dataclass(frozen=True)
class MmrlSettings(RepTokenSettings):
    """MMRL: multi-modal representation learning."""


@dataclass(frozen=True)
class MmrlPlusPlusSettings(RepTokenSettings):
    """MMRL++: fewer parameters, and tokens that pass on what they learn."""

    rep_beta: Annotated[float, Bounds(0, 1)] = 0.9
    """Share of a layer's own tokens, beside what the layer before made of its own."""
    aligner_rank: Annotated[int, Bounds(1, 16_384)] = 4
    """Rank of what a layer's map of the vectors adds to the map that its tower's layers share."""
    head_rank: Annotated[int, Bounds(1, 16_384)] = 64
    """Rank of what the tokens' projection adds to CLIP's."""


def _adamw(lr: float, epochs: int, batch: int, warmup_epochs: int = 1) -> dict[str, Any]:
    return {**sgd(lr, epochs, batch, warmup_epochs), "optimiser": "adamw"}


# Random crops of training pictures show at least half of them.
VIEWS = {"crop_area": 0.5}
_MMRL_BY_DATA = {
    "stanford_cars": {"reg_weight": 7.0},
    "fgvc_aircraft": {"reg_weight": 6.0},
    "sun397": {"reg_weight": 6.0},
    "dtd": {"reg_weight": 6.0},
    "food101": {"reg_weight": 5.0},
    "flowers102": {"reg_weight": 4.0},
    "ucf101": {"reg_weight": 3.0},
    "imagenet": {"reg_weight": 0.5},
    "caltech101": {"reg_weight": 0.5},
    "oxford_pets": {"reg_weight": 0.2},
    "eurosat": {"reg_weight": 0.01, "rep_width": 2048},
}
_MMRL_PLUS_PLUS_BY_DATA = {
    data: {"rep_beta": beta, "reg_weight": weight}
    for data, beta, weight in (
        ("imagenet", 0.9, 0.2),
        ("fgvc_aircraft", 0.9, 2.0),
        ("ucf101", 0.9, 3.0),
        ("dtd", 0.9, 7.0),
        ("oxford_pets", 0.7, 0.01),
        ("stanford_cars", 0.7, 6.0),
        ("caltech101", 0.6, 3.0),
        ("sun397", 0.5, 3.0),
        ("flowers102", 0.4, 7.0),
        ("eurosat", 0.2, 0.01),
        ("food101", 0.1, 1.0),
    )
}


class Aligners(nn.Module):
    """A linear map [width -> wide] for each of so many layers; all start alike.

    Args:
        width: of the vectors.
        wide: of the tower.
        layers: how many.
    """

    def __init__(self, width: int, wide: int, layers: int) -> None:
        super().__init__()
        first = nn.Linear(width, wide)
        self.layers = nn.ModuleList([first, *(nn.Linear(width, wide) for _ in range(1, layers))])
        for each in self.layers[1:]:
            each.load_state_dict(first.state_dict())

    def forward(self, vectors: Tensor) -> list[Tensor]:
        """[P, width] to each layer's [P, wide]."""
        return [each(vectors) for each in self.layers]


class SharedAligners(nn.Module):
    """The same with weights W + A_i B_i, W for all layers, A_i [wide, rank], B_i [rank, width] at
    0, and a bias for each.

    Args:
        width, wide, layers: as of :class:`Aligners`.
        rank: of A_i B_i.
    """

    def __init__(self, width: int, wide: int, layers: int, rank: int) -> None:
        super().__init__()
        start = nn.Linear(width, wide)
        self.weight = start.weight
        self.up = nn.ParameterList(_kaiming(wide, rank) for _ in range(layers))
        self.down = nn.ParameterList(torch.zeros(rank, width) for _ in range(layers))
        self.bias = nn.ParameterList(start.bias.detach().clone() for _ in range(layers))

    def forward(self, vectors: Tensor) -> list[Tensor]:
        """[P, width] to each layer's [P, wide]."""
        # (W + A B) x as W x + A (B x): the product A B is not formed, and W x once for all layers.
        shared = F.linear(vectors, self.weight)
        return [
            shared + F.linear(F.linear(vectors, down), up, bias)
            for up, down, bias in zip(self.up, self.down, self.bias, strict=True)
        ]


def _kaiming(rows: int, columns: int) -> Tensor:
    weight = torch.empty(rows, columns)
    return nn.init.kaiming_uniform_(weight, a=5**0.5)


class Mmrl(RepTokens):
    """F_i are linear maps that start alike; Q is drawn at random.

    Args:
        clip, config, classes, trimming: as of :class:`RepTokens`.

    Raises:
        InputError: see :class:`RepTokens`.
    """

    title = "MMRL"
    Settings = MmrlSettings
    presets: ClassVar = {
        "mmrl": Preset(
            _adamw(1e-3, 10, 4),
            by_data={"imagenet": {"epochs": 5, "batch": 32}},
            own_by_data=_MMRL_BY_DATA,
            views=VIEWS,
        ),
        "mmrl-all": Preset(
            _adamw(1e-3, 50, 32),
            {"reg_weight": 0.5},
            by_data={"imagenet": {"epochs": 5}},
            own_by_data=_MMRL_BY_DATA,
            views=VIEWS,
        ),
        "mmrl-source": Preset(
            _adamw(1e-3, 1, 32, warmup_epochs=0), {"reg_weight": 0.2}, views=VIEWS
        ),
    }

    def aligners(self, wide: int) -> nn.Module:
        return Aligners(self.config.rep_width, wide, len(self.layers))

    def start_head(self) -> None:
        wide, joint = self.clip.vision.visual.proj.shape
        self.head = nn.Parameter(wide**-0.5 * torch.randn(wide, joint))

    def project(self, rows: Tensor) -> Tensor:
        return rows @ self.head


class MmrlPlusPlus(RepTokens):
    """Maps of R share a weight a tower, F_i = W + A_i B_i, and tokens pass on what becomes of them:
    beta F_i(R) + (1 - beta) what the layer before made of its tokens. Q is CLIP's
    projection plus a product A B of low rank, 0 at the start.

    Trimmed, tokens of pictures are rows in every layer, as what becomes of them is read.

    Args:
        clip, config, classes, trimming: as of :class:`RepTokens`.

    Raises:
        InputError: see :class:`RepTokens`.
    """

    title = "MMRL++"
    Settings = MmrlPlusPlusSettings
    presets: ClassVar = {
        "mmrl++": Preset(
            _adamw(1e-3, 10, 4),
            by_data={"imagenet": {"epochs": 5, "batch": 32}},
            own_by_data=_MMRL_PLUS_PLUS_BY_DATA,
            views=VIEWS,
        ),
        "mmrl++-all": Preset(
            _adamw(2e-3, 100, 32),
            by_data={"imagenet": {"lr": 1e-3, "epochs": 5}},
            own_by_data=_MMRL_PLUS_PLUS_BY_DATA,
            views=VIEWS,
        ),
        "mmrl++-source": Preset(
            _adamw(1e-3, 1, 32, warmup_epochs=0), {"reg_weight": 0.1}, views=VIEWS
        ),
    }
    mixes = True

    def aligners(self, wide: int) -> nn.Module:
        config = self.config
        return SharedAligners(config.rep_width, wide, len(self.layers), config.aligner_rank)

    def start_head(self) -> None:
        wide, joint = self.clip.vision.visual.proj.shape
        self.head_up = nn.Parameter(_kaiming(wide, self.config.head_rank))
        self.head_down = nn.Parameter(torch.zeros(self.config.head_rank, joint))

    def project(self, rows: Tensor) -> Tensor:
        projection = self.clip.vision.visual.proj.to(rows.dtype)
        return rows @ projection + rows @ self.head_up @ self.head_down

    def mix(self, own: Tensor, before: Tensor) -> Tensor:
        beta = self.config.rep_beta
        return beta * own + (1 - beta) * before
