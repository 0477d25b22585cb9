"""Loading a CLIP: the carried one, open_clip's models with a tag or a file, a folder's, random."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from lamp_fast.cli import expand_path
from lamp_fast.clip import model_folder, tiny
from lamp_fast.clip.settings import RANDOM, TINY, in_folder
from lamp_fast.clip.towers import ClipIdentity, FrozenClip, activation_of
from lamp_fast.clip.usage import (
    OF_TAG,
    Usage,
    file_usage,
    picture_size,
    recognised_tag,
    recorded_usage,
    tag_usage,
)
from lamp_fast.clip.weights import fingerprint, is_torchscript, load_weights
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.errors import InputError

_CARRIED = "carried by the package"


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
        name: "tiny" (carried by the package), an open_clip model name, or where a folder is that
            open_clip wrote (see :mod:`lamp_fast.clip.model_folder`).
        pretrained: a tag of that model, a file with a state dict (``.safetensors``, or ``.pt``
            loaded without unpickling code), or "random" for weights drawn with ``init_seed``; for
            a model of a folder, where that folder is now.
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
    if name == TINY:
        if pretrained is not None:
            raise InputError(f"--pretrained {pretrained}: the tiny CLIP brings its own weights")
        model, weights = tiny.load_tiny(), _CARRIED
        tokenizer = open_clip.tokenizer.SimpleTokenizer()
        preprocessing = Preprocessing(size=picture_size(name))
    elif in_folder(name):
        model, weights, preprocessing, tokenizer = model_folder.load(name, pretrained)
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
    model_folder.refuse_foreign_towers(name, open_clip.get_model_config(name))
    if pretrained == RANDOM:
        usage = usage or tag_usage(name, {})
        return (
            _random_clip(name, usage, init_seed),
            f"random (seed {init_seed})",
            usage.preprocessing,
        )
    if open_clip.pretrained.is_pretrained_cfg(name, pretrained):
        tag = open_clip.get_pretrained_cfg(name, pretrained)
        usage = usage or tag_usage(name, tag)
        file, weights = _download(name, pretrained, tag), f"{pretrained}{OF_TAG}"
    else:
        file, weights = expand_path(pretrained), str(pretrained)
        if not file.is_file():
            raise InputError(
                f"--pretrained {pretrained}: neither a file nor a tag of {name}"
                f" ({', '.join(tags) or 'none known'})"
            )
        _refuse_torchscript(name, file)
        usage = usage or file_usage(name, file, weights_of)
    model = _untrained(name, usage)
    load_weights(model, file, f"--pretrained {pretrained}")
    return model, weights, usage.preprocessing


def _check_name(name: str) -> None:
    if name not in open_clip.list_models():
        near = [each for each in open_clip.list_models() if each.lower() == name.lower()]
        hint = f"; did you mean {near[0]}?" if near else "; open_clip.list_models() lists them"
        raise InputError(f"--clip {name}: not tiny nor an open_clip model{hint}")


def _check_weights_of(name: str, pretrained: str | None, weights_of: str) -> None:
    """A tag of the model, for a file."""
    if in_folder(name):
        raise InputError(f"--weights-of {weights_of}: --clip {name} says how it is used")
    if name != TINY:
        _check_name(name)
    tags = [] if name == TINY else open_clip.list_pretrained_tags_by_model(name)
    if pretrained in (None, RANDOM, *tags):
        given = "" if pretrained is None else f", not {pretrained}"
        raise InputError(f"--weights-of {weights_of}: expected --pretrained with a file{given}")
    if weights_of not in tags:
        known = ", ".join(tags) or "none known"
        raise InputError(f"--weights-of {weights_of}: expected a tag of {name} ({known})")


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
            f"--clip {name}: its weights {tag} cannot be fetched ({reason}); where there is a"
            f" network, {_how_to_fetch(config)}, then give that file here: --pretrained FILE"
            f" --weights-of {tag} (--clip tiny needs none, but only tries the pipeline)"
        ) from None


def _how_to_fetch(config: Mapping[str, Any]) -> str:
    """The command that brings a tag's weights as safetensors, or where they lie."""
    repository, _, file = config.get("hf_hub", "").rpartition("/")
    if not repository:
        return f"download {config.get('url')}"
    return f"hf download {repository} {file or model_folder.WEIGHTS} --local-dir ."


def _refuse_torchscript(name: str, file: Path) -> None:
    if not is_torchscript(file):
        return
    tag = recognised_tag(name, file) or "openai"
    raise InputError(
        f"--pretrained {file}: a TorchScript archive as OpenAI ships it; convert it once:"
        " torch.save(torch.jit.load(FILE, 'cpu').state_dict(), 'clip.pt'), then --pretrained"
        f" clip.pt --weights-of {tag}"
    )


def _tokenizer(name: str):
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"--clip {name}: its tokenizer cannot be loaded ({reason})") from None
