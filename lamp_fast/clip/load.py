"""Loading a CLIP: the carried one, open_clip's models with a tag or a file, random weights."""

import hashlib
import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file
from torch import Tensor, nn

from lamp_fast.cli import expand_path
from lamp_fast.clip import tiny
from lamp_fast.clip.towers import ClipIdentity, FrozenClip
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.errors import InputError

RANDOM = "random"
_TAG = " (open_clip tag)"
_CARRIED = "carried by the package"

# The sha256 of a tag's file, or how it begins, as open_clip reads them from addresses.
_SHA256_IN_ADDRESS = re.compile(r"/([0-9a-f]{64})/|-([0-9a-f]{8})\.pth?$")
# OpenAI's archives keep these beside the weights.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class Usage:
    """How weights are meant to be used, which the weights themselves do not say.

    Attributes:
        activation: "quick_gelu" or "gelu", of both towers.
        preprocessing: what they expect of pictures.
    """

    activation: str
    preprocessing: Preprocessing

    def __str__(self) -> str:
        looks = self.preprocessing
        mean, std = (", ".join(f"{each:.4g}" for each in row) for row in (looks.mean, looks.std))
        return (
            f"{self.activation}, {looks.size} pixels, {looks.interpolation}, {looks.resize_mode},"
            f" mean ({mean}), std ({std})"
        )


def load_clip(
    name: str,
    pretrained: str | None = None,
    *,
    weights_of: str | None = None,
    recorded: Mapping[str, Any] | None = None,
    init_seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fold: bool = True,
) -> FrozenClip:
    """Build a frozen CLIP.

    Activation and preprocessing are those of the run that it is loaded for, of the tag, or, for a
    file, of the tag whose weights it is told or recognised to hold.

    Args:
        name: "tiny" (carried by the package), or an open_clip model name.
        pretrained: a tag of that model, a file with a state dict (``.safetensors``, or ``.pt``
            loaded without unpickling code), or "random" for weights drawn with ``init_seed``.
        weights_of: the tag whose weights the file holds.
        recorded: the CLIP that a run recorded; it decides, whatever tag or file is given now.
        device: where it lives.
        dtype: weights are cast to it once; every tower computes in it.
        fold: see :class:`Block`.

    Raises:
        InputError: an unknown model or tag, weights that cannot be had, do not fit or are not
            finite, or a model outside the contract of :func:`check_supported`.
    """
    usage = None if recorded is None else recorded_usage(recorded)
    if usage is None and weights_of is not None:
        _check_weights_of(name, pretrained, weights_of)
    if name == "tiny":
        if pretrained is not None:
            raise InputError(f"--pretrained {pretrained}: the tiny CLIP brings its own weights")
        model, weights = tiny.load_tiny(), _CARRIED
        tokenizer = open_clip.tokenizer.SimpleTokenizer()
        preprocessing = Preprocessing(size=_picture_size(name))
    else:
        model, weights, preprocessing = _build_open_clip(
            name, pretrained, weights_of, usage, init_seed
        )
        tokenizer = _tokenizer(name)
    used = Usage(activation_of(model), preprocessing)
    if usage not in (None, used):
        raise InputError(f"--clip {name}: used with {used}, but by the run with {usage}")
    identity = ClipIdentity(
        name=name,
        weights=weights,
        activation=used.activation,
        fingerprint=fingerprint(model),
        random=pretrained == RANDOM,
        preprocessing=preprocessing,
    )
    clip = FrozenClip(model, preprocessing, tokenizer, identity, fold=fold)
    return clip.to(device=device, dtype=dtype)


def recorded_usage(clip: Mapping[str, Any]) -> Usage:
    """How a run used its CLIP, by the ``clip`` of its ``config.json``.

    Version 0.1.0 did not record the preprocessing: it was the tag's, and for a file the usual one.

    Raises:
        InputError: not such a record, or a tag that this open_clip does not know.
    """
    try:
        name, weights, activation = clip["name"], clip["weights"], clip["activation"]
        if "preprocessing" in clip:
            preprocessing = _preprocessing_of(**clip["preprocessing"])
        else:
            preprocessing = _preprocessing_before(name, weights)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError("config.json: its clip is not what a run records") from None
    return Usage(activation, preprocessing)


def completed_record(clip: Mapping[str, Any]) -> dict[str, Any]:
    """The ``clip`` of a run's ``config.json`` as this version records it.

    Raises:
        InputError: see :func:`recorded_usage`.
    """
    preprocessing = asdict(recorded_usage(clip).preprocessing)
    return {**clip, "preprocessing": json.loads(json.dumps(preprocessing))}


