"""Loading a CLIP: the carried one, open_clip's models with a tag or a file, random weights."""

import hashlib
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from open_clip.transformer import QuickGELU
from torch import nn

from lamp_fast.clip import tiny
from lamp_fast.clip.towers import ClipIdentity, FrozenClip
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.errors import InputError
from lamp_fast.fields import Seed

RANDOM = "random"


@dataclass(frozen=True)
class ClipConfig:
    """The frozen CLIP."""

    clip: str = "tiny"
    """An open_clip model name such as ViT-B-16, or "tiny": the small one the package carries."""
    pretrained: str | None = None
    """A tag (openai), a local state dict (.safetensors, .pt), or "random"."""
    init_seed: Seed = 0
    """Seed of the weights when --pretrained random."""


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
