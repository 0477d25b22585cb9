"""LIFT (Shi et al., ICML 2024): the equations of ``lamp_fast.methods.lift``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.towers import Rival, advance, attend, learned_dtype, think, wide
from lamp_fast.clip.towers import FrozenClip

SCALE = 25.0


class Tuner(nn.Module):
    """g Up(relu(Down(LN(x))))."""

    def __init__(self, width: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.down = nn.Linear(width, inner, dtype=dtype)
        self.up = nn.Linear(inner, width, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))
        for each in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(each)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.down(self.norm(x.to(self.scale.dtype))))
        return self.scale * self.up(hidden)


class LiftRival(Rival):
    """Every image block has an adapter beside its MLP; logits 25 cos(f, W), no text."""

    title = "LIFT"

    def __init__(
        self, clip: FrozenClip, names: tuple[str, ...], tuner_width: int | None = None
    ) -> None:
        super().__init__(clip, names)
        blocks, width, dtype = self.blocks, clip.vision.width, learned_dtype(clip)
        inner = tuner_width or 1 << max(0, (len(names) // (2 * len(blocks[0]))).bit_length() - 1)
        self.adapters = nn.ModuleList(Tuner(width, inner, dtype) for _ in blocks[0])
        with torch.no_grad():
            x = self.text_rows
            for block in blocks[1]:
                x = advance(block, x, causal=True)
            rows = self.read_text(x).to(dtype) @ clip.model.visual.proj.T.to(dtype)
        self.head = nn.Parameter(F.normalize(rows, dim=-1))
        self.register_buffer("adjustment", torch.zeros(len(names)), persistent=False)
        self.to(self.eot.device)

    def text(self) -> Tensor:
        """Nothing: text has no part in it."""
        return self.adjustment

    def scores(self, images: Tensor, text: Tensor) -> Tensor:
        """Logits [B, C]."""
        visual = self.clip.model.visual
        x = visual.ln_pre(self.embed_images(images))
        for block, own in zip(self.blocks[0], self.adapters, strict=True):
            x = attend(block, x, causal=False)
            x = x + think(block, x) + own(x).to(x.dtype)
        features = F.normalize(wide(visual.ln_post(x[:, 0])), dim=-1)
        return SCALE * features @ F.normalize(self.head, dim=-1).T

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Logit-adjusted (of classes of one size), mean over the batch."""
        return F.cross_entropy(self.scores(images, self.text()) + self.adjustment, labels)

    def optimiser(self, **options) -> torch.optim.Optimizer:
        """As published."""
        settings = {"momentum": 0.9, "weight_decay": 5e-4}
        return torch.optim.SGD(self.own(), 0.01, **settings, **options)
