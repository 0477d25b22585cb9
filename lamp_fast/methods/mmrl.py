"""MMRL (Guo & Gu, CVPR 2025) and MMRL++: representation tokens in both towers' upper layers.

MMRL puts tokens there anew in every layer; in MMRL++ they also keep a part of what the layer before
made of them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.methods.rep_tokens import RepTokens
from lamp_fast.methods.settings.mmrl import MMRL, MMRL_PLUS_PLUS


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

    entry = MMRL

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

    entry = MMRL_PLUS_PLUS
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
