"""How many numbers a method trains over a CLIP, without that CLIP's weights."""

from collections import Counter

import open_clip
import torch

from lamp_fast.clip import model_folder
from lamp_fast.clip.load import load_clip
from lamp_fast.clip.settings import TINY, in_folder
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.errors import InputError
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig


def parameter_lines(
    config: TrainConfig, new_classes: int = 0, trained_classes: int = 0
) -> list[str]:
    """``trainable parameters: N`` of the method and CLIP of ``config``, then N by part.

    Args:
        config: the settings; weights are neither needed nor made.
        new_classes: how many classes are tested without being trained on; Candle has parameters
            for each.
        trained_classes: how many are trained; LIFT has parameters for each.

    Raises:
        InputError: an unknown method or CLIP, or settings that do not fit.
    """
    base, new = (
        tuple(f"{half} class {number}" for number in range(1, count + 1))
        for half, count in (("trained", trained_classes), ("new", new_classes))
    )
    method = build_method(shapes_of(config.clip.clip), config, RunClasses(base, new))
    parts: Counter[str] = Counter()
    for name, each in method.named_parameters():
        parts[name.partition(".")[0]] += each.numel()
    total = f"trainable parameters: {method.trainable_parameters()}"
    return [total, *(f"  {part}: {count}" for part, count in parts.items())]


def shapes_of(name: str) -> FrozenClip:
    """A CLIP whose tensors have shapes and no values, except for the carried one.

    Raises:
        InputError: an unknown or unsupported model.
    """
    if name == TINY:
        return load_clip(name)
    if in_folder(name):
        return FrozenClip(model_folder.shell(name), Preprocessing(size=0))
    if name not in open_clip.list_models():
        raise InputError(f"--clip {name}: not tiny nor an open_clip model")
    with torch.device("meta"):
        model = open_clip.create_model(name, pretrained=None, device="meta")
    return FrozenClip(model, Preprocessing(size=0))
