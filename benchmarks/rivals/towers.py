"""CLIP's frozen towers in plain torch, batch first, over open_clip's tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamp_fast.clip.prompts import tokenise
from lamp_fast.clip.towers import FrozenClip


class Rival(nn.Module):
    """What the rivals share: frozen towers, and the class list that they learn.

    Args:
        clip: whose weights are read; they stay outside the module tree.
        names: of the classes, put into "a photo of a {}.".
    """

    template = "a photo of a {}."

    def __init__(self, clip: FrozenClip, names: tuple[str, ...]) -> None:
        super().__init__()
        object.__setattr__(self, "clip", clip)
        tokens = tokenise(clip, names, self.template, quiet=True)
        text = clip.model
        ids = tokens.trimmed_ids
        rows = text.token_embedding(ids) + text.positional_embedding[: ids.shape[1]]
        self.register_buffer("text_rows", rows.detach(), persistent=False)  # [C, L, Dt]
        self.register_buffer("eot", tokens.eot, persistent=False)
        self.scale = float(clip.logit_scale)

    @property
    def blocks(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        """Of the image tower and of the text tower."""
        model = self.clip.model
        return model.visual.transformer.resblocks, model.transformer.resblocks

    def embed_images(self, images: Tensor) -> Tensor:
        """Rows [B, L, Dv] that enter ln_pre."""
        visual = self.clip.model.visual
        patches = visual.conv1(images).flatten(2).mT
        cls = visual.class_embedding.expand(len(images), 1, -1)
        return torch.cat([cls, patches], dim=1) + visual.positional_embedding

    def read_text(self, rows: Tensor, shift: int = 0) -> Tensor:
        """Features [C, Ds] of the rows behind the last layer, normalised."""
        model = self.clip.model
        eot = rows[torch.arange(len(rows), device=rows.device), self.eot + shift]
        return F.normalize(wide(model.ln_final(eot) @ model.text_projection), dim=-1)

    def read_image(self, row: Tensor) -> Tensor:
        """Features [B, Ds] of cls behind the last layer, normalised."""
        visual = self.clip.model.visual
        return F.normalize(wide(visual.ln_post(row) @ visual.proj), dim=-1)

    def own(self) -> list[nn.Parameter]:
        """What is learned."""
        return [*self.parameters()]


def attend(block: nn.Module, x: Tensor, causal: bool) -> Tensor:
    """x + attention(ln_1(x)): [N, L, D]."""
    attention = block.attn
    packed = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = packed.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return x + attention.out_proj(mixed.transpose(1, 2).flatten(2))


def think(block: nn.Module, x: Tensor) -> Tensor:
    """mlp(ln_2(x)), with QuickGELU."""
    hidden = block.mlp.c_fc(block.ln_2(x))
    return block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))


def advance(block: nn.Module, x: Tensor, causal: bool = False) -> Tensor:
    """A whole block."""
    x = attend(block, x, causal)
    return x + think(block, x)


def learned_dtype(clip: FrozenClip) -> torch.dtype:
    """Of what is learned beside such a CLIP."""
    return torch.promote_types(clip.dtype, torch.float32)


def wide(features: Tensor) -> Tensor:
    """At least float32, as cosines need it."""
    return features.to(torch.promote_types(features.dtype, torch.float32))
