"""Frozen CLIP towers over open_clip's weights.

:func:`load_clip` builds an open_clip ViT CLIP, refuses what it cannot serve
(:func:`check_supported`) and wraps it as a :class:`FrozenClip`: two :class:`Tower` objects whose
blocks read open_clip's own tensors and can take prompts as extra keys and values.
"""

import hashlib
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn

from lamp_fast import ops, tiny
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.errors import InputError

RANDOM = "random"


@dataclass(frozen=True)
class ClipIdentity:
    """What CLIP a run used, for its first lines and its saved config.

    Attributes:
        name, weights: the model and where its weights come from.
        activation: "quick_gelu" or "gelu", of both towers.
        fingerprint: sha256 over the names, shapes and float32 bytes of all weights.
        random: the weights are drawn, so accuracies mean nothing.
    """

    name: str
    weights: str
    activation: str
    fingerprint: str
    random: bool


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
        widen, narrow = source.mlp.c_fc, source.mlp.c_proj
        self.widen = (widen.weight, widen.bias)
        self.narrow = (narrow.weight, narrow.bias)
        if not isinstance(source.mlp.gelu, QuickGELU):
            self.activation = ops.gelu
        elif not fold:
            self.activation = ops.quick_gelu
        else:
            with torch.no_grad():
                self.widen = (1.702 * widen.weight, 1.702 * widen.bias)
                self.narrow = (narrow.weight / 1.702, narrow.bias)
            self.activation = F.silu

    def prefix(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of prompts [..., width]: each [..., heads, width / heads].

        A prompt needs nothing else (SPEC, "Prompts and attention", 1): its query, output and MLP
        would only feed an output that is dropped before the next layer.
        """
        attention = self.source.attn
        width = attention.embed_dim
        keys_values = F.linear(
            self.source.ln_1(prompts),
            attention.in_proj_weight[width:],
            attention.in_proj_bias[width:],
        )
        keys, values = keys_values.unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return keys, values

    def enter(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add what the block before left to add, and normalise: the stream and ln_1 of it.

        Args:
            x: the residual stream [N, L, width].
            update: the same shape, from the last :meth:`advance`; None at the start.
        """
        norm = self.source.ln_1
        if update is None:
            return x, norm(x)
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
        source, norm = self.source, self.source.ln_2
        q, k, v = self._project(normed, rows)
        if prefix is None:
            prefix = (k[:1, :, :0].transpose(1, 2), v[:1, :, :0].transpose(1, 2))
        prefix_k, prefix_v = (each.transpose(1, 2) for each in prefix)  # [G, H, P, d]
        attended = ops.prefix_attention(q, k, v, prefix_k, prefix_v, causal=causal, mask=mask)
        if rows is not None:
            x = x[:, rows]
        update = source.attn.out_proj(attended.transpose(1, 2).flatten(-2))
        x, normed = ops.add_layer_norm(x, update, norm.weight, norm.bias, norm.eps)
        hidden = self.activation(F.linear(normed, *self.widen))
        return x, F.linear(hidden, *self.narrow)

    def __call__(self, x: Tensor, prefix: tuple[Tensor, Tensor] | None = None, **options) -> Tensor:
        """The whole block over x [N, L, width]; the rest as :meth:`advance`."""
        x, update = self.advance(*self.enter(x), prefix, **options)
        return x + update

    def _project(self, normed: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, H, L or R, d], k and v [N, H, L, d]: strided views of fused projections."""
        weight, bias = self.source.attn.in_proj_weight, self.source.attn.in_proj_bias
        if rows is None:
            qkv = F.linear(normed, weight, bias).unflatten(-1, (3, self.heads, -1))
            return qkv.permute(2, 0, 3, 1, 4).unbind(0)
        width = self.source.attn.embed_dim
        q = F.linear(normed[:, rows], weight[:width], bias[:width])
        kv = F.linear(normed, weight[width:], bias[width:]).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return q.unflatten(-1, (self.heads, -1)).transpose(1, 2), k, v


def through(blocks: Sequence[Block], x: Tensor, **options) -> Tensor:
    """x [N, L, width] through blocks without prompts; options as :meth:`Block.advance`."""
    update = None
    for block in blocks:
        x, normed = block.enter(x, update)
        x, update = block.advance(x, normed, **options)
    return x if update is None else x + update


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
        visual = self.visual
        patches = visual.conv1(images).flatten(2).mT
        cls = visual.class_embedding.expand(len(images), 1, -1)
        return visual.ln_pre(torch.cat([cls, patches], dim=1) + visual.positional_embedding)

    def readout(self, cls: Tensor) -> Tensor:
        """Joint-space feature of the last cls row: [..., width] -> [..., Ds], not normalised.

        At least float32 whatever the tower computes in; see :func:`at_least_float32`.
        """
        return at_least_float32(self.visual.ln_post(cls) @ self.visual.proj)


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
        """Keys and values [1, heads, d] of the bot token in every block.

        bot is first and the mask causal, so it sees only itself, never a prompt: a constant.

        Args:
            bot: its token id, int64 scalar.
        """
        x = self.embed_at(bot[None], torch.zeros_like(bot[None]))[None]  # [1, 1, width]
        prefixes = []
        for block in self.blocks:
            prefixes.append(block.prefix(x[0]))
            x = block(x)
        return prefixes

    def readout(self, eot: Tensor) -> Tensor:
        """Joint-space feature of the last eot row: [..., width] -> [..., Ds], not normalised.

        At least float32 whatever the tower computes in; see :func:`at_least_float32`.
        """
        rows, projection = self.text.ln_final(eot), self.text.text_projection
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


def check_supported(model: nn.Module) -> None:
    """Accept exactly the CLIPs whose computation the towers reproduce.

    The contract: a ``VisionTransformer`` with a class token read out after the last block
    (``pool_type="tok"``) and a causal text transformer read out at eot, both of plain pre-norm
    ``ResidualAttentionBlock`` with ``nn.MultiheadAttention``, no LayerScale, no patch dropout, and
    a joint projection. Towers may differ in depth.

    Raises:
        InputError: naming the model's class and the first reason.
    """

    def refuse(reason: str) -> None:
        raise InputError(f"--clip: {type(model).__name__} is not supported: {reason}")

    if isinstance(model, open_clip.CoCa) or hasattr(model, "text_decoder"):
        refuse("CoCa has a caption decoder and an attentional pooler")
    visual = getattr(model, "visual", None)
    if not isinstance(visual, open_clip.transformer.VisionTransformer):
        refuse(f"the image tower is a {type(visual).__name__}, expected open_clip's ViT")
    text = _text_side(model)
    if text is not model and not isinstance(text, TextTransformer):
        refuse(f"the text tower is a {type(text).__name__}, expected open_clip's own transformer")
    if visual.attn_pool is not None or visual.pool_type != "tok":
        kind = "attentional" if visual.attn_pool is not None else visual.pool_type
        refuse(f"the image tower pools by {kind!r}, expected the class token ('tok')")
    if not isinstance(visual.patch_dropout, nn.Identity):
        refuse("the image tower drops patches")
    if visual.proj is None:
        refuse("the image tower has no joint projection")
    if getattr(model, "attn_mask", None) is None and getattr(text, "attn_mask", None) is None:
        refuse("the text tower is not causal")
    if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        refuse("the text tower appends a class token or masks padding")
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    if pool not in ("argmax", "eos"):
        refuse(f"the text tower pools by {pool!r}, expected its eot token ('argmax' or 'eos')")
    if text.text_projection is None:
        refuse("the text tower has no joint projection")
    if getattr(model, "logit_bias", None) is not None:
        refuse("it has a logit bias (SigLIP)")
    for side, transformer in (("image", visual.transformer), ("text", text.transformer)):
        for number, block in enumerate(transformer.resblocks, 1):
            if reason := _unlike_plain_block(block):
                refuse(f"{side} block {number} {reason}")


def load_clip(
    name: str,
    pretrained: str | None = None,
    *,
    init_seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fold: bool = True,
) -> FrozenClip:
    """Build a frozen CLIP.

    Args:
        name: "tiny" (carried by the package), or an open_clip model name.
        pretrained: a tag of that model, a file with a state dict (``.safetensors``, or ``.pt``
            loaded without unpickling code), or "random" for weights drawn with ``init_seed``.
        device: where it lives.
        dtype: weights are cast to it once; every tower computes in it.
        fold: see :class:`Block`.

    Raises:
        InputError: an unknown model or tag, weights that cannot be had or do not fit, or a model
            outside the contract of :func:`check_supported`.
    """
    if name == "tiny":
        if pretrained is not None:
            raise InputError(f"--pretrained {pretrained}: the tiny CLIP brings its own weights")
        model, weights, preprocessing = tiny.load_tiny(), "carried by the package", None
        tokenizer = open_clip.tokenizer.SimpleTokenizer()
    else:
        model, weights, preprocessing = _build_open_clip(name, pretrained, init_seed)
        tokenizer = _tokenizer(name)
    preprocessing = preprocessing or Preprocessing(size=_image_size(model))
    identity = ClipIdentity(
        name=name,
        weights=weights,
        activation=activation_of(model),
        fingerprint=fingerprint(model),
        random=pretrained == RANDOM,
    )
    clip = FrozenClip(model, preprocessing, tokenizer, identity, fold=fold)
    return clip.to(device=device, dtype=dtype)


def activation_of(model: nn.Module) -> str:
    """ "quick_gelu" or "gelu": what the blocks really compute."""
    first = model.visual.transformer.resblocks[0].mlp.gelu
    return "quick_gelu" if isinstance(first, QuickGELU) else "gelu"


def fingerprint(model: nn.Module) -> str:
    """sha256 over the sorted names, shapes and float32 bytes of a model's parameters."""
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


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
    return None


def _build_open_clip(
    name: str, pretrained: str | None, init_seed: int
) -> tuple[nn.Module, str, Preprocessing]:
    if name not in open_clip.list_models():
        near = [each for each in open_clip.list_models() if each.lower() == name.lower()]
        hint = f"; did you mean {near[0]}?" if near else "; open_clip.list_models() lists them"
        raise InputError(f"--clip {name}: not tiny nor an open_clip model{hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise InputError(
            f"--clip {name}: expected --pretrained with a tag ({', '.join(tags) or 'none known'}),"
            " a local file, or random"
        )
    _refuse_foreign_towers(name)
    if pretrained == RANDOM:
        return _random_clip(name, init_seed), f"random (seed {init_seed})", _preprocessing(name, {})
    if open_clip.pretrained.is_pretrained_cfg(name, pretrained):
        tag = open_clip.get_pretrained_cfg(name, pretrained)
        file = _download(name, pretrained, tag)
        # The activation follows the tag, not the model name: ViT-B-16 + openai is QuickGELU.
        model = _untrained(name, quick_gelu=bool(tag.get("quick_gelu", False)))
        _load_weights(model, file, f"--pretrained {pretrained}")
        return model, f"{pretrained} (open_clip tag)", _preprocessing(name, tag)
    if not Path(pretrained).is_file():
        raise InputError(
            f"--pretrained {pretrained}: neither a file nor a tag of {name}"
            f" ({', '.join(tags) or 'none known'})"
        )
    model = _untrained(name)
    _load_weights(model, Path(pretrained), f"--pretrained {pretrained}")
    return model, str(pretrained), _preprocessing(name, {})


def _refuse_foreign_towers(name: str) -> None:
    """Refuse from the config alone what building would need a network or another library for."""
    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if vision.get("timm_model_name"):
        reason = f"its image tower is timm's {vision['timm_model_name']}"
    elif isinstance(vision.get("layers"), (list, tuple)):
        reason = "its image tower is a ResNet"
    elif text.get("hf_model_name"):
        reason = f"its text tower is Hugging Face's {text['hf_model_name']}"
    elif "multimodal_cfg" in config:
        reason = "CoCa has a caption decoder and an attentional pooler"
    else:
        return
    raise InputError(f"--clip {name}: not supported: {reason}")


def _untrained(name: str, quick_gelu: bool | None = None) -> nn.Module:
    """The architecture with whatever weights its constructor draws."""
    overrides = {} if quick_gelu is None else {"quick_gelu": quick_gelu}
    return open_clip.create_model(name, pretrained=None, **overrides)


def _random_clip(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _untrained(name)


def _download(name: str, tag: str, config: dict) -> Path:
    try:
        return Path(open_clip.download_pretrained(config, prefer_hf_hub=True))
    except Exception as error:  # every client fails in its own way when the network is away
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"--pretrained {tag}: the weights of {name} cannot be fetched ({reason}); fetch them"
            " where there is a network and give the local state dict: --pretrained FILE.safetensors"
        ) from None


def _load_weights(model: nn.Module, file: Path, argument: str) -> None:
    if _is_torchscript(file):
        raise InputError(
            f"{argument}: {file.name} is a TorchScript archive as OpenAI ships it; convert it once:"
            " torch.save(torch.jit.load(FILE, 'cpu').state_dict(), 'clip.pt'), without its"
            " input_resolution, context_length and vocab_size entries"
        )
    try:
        open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
    except Exception as error:  # whatever the loader met, the file is not what was asked for
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{argument}: not weights of this model ({reason})") from None


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _tokenizer(name: str):
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"--clip {name}: its tokenizer cannot be loaded ({reason})") from None


def _preprocessing(name: str, tag: dict) -> Preprocessing:
    size = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise InputError(f"--clip {name}: not supported: its pictures are {size}, not square")
        size = size[0]
    known = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in tag}
    return Preprocessing(size=size, **known)


def _image_size(model: nn.Module) -> int:
    size: Sequence[int] = model.visual.image_size
    return size[0]


def warn_if_random(identity: ClipIdentity) -> None:
    """Say once, loudly, that accuracies of random weights mean nothing."""
    if identity.random:
        warnings.warn(
            f"{identity.name} has {identity.weights} weights: accuracies mean nothing", stacklevel=2
        )
