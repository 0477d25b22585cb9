"""How weights of a CLIP are meant to be used: activation and preprocessing.

The weights themselves do not say. A tag does, the run that used them, or a folder's own config.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip

from lamp_fast.clip import tiny
from lamp_fast.clip.settings import TINY
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.errors import InputError

OF_TAG = " (open_clip tag)"

# The sha256 of a tag's file, or how it begins, as open_clip reads them from addresses.
_SHA256_IN_ADDRESS = re.compile(r"/([0-9a-f]{64})/|-([0-9a-f]{8})\.pth?$")


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


def recorded_usage(clip: Mapping[str, Any]) -> Usage:
    """How a run used its CLIP, by the ``clip`` of its ``config.json``.

    Version 0.1.0 did not record the preprocessing: it was the tag's, and for a file the usual one.

    Raises:
        InputError: not such a record, or a tag that this open_clip does not know.
    """
    try:
        name, weights, activation = clip["name"], clip["weights"], clip["activation"]
        if "preprocessing" in clip:
            preprocessing = preprocessing_of(**clip["preprocessing"])
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


def preprocessing_of(
    size: int, mean: list[float], std: list[float], interpolation: str, resize_mode: str
) -> Preprocessing:
    """Preprocessing from JSON values.

    Raises:
        ValueError: one that is not what the transforms do.
    """
    fits = type(size) is int and len(mean) == len(std) == 3
    if not fits or not all(math.isfinite(each) for each in (*mean, *std)) or min(std) <= 0:
        raise ValueError
    if interpolation not in ("bicubic", "bilinear") or resize_mode not in ("shortest", "squash"):
        raise ValueError
    return Preprocessing(size, tuple(mean), tuple(std), interpolation, resize_mode)


def _preprocessing_before(name: str, weights: str) -> Preprocessing:
    if name == TINY:
        return Preprocessing(size=picture_size(name))
    if not weights.endswith(OF_TAG):
        return tag_usage(name, {}).preprocessing
    tag = weights.removesuffix(OF_TAG)
    if not open_clip.pretrained.is_pretrained_cfg(name, tag):
        raise InputError(f"config.json: the run used {name} with the tag {tag}, unknown here")
    return tag_usage(name, open_clip.get_pretrained_cfg(name, tag)).preprocessing


def tag_usage(name: str, tag: Mapping[str, Any]) -> Usage:
    """How open_clip uses a model's weights of some tag; of none, as the model's name says.

    Where a tag is silent it means GELU, whatever the model's name says: ViT-B-16 + openai is
    QuickGELU.
    """
    config = open_clip.get_model_config(name)
    quick = tag.get("quick_gelu", False) if tag else config.get("quick_gelu", False)
    known = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in tag}
    known |= {key: tuple(known[key]) for key in ("mean", "std") if key in known}
    preprocessing = Preprocessing(size=picture_size(name), **known)
    return Usage("quick_gelu" if quick else "gelu", preprocessing)


def file_usage(name: str, file: Path, weights_of: str | None) -> Usage:
    """As told, as recognised, or as the model's name says; warned of where that may be wrong."""
    tag = weights_of or recognised_tag(name, file)
    if tag is not None:
        return tag_usage(name, open_clip.get_pretrained_cfg(name, tag))
    usage = tag_usage(name, {})
    others = [tag for tag, each in _tags(name) if tag_usage(name, each) != usage]
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


def recognised_tag(name: str, file: Path) -> str | None:
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


def picture_size(name: str) -> int:
    """Side of a named model's pictures, see :func:`square_size`."""
    config = tiny.carried_config() if name == TINY else open_clip.get_model_config(name)
    return square_size(name, config["vision_cfg"])


def square_size(name: str, vision: Mapping[str, Any]) -> int:
    """Side of the pictures of an image tower's config.

    Raises:
        InputError: naming ``--clip``, pictures that are not square.
    """
    size = vision.get("image_size", 224)
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if type(size) is not int:
        raise InputError(f"--clip {name}: not supported: its pictures are {size}, not square")
    return size
