"""MaPLe (Khattak et al., CVPR 2023): the equations of ``lamp_fast.methods.maple``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.towers import Rival, advance, learned_dtype
from lamp_fast.clip.towers import FrozenClip

COUNT, DEPTH = 2, 9


class MapleRival(Rival):
    """Layer i of the first ``depth`` has text words P_i and image rows F_i(P_i)."""

    title = "MaPLe"

    def __init__(self, clip: FrozenClip, names: tuple[str, ...], depth: int = DEPTH) -> None:
        super().__init__(clip, names)
        self.depth = min(depth, clip.depth)
        dtype, widths = learned_dtype(clip), (clip.text.width, clip.vision.width)
        start = self.text_rows[0, 1 : COUNT + 1] - clip.model.positional_embedding[1 : COUNT + 1]
        drawn = [0.02 * torch.randn(COUNT, widths[0]) for _ in range(1, self.depth)]
        self.words = nn.ParameterList(each.to(dtype) for each in (start, *drawn))
        self.projections = nn.ModuleList(nn.Linear(*widths, dtype=dtype) for _ in range(self.depth))
        self.to(start.device)

    def text(self) -> Tensor:
        """[C, Ds], normalised."""
        x = self.text_rows
        first = self.words[0] + self.clip.model.positional_embedding[1 : COUNT + 1]
        for number, block in enumerate(self.blocks[1], 1):
            if number <= self.depth:
                words = first if number == 1 else self.words[number - 1]
                words = words.to(x.dtype).expand(len(x), -1, -1)
                x = torch.cat([x[:, :1], words, x[:, 1 + COUNT :]], dim=1)
            x = advance(block, x, causal=True)
        return self.read_text(x)

    def scores(self, images: Tensor, text: Tensor) -> Tensor:
        """Logits [B, C]."""
        x = self.embed_images(images)
        length = x.shape[1]
        for number, block in enumerate(self.blocks[0], 1):
            if number <= self.depth:
                rows = self.projections[number - 1](self.words[number - 1]).to(x.dtype)
                x = torch.cat([x[:, :length], rows.expand(len(x), -1, -1)], dim=1)
            if number == 1:
                x = self.clip.model.visual.ln_pre(x)
            x = advance(block, x)
        return self.scale * self.read_image(x[:, 0]) @ text.T

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean over the batch."""
        return F.cross_entropy(self.scores(images, self.text()), labels)

    def optimiser(self, **options) -> torch.optim.Optimizer:
        """As published."""
        settings = {"momentum": 0.9, "weight_decay": 5e-4}
        return torch.optim.SGD(self.own(), 3.5e-3, **settings, **options)
