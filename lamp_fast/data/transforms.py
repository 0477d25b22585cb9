"""Picture transforms: what the peers' protocol does, through torchvision.

A transform takes an RGB picture as uint8 [3, H, W]. On the CPU it returns float32 [3, size, size];
for a device it only packs the pixels that are needed, and :mod:`lamp_fast.data.resample` does the
rest for a whole batch. Both look at the same :class:`View` of the picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# Random crops, as the peers draw them.
AREA = (0.08, 1.0)
ASPECT_RATIO = (3 / 4, 4 / 3)

# A picture is thin where its longer side is more than this many times the shorter. Only its middle
# is scaled then: torchvision would scale all of a 60,000 x 1 picture to 13 million x 224.
THIN = 32


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


@dataclass(frozen=True)
class View:
    """The square that a network sees of a picture: crop, scale, cut a window out, mirror.

    Attributes:
        crop: top, left, height and width of the crop, in pixels of the picture.
        scaled: rows and columns that the crop is scaled to.
        corner: top and left of the window in the scaled crop.
        flip: left and right change places.
    """

    crop: tuple[int, int, int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int] = (0, 0)
    flip: bool = False


def draw_view(picture: Tensor, size: int) -> View:
    """A random crop of area 0.08..1 scaled to the square, mirrored every other time.

    Draws from torch's global generator what v2.RandomResizedCrop and v2.RandomHorizontalFlip draw,
    in their order; the data set seeds it for every picture.
    """
    crop = v2.RandomResizedCrop.get_params(picture, AREA, ASPECT_RATIO)
    return View(crop, (size, size), flip=bool(torch.rand(1) < 0.5))


def middle(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of what the square in the middle of a picture depends on.

    That is the picture itself, unless it is thin. Of a thin one :data:`THIN` times the shorter side
    is left, or one pixel more where only that keeps the middle in its place: far more than a
    filter reaches beyond the square.
    """
    longest = THIN * min(height, width)
    tall, wide = (
        side if side <= longest else longest + (side - longest) % 2 for side in (height, width)
    )
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def centre_view(picture: Tensor, preprocessing: Preprocessing) -> View:
    """What v2.Resize and v2.CenterCrop show of a test picture; of a thin one, of its middle."""
    height, width = picture.shape[-2:]
    size = preprocessing.size
    if preprocessing.resize_mode == "squash":
        return View((0, 0, height, width), (size, size))
    crop = middle(height, width)
    height, width = crop[2:]
    # The longer side is truncated to whole pixels, the corner rounded, as in torchvision.
    shorter = min(height, width)
    scaled = (int(size * height / shorter), int(size * width / shorter))
    corner = tuple(round((side - size) / 2.0) for side in scaled)
    return View(crop, scaled, corner)


def evaluation_transform(preprocessing: Preprocessing) -> Callable[[Tensor], Tensor]:
    """The deterministic transform of a test picture: resize, centre crop, normalise.

    Bit for bit what torchvision's transforms of these names make of a picture that is not thin.
    """
    size, mode = preprocessing.size, InterpolationMode(preprocessing.interpolation)
    if preprocessing.resize_mode == "squash":
        resize = [v2.Resize((size, size), mode, antialias=True)]
    else:
        resize = [_crop_middle, v2.Resize(size, mode, antialias=True), v2.CenterCrop(size)]
    return v2.Compose([*resize, *_to_normalised(preprocessing)])


def five_crop_transform(preprocessing: Preprocessing) -> v2.Transform:
    """Four corners and the centre of the resized picture, centre last: [5, 3, size, size]."""
    size, mode = preprocessing.size, InterpolationMode(preprocessing.interpolation)
    return v2.Compose(
        [
            _FiveCrops(v2.Compose([v2.Resize(size, mode, antialias=True), v2.FiveCrop(size)])),
            *_to_normalised(preprocessing),
        ]
    )


def training_transform(preprocessing: Preprocessing) -> Callable[[Tensor], Tensor]:
    """The random transform of a training picture: see :func:`draw_view`; then normalise."""
    return v2.Compose([_RandomView(preprocessing), *_to_normalised(preprocessing)])


class _RandomView:
    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, picture: Tensor) -> Tensor:
        view = draw_view(picture, self.preprocessing.size)
        mode = InterpolationMode(self.preprocessing.interpolation)
        picture = functional.resized_crop(picture, *view.crop, list(view.scaled), mode, True)
        return functional.horizontal_flip(picture) if view.flip else picture


def _crop_middle(picture: Tensor) -> Tensor:
    top, left, height, width = middle(*picture.shape[-2:])
    return picture[..., top : top + height, left : left + width]


class _FiveCrops:
    """Top left, top right, bottom left, bottom right and centre as one tensor.

    Of a thin picture each crop is taken from the end that it is at, or from the middle.

    Args:
        crops: gives the five of a picture that is not thin.
    """

    def __init__(self, crops: Callable[[Tensor], Sequence[Tensor]]) -> None:
        self.crops = crops

    def __call__(self, picture: Tensor) -> Tensor:
        _, _, height, width = middle(*picture.shape[-2:])
        first = self.crops(picture[..., :height, :width])
        if (height, width) == picture.shape[-2:]:
            return torch.stack(first)
        last = self.crops(picture[..., -height:, -width:])
        upper_right, lower_left = (last, first) if width > height else (first, last)
        centre = self.crops(_crop_middle(picture))
        return torch.stack([first[0], upper_right[1], lower_left[2], last[3], centre[4]])


def _to_normalised(preprocessing: Preprocessing) -> list[v2.Transform]:
    return [
        # Resized pictures come with the channel innermost, which normalising takes 4 times as long.
        v2.Lambda(torch.Tensor.contiguous),
        v2.ToDtype(torch.float32, scale=True),
        # In place, in the fresh tensor that the conversion from uint8 made.
        v2.Normalize(list(preprocessing.mean), list(preprocessing.std), inplace=True),
    ]
