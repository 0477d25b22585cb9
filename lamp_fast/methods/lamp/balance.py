"""Load-balancing optimisation (LBO): a bias per pool entry, moved by counts (Eq. 9 and 10)."""

import math

import torch
from torch import Tensor, nn


class LoadBalance(nn.Module):
    """Bias b and integer totals of every selected layer.

    All state is in buffers: ``bias`` float32 [layers, M], ``chosen`` int64 [layers, M] (n_m: rows
    that chose each entry since the epoch began) and ``rows`` int64 scalar (n). Whatever dtype the
    module is cast to, the bias stays float32.

    Args:
        layers: number of selected layers.
        pool_size: M.
        k: K.
        gamma: gamma_0; 0 keeps the bias at 0.
        raise_overused: take Eq. 9's printed sign, which raises what is over-used.
    """

    bias: Tensor
    chosen: Tensor
    rows: Tensor

    def __init__(
        self, layers: int, pool_size: int, k: int, gamma: float, *, raise_overused: bool = False
    ) -> None:
        super().__init__()
        self.k = k
        self.gamma = gamma
        self.direction = 1.0 if raise_overused else -1.0
        self.register_buffer("bias", torch.zeros(layers, pool_size))
        self.register_buffer("chosen", torch.zeros(layers, pool_size, dtype=torch.int64))
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.bias = self.bias.float()
        return self

    @torch.no_grad()
    def start_epoch(self) -> None:
        """Totals return to zero; the bias stays."""
        self.chosen.zero_()
        self.rows.zero_()

    @torch.no_grad()
    def update(self, counts: Tensor, rows: int, progress: Tensor | float) -> None:
        """Count the selections of one applied optimiser step, then move the bias once.

        b_m <- b_m - gamma_t sign(M n_m - K n), decided on integers: an exact tie moves nothing.

        Args:
            counts: int64 [layers, M], rows of the step that chose each entry.
            rows: how many rows the step had.
            progress: t / T in [0, 1) for gamma_t = gamma_0 / 2 (1 + cos(pi t / T)); a float64
                scalar on the device where the host must not be asked.
        """
        self.chosen += counts
        self.rows += rows
        over = torch.sign(self.bias.shape[1] * self.chosen - self.k * self.rows)
        progress = torch.as_tensor(progress, dtype=torch.float64, device=self.bias.device)
        step = 0.5 * self.gamma * (1 + torch.cos(math.pi * progress))
        self.bias += (self.direction * step) * over.to(self.bias.dtype)

    def load_std(self) -> list[float]:
        """Per layer, the standard deviation over entries of n_m / n (0 is balanced)."""
        rate = self.chosen.double() / self.rows.clamp(min=1)
        return rate.std(dim=1, correction=0).tolist()