def _preprocessing_of(
    size: int, mean: list[float], std: list[float], interpolation: str, resize_mode: str
) -> Preprocessing:
    fits = type(size) is int and len(mean) == len(std) == 3
    if not fits or not all(math.isfinite(each) for each in (*mean, *std)) or min(std) <= 0:
        raise ValueError
    if interpolation not in ("bicubic", "bilinear") or resize_mode not in ("shortest", "squash"):
        raise ValueError
    return Preprocessing(size, tuple(mean), tuple(std), interpolation, resize_mode)


def _preprocessing_before(name: str, weights: str) -> Preprocessing:
    if name == "tiny":
        return Preprocessing(size=_picture_size(name))
    if not weights.endswith(_TAG):
        return _tag_usage(name, {}).preprocessing
    tag = weights.removesuffix(_TAG)
    if not open_clip.pretrained.is_pretrained_cfg(name, tag):
        raise InputError(f"config.json: the run used {name} with the tag {tag}, unknown here")
    return _tag_usage(name, open_clip.get_pretrained_cfg(name, tag)).preprocessing


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
    name: str, pretrained: str | None, weights_of: str | None, usage: Usage | None, init_seed: int
) -> tuple[nn.Module, str, Preprocessing]:
    _check_name(name)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise InputError(
            f"--clip {name}: expected --pretrained with a tag ({', '.join(tags) or 'none known'}),"
            " a local file, or random"
        )
    _refuse_foreign_towers(name)
    if pretrained == RANDOM:
        usage = usage or _tag_usage(name, {})
        return (
            _random_clip(name, usage, init_seed),
            f"random (seed {init_seed})",
            usage.preprocessing,
        )
    if open_clip.pretrained.is_pretrained_cfg(name, pretrained):
        tag = open_clip.get_pretrained_cfg(name, pretrained)
        usage = usage or _tag_usage(name, tag)
        file, weights = _download(name, pretrained, tag), f"{pretrained}{_TAG}"
    else:
        file, weights = expand_path(pretrained), str(pretrained)
        if not file.is_file():
            raise InputError(
                f"--pretrained {pretrained}: neither a file nor a tag of {name}"
                f" ({', '.join(tags) or 'none known'})"
            )
        _refuse_torchscript(name, file)
        usage = usage or _file_usage(name, file, weights_of)
    model = _untrained(name, usage)
    _load_weights(model, file, f"--pretrained {pretrained}")
    return model, weights, usage.preprocessing


def _check_name(name: str) -> None:
    if name not in open_clip.list_models():
        near = [each for each in open_clip.list_models() if each.lower() == name.lower()]
        hint = f"; did you mean {near[0]}?" if near else "; open_clip.list_models() lists them"
        raise InputError(f"--clip {name}: not tiny nor an open_clip model{hint}")


def _check_weights_of(name: str, pretrained: str | None, weights_of: str) -> None:
    """A tag of the model, for a file."""
    if name != "tiny":
        _check_name(name)
    tags = [] if name == "tiny" else open_clip.list_pretrained_tags_by_model(name)
    if pretrained in (None, RANDOM, *tags):
        given = "" if pretrained is None else f", not {pretrained}"
        raise InputError(f"--weights-of {weights_of}: expected --pretrained with a file{given}")
    if weights_of not in tags:
        known = ", ".join(tags) or "none known"
        raise InputError(f"--weights-of {weights_of}: expected a tag of {name} ({known})")


def _tag_usage(name: str, tag: Mapping[str, Any]) -> Usage:
    """How open_clip uses a model's weights of some tag; of none, as the model's name says.

    Where a tag is silent it means GELU, whatever the model's name says: ViT-B-16 + openai is
    QuickGELU.
    """
    config = open_clip.get_model_config(name)
    quick = tag.get("quick_gelu", False) if tag else config.get("quick_gelu", False)
    known = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in tag}
    known |= {key: tuple(known[key]) for key in ("mean", "std") if key in known}
    preprocessing = Preprocessing(size=_picture_size(name), **known)
    return Usage("quick_gelu" if quick else "gelu", preprocessing)


