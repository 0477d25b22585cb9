"""Frozen CLIP towers over open_clip's weights.

A :class:`FrozenClip` refuses what it cannot serve (:func:`check_supported`) and wraps an open_clip
ViT CLIP as two towers whose blocks read open_clip's own tensors and can take prompts as extra keys
and values.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn

from lamp_fast import ops
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.errors import InputError


@dataclass(frozen=True)
class ClipIdentity:
    """What CLIP a run used, for its first lines and its saved config.

    The same weights with another activation or other pictures are another CLIP.

    Attributes:
        name, weights: the model and where its weights come from.
        activation: "quick_gelu" or "gelu", of both towers.
        fingerprint: sha256 over the names, shapes and float32 bytes of all weights.
        random: the weights are drawn, so accuracies mean nothing.
        preprocessing: what it expects of pictures.
    """

    name: str
    weights: str
    activation: str
    fingerprint: str
    random: bool
    preprocessing: Preprocessing


class Block:
    """One pre-norm transformer block of a frozen tower (a view of open_clip's tensors).

    Activations are [N, L, width] in the tower's dtype.

    Args:
        source: open_clip's block.
        fold: write QuickGELU as SiLU with 1.702 folded into the frozen weights around it:
            x sigmoid(1.702 x) = silu(1.702 x) / 1.702. One fused pass that keeps one tensor, at the
            price of a copy of the MLP's weights; exact to rounding in float32 and float64.
    """

    def __init__(self, source: ResidualAttentionBlock, *, fold: bool = False) -> None:
        self.source = source
        self.heads = source.attn.num_heads
        self.project_by(source.attn.in_proj_weight, source.attn.in_proj_bias)
        out = source.attn.out_proj
        self.out = ops.FrozenLinear(out.weight, out.bias)
        widen, narrow = source.mlp.c_fc, source.mlp.c_proj
        widen, narrow = (widen.weight, widen.bias), (narrow.weight, narrow.bias)
        if not isinstance(source.mlp.gelu, QuickGELU):
            self.activation = ops.gelu
        elif not fold:
            self.activation = ops.quick_gelu
        else:
            with torch.no_grad():
                widen = (1.702 * widen[0], 1.702 * widen[1])
                narrow = (narrow[0] / 1.702, narrow[1])
            self.activation = F.silu
        self.widen, self.narrow = ops.FrozenLinear(*widen), ops.FrozenLinear(*narrow)

    def project_by(self, weight: Tensor, bias: Tensor) -> None:
        """Take queries, keys and values from one product: weight [3 width, width], bias [3 width].

        What needs keys and values alone, or queries alone, takes that part of it.
        """
        width = weight.shape[1]
        self.qkv = ops.FrozenLinear(weight, bias)
        self.q, self.kv = self.qkv.outputs(last=width), self.qkv.outputs(first=width)

    def prefix(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of prompts [..., width]: each [..., heads, width / heads].

        A prompt needs nothing else (docs/mathematics.md, fact 1): its query, output and MLP
        would only feed an output that is dropped before the next layer.
        """
        keys_values = self.kv(self.source.ln_1(prompts))
        keys, values = keys_values.unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return keys, values

    def enter(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add what the block before left to add, and normalise: the stream and ln_1 of it.

        Args:
            x: the residual stream [N, L, width].
            update: the same shape, from the last :meth:`advance`; None at the start.
        """
        norm = self.source.ln_1
        return (x, norm(x)) if update is None else self.add_norm(x, update, norm)

    def add_norm(self, x: Tensor, update: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """x + update, and ``norm`` of it."""
        return ops.add_layer_norm(x, update, norm.weight, norm.bias, norm.eps)

    def advance(
        self,
        x: Tensor,
        normed: Tensor,
        prefix: tuple[Tensor, Tensor] | None = None,
        *,
        causal: bool = False,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention and MLP of what :meth:`enter` gave: the stream, and what is to be added to it.

        Args:
            x: the residual stream [N, L, width].
            normed: ln_1 of it.
            prefix: keys and values [G, P, heads, d] that sequence n reads as ``n // (N // G)``.
            causal: row i sees rows 0..i.
            mask: bool [L or R, P + L], what each row sees of prefix and sequence.
            rows: int64 [R]; compute these rows alone and return [N, R, width] twice.
        """
        source = self.source
        q, k, v = self._project(normed, rows)
        if prefix is None:
            prefix = (k[:1, :, :0].transpose(1, 2), v[:1, :, :0].transpose(1, 2))
        prefix_k, prefix_v = (each.transpose(1, 2) for each in prefix)  # [G, H, P, d]
        attended = ops.prefix_attention(q, k, v, prefix_k, prefix_v, causal=causal, mask=mask)
        if rows is not None:
            x = x[:, rows]
        update = self.out(attended.transpose(1, 2).flatten(-2))
        x, normed = self.add_norm(x, update, source.ln_2)
        return x, self.narrow(self.activation(self.widen(normed)))

    def __call__(self, x: Tensor, prefix: tuple[Tensor, Tensor] | None = None, **options) -> Tensor:
        """The whole block over x [N, L, width]; the rest as :meth:`advance`."""
        x, update = self.advance(*self.enter(x), prefix, **options)
        return x + update

    def _project(self, normed: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, H, L or R, d], k and v [N, H, L, d]: strided views of fused projections."""
        if rows is None:
            qkv = self.qkv(normed).unflatten(-1, (3, self.heads, -1))
            return qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q = self.q(normed[:, rows])
        kv = self.kv(normed).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return q.unflatten(-1, (self.heads, -1)).transpose(1, 2), k, v


def through(blocks: Sequence[Block], x: Tensor, **options) -> Tensor:
    """x [N, L, width] through blocks without prompts; options as :meth:`Block.advance`."""
    update = None
    for block in blocks:
        x, normed = block.enter(x, update)
        x, update = block.advance(x, normed, **options)
    return x if update is None else x + update


def last_cls(blocks: Iterable[Block], x: Tensor, *, alone: bool = True) -> Tensor:
    """cls behind blocks without prompts: [B, width] of rows x [B, L, width], cls first.

    Args:
        blocks: in their order.
        x: what enters the first of them.
        alone: the last block computes nothing but that row.
    """
    *below, last = blocks
    x = through(below, x)
    cls = torch.zeros(1, dtype=torch.int64, device=x.device)
    return last(x, rows=cls if alone else None)[:, 0]


def at_least_float32(features: Tensor) -> Tensor:
    """Features as cosines need them.

    A logit is 100 times a cosine, some 25 to 30. There bfloat16's neighbours lie an eighth apart,
    more than classes often do: they would tie, and the first of them win.
    """
    return features.to(torch.promote_types(features.dtype, torch.float32))


class VisionTower:
    """The image side: embeds pictures, runs blocks, reads out cls."""

    causal = False

    def __init__(self, visual: nn.Module, *, fold: bool = False) -> None:
        self.visual = visual
        self.blocks = [Block(block, fold=fold) for block in visual.transformer.resblocks]
        self.width: int = visual.transformer.width

    def embed(self, images: Tensor) -> Tensor:
        """Tokens entering layer 1, cls first: images [B, 3, S, S] -> [B, L, width]."""
        return self.visual.ln_pre(self.tokens(images))

    def entering(self, images: Tensor, layer: int) -> Tensor:
        """The residual stream [B, L, width] that enters a layer, from 1, of the tower as it is.

        Args:
            images: pictures [B, 3, S, S]; or what of them enters that layer, which is given back.
            layer: the one above those that are run.
        """
        if images.ndim == 3:
            return images
        return through(self.blocks[: layer - 1], self.embed(images))

    def tokens(self, images: Tensor) -> Tensor:
        """:meth:`embed` before the first LayerNorm."""
        visual = self.visual
        patches = visual.conv1(images).flatten(2).mT
        cls = visual.class_embedding.expand(len(images), 1, -1)
        return torch.cat([cls, patches], dim=1) + visual.positional_embedding

    def readout(self, cls: Tensor) -> Tensor:
        """Joint-space feature of the last cls row: [..., width] -> [..., Ds], not normalised.

        At least float32 whatever the tower computes in; see :func:`at_least_float32`.
        """
        return self.project(self.visual.ln_post(cls))

    def project(self, unprojected: Tensor) -> Tensor:
        """Joint-space features of rows behind ln_post: [..., width] -> [..., Ds], as readout."""
        return at_least_float32(unprojected @ self.visual.proj)

    def joint(self, unprojected: Tensor) -> Tensor:
        """What :meth:`project` returns, normalised to length 1."""
        return F.normalize(self.project(unprojected), dim=-1)


class TextTower:
    """The text side: embeds token ids, runs causal blocks, reads out eot."""

    causal = True

    def __init__(self, text: nn.Module, *, fold: bool = False) -> None:
        self.text = text
        self.blocks = [Block(block, fold=fold) for block in text.transformer.resblocks]
        self.width: int = text.transformer.width

    def embed(self, token_ids: Tensor) -> Tensor:
        """Tokens entering layer 1: ids [C, L] -> [C, L, width]; L may be cut after the last eot."""
        return self.embed_at(token_ids, torch.arange(token_ids.shape[-1], device=token_ids.device))

    def embed_at(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Tokens at given positions: ids and positions [...] -> [..., width]."""
        return self.text.token_embedding(token_ids) + self.text.positional_embedding[positions]

    @torch.no_grad()
    def bot_prefix(self, bot: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [1, heads, d] of the bot token in every block; see :meth:`bot_rows`."""
        rows = self.bot_rows(bot)
        return [block.prefix(row) for block, row in zip(self.blocks, rows, strict=True)]

    @torch.no_grad()
    def bot_rows(self, bot: Tensor) -> list[Tensor]:
        """Rows [1, width] of the bot token as they enter every block.

        bot is first and the mask causal, so it sees only itself, never a prompt: a constant.

        Args:
            bot: its token id, int64 scalar.
        """
        x = self.embed_at(bot[None], torch.zeros_like(bot[None]))[None]  # [1, 1, width]
        rows = []
        for block in self.blocks:
            rows.append(x[0])
            x = block(x)
        return rows

    def readout(self, eot: Tensor) -> Tensor:
        """Joint-space feature of the last eot row: [..., width] -> [..., Ds], not normalised.

        At least float32 whatever the tower computes in; see :func:`at_least_float32`.
        """
        return self.project(self.text.ln_final(eot))

    def project(self, rows: Tensor) -> Tensor:
        """Joint-space features of rows behind ln_final: [..., width] -> [..., Ds], as readout."""
        projection = self.text.text_projection
        linear = isinstance(projection, nn.Linear)
        return at_least_float32(projection(rows) if linear else rows @ projection)


class FrozenClip(nn.Module):
    """A CLIP whose every weight is frozen, logit scale included.

    Attributes:
        vision, text: the towers, rebuilt whenever the model moves or is cast.
        logit_scale: exp of the frozen logit scale as the model came: a float64 scalar that moves
            with the model and is not cast with it. Products with it keep the other's dtype.
        preprocessing: what it expects of pictures.
        identity: what it is; None for models wrapped directly.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        tokenizer=None,
        identity: ClipIdentity | None = None,
        *,
        fold: bool = True,
    ) -> None:
        super().__init__()
        check_supported(model)
        self.model = model.eval().requires_grad_(False)
        self.logit_scale = model.logit_scale.detach().double().exp()
        self.fold = fold
        self.preprocessing = preprocessing
        self.tokenizer = tokenizer or open_clip.tokenizer.SimpleTokenizer()
        self.identity = identity
        self._build_towers()

    def _build_towers(self) -> None:
        # Folded weights are rounded once more, which low precision would feel; a GPU has a fused
        # QuickGELU instead.
        fold = self.fold and self.dtype in (torch.float32, torch.float64)
        self.vision = VisionTower(self.model.visual, fold=fold)
        self.text = TextTower(_text_side(self.model), fold=fold)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.logit_scale = self.logit_scale.to(self.model.logit_scale.device)
        self._build_towers()
        return self

    @property
    def depth(self) -> int:
        """Layers of the shorter tower: the last one that can carry prompts."""
        return min(len(self.vision.blocks), len(self.text.blocks))

    @property
    def dtype(self) -> torch.dtype:
        return self.model.logit_scale.dtype

    def eot_positions(self, token_ids: Tensor) -> Tensor:
        """Where each sequence of ids [C, L] is read out, by the model's own rule: int64 [C]."""
        text = self.text.text
        if getattr(text, "text_pool_type", getattr(text, "pool_type", None)) == "eos":
            eos = getattr(text, "text_eos_id", getattr(text, "eos_id", None))
            return (token_ids == eos).int().argmax(-1)
        return token_ids.argmax(-1)

    def train(self, mode: bool = True) -> "FrozenClip":
        """Frozen: stays in evaluation mode."""
        return super().train(False)


def activation_of(model: nn.Module) -> str:
    """ "quick_gelu" or "gelu": what the blocks really compute."""
    first = model.visual.transformer.resblocks[0].mlp.gelu
    return "quick_gelu" if isinstance(first, QuickGELU) else "gelu"


def check_supported(model: nn.Module) -> None:
    """Accept exactly the CLIPs whose computation the towers reproduce.

    Raises:
        InputError: naming the model's class and :func:`why_unsupported`.
    """
    if (reason := why_unsupported(model)) is not None:
        raise InputError(f"--clip: {type(model).__name__} is not supported: {reason}")


def why_unsupported(model: nn.Module) -> str | None:
    """The first reason why the towers do not compute what a model does; None where they do.

    The contract: a ``VisionTransformer`` with a class token read out after the last block
    (``pool_type="tok"``) and a causal text transformer read out at eot, both of plain pre-norm
    ``ResidualAttentionBlock`` with ``nn.MultiheadAttention``, no LayerScale, no patch dropout, and
    a joint projection. Towers may differ in depth.
    """
    if isinstance(model, open_clip.CoCa) or hasattr(model, "text_decoder"):
        return "CoCa has a caption decoder and an attentional pooler"
    return (
        _unlike_image_tower(getattr(model, "visual", None))
        or _unlike_text_tower(model, _text_side(model))
        or _unlike_plain_blocks(model)
    )


def _unlike_image_tower(visual: nn.Module | None) -> str | None:
    if not isinstance(visual, open_clip.transformer.VisionTransformer):
        return f"the image tower is a {type(visual).__name__}, expected open_clip's ViT"
    if visual.attn_pool is not None or visual.pool_type != "tok":
        kind = "attentional" if visual.attn_pool is not None else visual.pool_type
        return f"the image tower pools by {kind!r}, expected the class token ('tok')"
    if not isinstance(visual.patch_dropout, nn.Identity):
        return "the image tower drops patches"
    return "the image tower has no joint projection" if visual.proj is None else None


def _unlike_text_tower(model: nn.Module, text: nn.Module) -> str | None:
    if text is not model and not isinstance(text, TextTransformer):
        return f"the text tower is a {type(text).__name__}, expected open_clip's own transformer"
    if getattr(model, "attn_mask", None) is None and getattr(text, "attn_mask", None) is None:
        return "the text tower is not causal"
    if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        return "the text tower appends a class token or masks padding"
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    if pool not in ("argmax", "eos"):
        return f"the text tower pools by {pool!r}, expected its eot token ('argmax' or 'eos')"
    if text.text_projection is None:
        return "the text tower has no joint projection"
    return (
        "it has a logit bias (SigLIP)" if getattr(model, "logit_bias", None) is not None else None
    )


def _unlike_plain_blocks(model: nn.Module) -> str | None:
    sides = (("image", model.visual.transformer), ("text", _text_side(model).transformer))
    for side, transformer in sides:
        for number, block in enumerate(transformer.resblocks, 1):
            if reason := _unlike_plain_block(block):
                return f"{side} block {number} {reason}"
    return None


def _text_side(model: nn.Module) -> nn.Module:
    return model.text if hasattr(model, "text") else model


def _unlike_plain_block(block: nn.Module) -> str | None:
    if not isinstance(block, ResidualAttentionBlock):
        return f"is a {type(block).__name__}, expected a plain pre-norm block"
    if not (isinstance(block.ls_1, nn.Identity) and isinstance(block.ls_2, nn.Identity)):
        return "has LayerScale"
    if not isinstance(block.attn, nn.MultiheadAttention) or block.attn.in_proj_weight is None:
        return "has no fused nn.MultiheadAttention projection"
    if hasattr(block, "ln_1_kv"):
        return "has cross-attention"
    if not isinstance(block.mlp.gelu, (QuickGELU, nn.GELU)):
        return f"uses {type(block.mlp.gelu).__name__}, expected QuickGELU or GELU"
    if getattr(block.mlp.gelu, "approximate", "none") != "none":
        return "approximates GELU, expected it exact or QuickGELU"
    return None
