"""The learned prompts of one selected layer: prompt pool (MPP) and shared prompts (MSP)."""

import torch
from torch import Tensor, nn

from lamp_fast.methods.settings.lamp import LampSettings


class LayerPrompts(nn.Module):
    """Pools V, T [M, D], shared prompts s [S, D] and projectors phi_v, phi_t.

    See docs/mathematics.md, Notation. V, T, s ~ N(0, 0.02^2). Projected rows come in pool order
    with the shared prompts last. Without MPP or MSP the respective rows do not exist.
    """

    def __init__(self, config: LampSettings, vision_width: int, text_width: int) -> None:
        super().__init__()
        pool_size = config.m if config.mpp else 0
        shared = config.s if config.msp else 0
        self.visual_pool = nn.Parameter(torch.empty(pool_size, config.d))
        self.text_pool = nn.Parameter(torch.empty(pool_size, config.d))
        self.shared = nn.Parameter(torch.empty(shared, config.d))
        for prompts in (self.visual_pool, self.text_pool, self.shared):
            nn.init.normal_(prompts, std=0.02)
        self.phi_v, self.phi_t = (_projector(config, width) for width in (vision_width, text_width))

    def visual_rows(self) -> Tensor:
        """phi_v([V; s]): [M + S, Dv]. The first M are the keys of retrieval."""
        return self.phi_v(torch.cat([self.visual_pool, self.shared]))

    def text_rows(self) -> Tensor:
        """phi_t([T; s]): [M + S, Dt]. The first M are the keys of ``text_query=class``."""
        return self.phi_t(torch.cat([self.text_pool, self.shared]))


def _projector(config: LampSettings, width: int) -> nn.Module:
    """phi: [.., D] -> [.., width], float32, freshly drawn (docs/mathematics.md, Projectors).

    ``mlp`` has PyTorch's own initialisation, under which keys begin close to each other; ``linear``
    has weights ~ N(0, 1/D) and biases 0.
    """
    if config.phi == "mlp":
        return nn.Sequential(
            nn.Linear(config.d, config.phi_hidden, bias=config.phi_bias),
            nn.ReLU(),
            nn.Linear(config.phi_hidden, width, bias=config.phi_bias),
        )
    phi = nn.Linear(config.d, width, bias=config.phi_bias)
    nn.init.normal_(phi.weight, std=config.d**-0.5)
    if phi.bias is not None:
        nn.init.zeros_(phi.bias)
    return phi
