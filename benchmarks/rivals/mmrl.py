"""MMRL (Guo & Gu, CVPR 2025): tokens of one learned space in the upper layers of both towers.

The layers below the first of them are CLIP's own. Of text their result is computed once, of a
picture once for both branches: the published code runs a second whole image encoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.towers import Rival, advance, learned_dtype
from lamp_fast.clip.towers import FrozenClip

COUNT, WIDTH, ALPHA, PULL = 5, 512, 0.7, 1.0


class MmrlRival(Rival):
    """Tokens R A_i (text) and R B_i (images) stand behind bot and cls in layers ``first``.. .

    f is CLIP's projection of cls and g a learned projection of the mean of the tokens, both
    normalised behind the last LayerNorm; w the text features, f0 and w0 zero-shot CLIP's.
    Loss: a CE(s f w) + (1 - a) CE(s g w) + l (1 - cos(f, f0)) + l (1 - cos(w, w0)), means over
    rows; scores of trained classes are a s f w + (1 - a) s g w.
    """

    title = "MMRL"

    def __init__(self, clip: FrozenClip, names: tuple[str, ...]) -> None:
        super().__init__(clip, names)
        self.first = clip.depth // 2
        dtype, device = learned_dtype(clip), self.eot.device
        width, joint = clip.vision.visual.proj.shape
        self.tokens = nn.Parameter(0.02 * torch.randn(COUNT, WIDTH, dtype=dtype))
        numbers = range(self.first, clip.depth + 1)
        self.to_text, self.to_image = (
            nn.ModuleList(nn.Linear(WIDTH, wide, dtype=dtype) for _ in numbers)
            for wide in (clip.text.width, clip.vision.width)
        )
        self.readout = nn.Parameter(width**-0.5 * torch.randn(width, joint, dtype=dtype))
        self.to(device)
        with torch.no_grad():
            below = self.text_rows
            for block in self.blocks[1][: self.first - 1]:
                below = advance(block, below, causal=True)
            x = below
            for block in self.blocks[1][self.first - 1 :]:
                x = advance(block, x, causal=True)
            self.register_buffer("text_plain", self.read_text(x), persistent=False)
            self.text_rows = below

    def text(self) -> Tensor:
        """w [C, Ds]."""
        x = self._upper(self.blocks[1], self.text_rows, self.to_text, causal=True)
        return self.read_text(x, COUNT)

    def images(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f and g [B, Ds], and the rows that enter layer ``first``."""
        visual = self.clip.model.visual
        with torch.no_grad():
            below = visual.ln_pre(self.embed_images(images))
            for block in self.blocks[0][: self.first - 1]:
                below = advance(block, below)
        x = self._upper(self.blocks[0], below, self.to_image, causal=False)
        tokens = visual.ln_post(x[:, 1 : COUNT + 1]).mean(1).to(self.readout.dtype)
        return self.read_image(x[:, 0]), F.normalize(tokens @ self.readout, dim=-1), below

    def scores(self, images: Tensor, text: Tensor) -> Tensor:
        """Logits [B, C] of trained classes."""
        f, g, _ = self.images(images)
        return self.scale * (ALPHA * f + (1 - ALPHA) * g) @ text.T

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean over the batch."""
        w, (f, g, below) = self.text(), self.images(images)
        with torch.no_grad():
            for block in self.blocks[0][self.first - 1 :]:
                below = advance(block, below)
            plain = self.read_image(below[:, 0])
        by_cls = F.cross_entropy(self.scale * f @ w.T, labels)
        by_tokens = F.cross_entropy(self.scale * g @ w.T, labels)
        apart = 2 - (f * plain).sum(-1).mean() - (w * self.text_plain).sum(-1).mean()
        return ALPHA * by_cls + (1 - ALPHA) * by_tokens + PULL * apart

    def optimiser(self, **options) -> torch.optim.Optimizer:
        """As published."""
        return torch.optim.AdamW(self.own(), 1e-3, weight_decay=5e-4, **options)

    def _upper(self, blocks, x: Tensor, maps: nn.ModuleList, causal: bool) -> Tensor:
        """Layers ``first``.. over rows without tokens: [N, L, D] to [N, L + COUNT, D]."""
        for number, (block, own) in enumerate(zip(blocks[self.first - 1 :], maps, strict=True)):
            tokens = own(self.tokens).to(x.dtype).expand(len(x), -1, -1)
            rest = x[:, 1:] if number == 0 else x[:, 1 + COUNT :]
            x = advance(block, torch.cat([x[:, :1], tokens, rest], dim=1), causal)
        return x
