"""A CLIP in a folder of its own, as open_clip writes it for the hub: BioCLIP, one's own.

``open_clip_config.json`` says what it is and how it is used; ``open_clip_model.safetensors`` holds
its weights. ``hf-hub:ORG/NAME`` is such a folder on the Hugging Face hub, ``local-dir:FOLDER`` one
on this machine.
"""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from open_clip.constants import HF_CONFIG_NAME as CONFIG
from open_clip.constants import HF_SAFE_WEIGHTS_NAME as WEIGHTS
from torch import nn

from lamp_fast.cli import expand_path
from lamp_fast.clip.settings import HUB, LOCAL
from lamp_fast.clip.towers import why_unsupported
from lamp_fast.clip.usage import preprocessing_of, square_size
from lamp_fast.clip.weights import load_weights
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.errors import InputError
from lamp_fast.files import read_json

# What a preprocess_cfg may say; what it leaves out is CLIP's own.
_LOOKS = ("mean", "std", "interpolation", "resize_mode")


def load(
    name: str, elsewhere: str | None = None
) -> tuple[nn.Module, str, Preprocessing, open_clip.SimpleTokenizer]:
    """The model of a folder, with its weights.

    Args:
        name: ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``.
        elsewhere: a folder on this machine that holds the same files.

    Returns:
        The model, where its weights are from, what it expects of pictures, and its tokenizer.

    Raises:
        InputError: a folder or file that cannot be had, a config that is not open_clip's, or a
            model that the towers do not reproduce.
    """
    config, preprocessing = _read_config(name, _find(name, CONFIG, elsewhere))
    with torch.device("meta"):
        shell = _untrained(name, config)
    if (reason := why_unsupported(shell)) is not None:
        raise InputError(f"--clip {name}: not supported: {reason}")
    tokenizer = _tokenizer(name, config["text_cfg"])
    file = _find(name, WEIGHTS, elsewhere)
    # Initial weights are drawn only to be overwritten; the caller's random stream is not theirs.
    with torch.random.fork_rng(devices=[]):
        model = _untrained(name, config)
    load_weights(model, file, f"--clip {name}: {WEIGHTS}")
    on_hub = elsewhere is None and name.startswith(HUB)
    return model, WEIGHTS if on_hub else str(file), preprocessing, tokenizer


def shell(name: str) -> nn.Module:
    """The model of a folder whose tensors have shapes and no values; only its config is read.

    Raises:
        InputError: see :func:`load`.
    """
    config, _ = _read_config(name, _find(name, CONFIG, None))
    with torch.device("meta"):
        return _untrained(name, config)


def refuse_foreign_towers(name: str, config: Mapping[str, Any]) -> None:
    """Refuse from a model's config alone what building would need a network or another library for.

    Raises:
        InputError: with the reason.
    """
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


def _find(name: str, file: str, elsewhere: str | None) -> Path:
    """A file of the folder, on this machine."""
    if elsewhere is None and name.startswith(HUB):
        return _fetch(name, file)
    flag, folder = f"--clip {name}", name.removeprefix(LOCAL)
    if elsewhere is not None:
        flag, folder = f"--pretrained {elsewhere}", elsewhere
    if not folder:
        raise InputError(f"--clip {name}: expected {LOCAL}FOLDER")
    place = expand_path(folder) / file
    if place.is_file():
        return place
    if not place.parent.is_dir():
        raise InputError(f"{flag}: is no folder, expected one with {CONFIG} and {WEIGHTS}")
    other = _other_weights(place.parent) if file == WEIGHTS else ""
    raise InputError(f"{flag}: has no {file}{other}")


def _other_weights(folder: Path) -> str:
    """What to do about weights of another kind that lie there in place of safetensors."""
    other = next((each for each in sorted(folder.glob("*.bin"))), None)
    return "" if other is None else f", and {other.name} may run code when it is loaded; {_CONVERT}"


_CONVERT = (
    "convert it once: safetensors.torch.save_file(torch.load(FILE, 'cpu', weights_only=True),"
    f" '{WEIGHTS}')"
)


def _fetch(name: str, file: str) -> Path:
    repository = name.removeprefix(HUB)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise InputError(f"--clip {name}: expected {HUB}ORG/NAME")
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:  # every client fails in its own way when the network is away
        # That it is not in the cache either is said by an error of the same kind.
        there = isinstance(error, EntryNotFoundError)
        if there and not isinstance(error, LocalEntryNotFoundError):
            others = f"; weights of another kind may run code when they are loaded, {_CONVERT}"
            hint = others if file == WEIGHTS else ", expected a model that open_clip wrote"
            raise InputError(f"--clip {name}: has no {file}{hint}") from None
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"--clip {name}: {file} cannot be fetched ({reason}); where there is a network, hf"
            f" download {repository} {CONFIG} {WEIGHTS} --local-dir FOLDER, then --clip"
            f" {LOCAL}FOLDER"
        ) from None


def _read_config(name: str, file: Path) -> tuple[dict[str, Any], Preprocessing]:
    """What a config says of the model, and of its pictures."""
    try:
        values = read_json(file)
    except InputError as error:
        raise InputError(f"--clip {name}: {error}") from None
    config = values.get("model_cfg") if isinstance(values, Mapping) else None
    parts = [config.get(part) for part in ("vision_cfg", "text_cfg")] if config else []
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        raise InputError(
            f"--clip {name}: {CONFIG} is not open_clip's (expected model_cfg with vision_cfg and"
            " text_cfg)"
        )
    refuse_foreign_towers(name, config)
    return dict(config), _preprocessing(name, config, values.get("preprocess_cfg") or {})


def _tokenizer(name: str, text: Mapping[str, Any]) -> open_clip.SimpleTokenizer:
    """CLIP's own tokenizer, with a text tower's options."""
    if foreign := text.get("hf_tokenizer_name"):
        raise InputError(
            f"--clip {name}: not supported: its tokenizer is Hugging Face's {foreign}, expected"
            " CLIP's own"
        )
    tokenizer = open_clip.SimpleTokenizer(
        context_length=text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH),
        **text.get("tokenizer_kwargs", {}),
    )
    if (vocabulary := text.get("vocab_size", tokenizer.vocab_size)) < tokenizer.vocab_size:
        raise InputError(
            f"--clip {name}: not supported: its vocabulary has {vocabulary} tokens, CLIP's own"
            f" {tokenizer.vocab_size}"
        )
    return tokenizer


def _preprocessing(name: str, config: Mapping[str, Any], given: Mapping[str, Any]) -> Preprocessing:
    usual = Preprocessing(size=square_size(name, config["vision_cfg"]))
    looks = {key: given.get(key, getattr(usual, key)) for key in _LOOKS}
    try:
        return preprocessing_of(usual.size, **looks)
    except (TypeError, ValueError):
        shown = ", ".join(f"{key} {value}" for key, value in looks.items())
        raise InputError(
            f"--clip {name}: not supported: its pictures are prepared otherwise than these"
            f" transforms can ({shown})"
        ) from None


def _untrained(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The architecture with whatever weights its constructor draws."""
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    try:
        return kind(**arguments)
    except Exception as error:  # whatever the constructor met, the config is not one it knows
        reason = " ".join(str(error).split())[:160]
        version = importlib.metadata.version("open_clip_torch")
        raise InputError(
            f"--clip {name}: {CONFIG} is not what open_clip {version} builds ({reason})"
        ) from None