def _file_usage(name: str, file: Path, weights_of: str | None) -> Usage:
    """As told, as recognised, or as the model's name says; warned of where that may be wrong."""
    tag = weights_of or _recognised(name, file)
    if tag is not None:
        return _tag_usage(name, open_clip.get_pretrained_cfg(name, tag))
    usage = _tag_usage(name, {})
    others = [tag for tag, each in _tags(name) if _tag_usage(name, each) != usage]
    if others or f"{name}-quickgelu" in open_clip.list_models():
        shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
        unlike = f"; {shown} would be used otherwise" if others else ""
        warnings.warn(
            f"--pretrained {file}: whose weights these are is not known, so they are used as"
            f" {name} says ({usage}){unlike}; --weights-of TAG tells",
            stacklevel=2,
        )
    return usage


def _tags(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for tag in open_clip.list_pretrained_tags_by_model(name):
        yield tag, open_clip.get_pretrained_cfg(name, tag)


def _recognised(name: str, file: Path) -> str | None:
    """The tag that a file is of: by its place in the hub's cache, or by the sha256 that the tag's
    address holds."""
    folders, hashes = set(file.absolute().parts), {}
    for tag, config in _tags(name):
        repository = "--".join(config.get("hf_hub", "").split("/")[:2])
        if repository and f"models--{repository}" in folders:
            return tag
        if found := _SHA256_IN_ADDRESS.search(config.get("url", "")):
            hashes[found[1] or found[2]] = tag
    digest = _sha256(file) if hashes else ""
    return next((tag for start, tag in hashes.items() if digest.startswith(start)), None)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


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


def _untrained(name: str, usage: Usage) -> nn.Module:
    """The architecture with whatever weights its constructor draws."""
    quick = usage.activation == "quick_gelu"
    return open_clip.create_model(name, pretrained=None, quick_gelu=quick)


def _random_clip(name: str, usage: Usage, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _untrained(name, usage)


def _download(name: str, tag: str, config: dict) -> Path:
    try:
        return Path(open_clip.download_pretrained(config, prefer_hf_hub=True))
    except Exception as error:  # every client fails in its own way when the network is away
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"--pretrained {tag}: the weights of {name} cannot be fetched ({reason}); fetch them"
            " where there is a network and give the local state dict and whose it is: --pretrained"
            f" FILE.safetensors --weights-of {tag}"
        ) from None


def _load_weights(model: nn.Module, file: Path, argument: str) -> None:
    try:
        state = _read_state(file)
        if not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        if "logit_scale" in state:  # [] or [1]
            state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
        _refuse_other_sizes(model, state, argument)
        model.load_state_dict(state, strict=True)
    except InputError:
        raise
    except Exception as error:  # whatever the loader met, the file is not what was asked for
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{argument}: not weights of this model ({reason})") from None
    for key, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise InputError(f"{argument}: {key} holds NaN or infinity, expected finite weights")


def _read_state(file: Path) -> dict[str, Tensor]:
    """The state dict of a file, never unpickling code; not all of OpenAI's entries are weights."""
    if file.suffix == ".safetensors":
        state = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key not in _NO_WEIGHTS}
    for key, value in state.items():
        if not value.is_floating_point():
            raise ValueError(f"{key} is {value.dtype}")
    return state


def _refuse_other_sizes(model: nn.Module, state: Mapping[str, Tensor], argument: str) -> None:
    """open_clip would interpolate position embeddings: another CLIP than anybody trained."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, what in (
        ("visual.positional_embedding", "another picture size"),
        ("positional_embedding", "another context length"),
        ("text.positional_embedding", "another context length"),
    ):
        if key in shapes and key in state and len(state[key]) != shapes[key][0]:
            raise InputError(
                f"{argument}: weights of {what} ({len(state[key])} positions), expected those of"
                f" this model ({shapes[key][0]})"
            )


def _refuse_torchscript(name: str, file: Path) -> None:
    if not _is_torchscript(file):
        return
    tag = _recognised(name, file) or "openai"
    raise InputError(
        f"--pretrained {file}: a TorchScript archive as OpenAI ships it; convert it once:"
        " torch.save(torch.jit.load(FILE, 'cpu').state_dict(), 'clip.pt'), then --pretrained"
        f" clip.pt --weights-of {tag}"
    )


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


def _picture_size(name: str) -> int:
    config = tiny.carried_config() if name == "tiny" else open_clip.get_model_config(name)
    size = config["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise InputError(f"--clip {name}: not supported: its pictures are {size}, not square")
        size = size[0]
    return size


def warn_if_random(identity: ClipIdentity) -> None:
    """Say once, loudly, that accuracies of random weights mean nothing."""
    if identity.random:
        warnings.warn(
            f"{identity.name} has {identity.weights} weights: accuracies mean nothing", stacklevel=2
        )
