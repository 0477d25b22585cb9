"""Picture transforms: what the peers' protocol does, through torchvision.

Every transform takes an RGB picture as uint8 [3, H, W] and returns float32 [3, size, size].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchvision.transforms import InterpolationMode, v2

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """What a CLIP expects of its pictures.

    Attributes:
        size: side of the square input, in pixels.
        mean, std: per channel, of values in 0..1.
        interpolation: "bicubic" or "bilinear".
        resize_mode: "shortest" scales the shorter side to ``size`` and crops the centre, "squash"
            scales both sides.
    """

    size: int
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"


def evaluation_transform(preprocessing: Preprocessing) -> v2.Transform:
    """The deterministic transform of a test picture: resize, centre crop, normalise."""
    size, mode = preprocessing.size, InterpolationMode(preprocessing.interpolation)
    if preprocessing.resize_mode == "squash":
        resize = [v2.Resize((size, size), mode, antialias=True)]
    else:
        resize = [v2.Resize(size, mode, antialias=True), v2.CenterCrop(size)]
    return v2.Compose([*resize, *_to_normalised(preprocessing)])


def five_crop_transform(preprocessing: Preprocessing) -> v2.Transform:
    """Four corners and the centre of the resized picture, centre last: [5, 3, size, size]."""
    size, mode = preprocessing.size, InterpolationMode(preprocessing.interpolation)
    return v2.Compose(
        [
            v2.Resize(size, mode, antialias=True),
            v2.FiveCrop(size),
            _Stack(),
            *_to_normalised(preprocessing),
        ]
    )


def training_transform(preprocessing: Preprocessing) -> v2.Transform:
    """The random transform of a training picture: resized crop of area 0.08..1, flip, normalise.

    Draws from torch's global generator; the data set seeds it for every picture.
    """
    mode = InterpolationMode(preprocessing.interpolation)
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                preprocessing.size, (0.08, 1.0), interpolation=mode, antialias=True
            ),
            v2.RandomHorizontalFlip(),
            *_to_normalised(preprocessing),
        ]
    )


class _Stack(v2.Transform):
    """Several crops as one tensor."""

    def forward(self, crops: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tuple(crops))


def _to_normalised(preprocessing: Preprocessing) -> list[v2.Transform]:
    return [
        # Resized pictures come with the channel innermost, which normalising takes 4 times as long.
        v2.Lambda(torch.Tensor.contiguous),
        v2.ToDtype(torch.float32, scale=True),
        # In place, in the fresh tensor that the conversion from uint8 made.
        v2.Normalize(list(preprocessing.mean), list(preprocessing.std), inplace=True),
    ]
