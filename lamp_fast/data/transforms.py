"""Picture transforms: what the peers' protocol does, through torchvision.

A transform takes an RGB picture as uint8 [3, H, W]. On the CPU it returns float32 [3, size, size],
or [5, 3, size, size] of five crops; for a device it only packs the pixels that are needed, and
:mod:`lamp_fast.data.resample` does the rest for a whole batch. Both look at the same :class:`View`
of the picture, or at five, which :class:`Views` choose.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from lamp_fast.data.settings import LEAST_AREA

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# The shape of a random crop, as the peers draw it.
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


class Views:
    """Which squares of a picture are shown.

    What is random draws from torch's global generator, which the data set seeds for every picture.
    """

    def for_epoch(self, epoch: int) -> "Views":
        """Those of an epoch, from 0."""
        return self

    def __call__(self, picture: Tensor, preprocessing: Preprocessing) -> tuple[View, ...]:
        """One view, or five, of a picture uint8 [3, H, W]."""
        raise NotImplementedError


@dataclass(frozen=True)
class RandomCrop(Views):
    """A random crop scaled to the square, perhaps mirrored every other time.

    It draws what v2.RandomResizedCrop and v2.RandomHorizontalFlip draw, in their order.

    Attributes:
        least_area: the crop's share of the picture is drawn between this and 1.
        flip: mirror half of the pictures.
    """

    least_area: float = LEAST_AREA
    flip: bool = True

    def __call__(self, picture: Tensor, preprocessing: Preprocessing) -> tuple[View, ...]:
        area = (self.least_area, 1.0)
        crop = v2.RandomResizedCrop.get_params(picture, area, ASPECT_RATIO)
        size = preprocessing.size
        return (View(crop, (size, size), flip=self.flip and bool(torch.rand(1) < 0.5)),)


@dataclass(frozen=True)
class MinimalistCrop(Views):
    """A random square that is never mirrored, and that shows more from epoch to epoch.

    LIFT+ (Shi et al. 2025): the square's share of the picture is uniform in [s, 1], both capped by
    that of the largest square; over epochs e = 0..E-1
    s = a + (1 - a) (1 - sqrt(1 - (e / (E - 1))^2)), and s = a where E = 1.

    Attributes:
        epochs: E.
        least_area: a.
        epoch: e.
    """

    epochs: int
    least_area: float = LEAST_AREA
    epoch: int = 0

    def for_epoch(self, epoch: int) -> "MinimalistCrop":
        return replace(self, epoch=epoch)

    @property
    def share(self) -> float:
        """s."""
        done = min(1.0, self.epoch / (self.epochs - 1)) if self.epochs > 1 else 0.0
        return self.least_area + (1 - self.least_area) * (1 - math.sqrt(1 - done**2))

    def __call__(self, picture: Tensor, preprocessing: Preprocessing) -> tuple[View, ...]:
        height, width = picture.shape[-2:]
        largest = min(height, width) ** 2 / (height * width)
        low, high = min(self.share, largest), min(1.0, largest)
        share = torch.empty(1).uniform_(low, high).item()
        side = max(1, round(math.sqrt(share * height * width)))
        top, left = (int(torch.randint(0, each - side + 1, (1,))) for each in (height, width))
        return (View((top, left, side, side), (preprocessing.size, preprocessing.size)),)


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


def _scaled(height: int, width: int, shorter: int) -> tuple[int, int]:
    # The longer side is truncated to whole pixels, as in torchvision.
    least = min(height, width)
    return int(shorter * height / least), int(shorter * width / least)


def _central(scaled: tuple[int, int], size: int) -> tuple[int, int]:
    # Rounded, as in torchvision.
    return round((scaled[0] - size) / 2.0), round((scaled[1] - size) / 2.0)


@dataclass(frozen=True)
class CentreCrop(Views):
    """What v2.Resize and v2.CenterCrop show of a test picture; of a thin one, of its middle.

    Attributes:
        resize: what the shorter side is scaled to, or both where the CLIP squashes; None for the
            CLIP's own size.
    """

    resize: int | None = None

    def __call__(self, picture: Tensor, preprocessing: Preprocessing) -> tuple[View, ...]:
        height, width = picture.shape[-2:]
        shorter = self.resize or preprocessing.size
        crop, scaled = (0, 0, height, width), (shorter, shorter)
        if preprocessing.resize_mode != "squash":
            crop = middle(height, width)
            scaled = _scaled(*crop[2:], shorter)
        return (View(crop, scaled, _central(scaled, preprocessing.size)),)


@dataclass(frozen=True)
class FiveCrops(Views):
    """What v2.Resize and v2.FiveCrop show: top left, top right, bottom left, bottom right, centre.

    The shorter side is scaled also where the CLIP squashes. Of a thin picture each crop is taken
    from the end that it is at, or from the middle.

    Attributes:
        resize: what the shorter side is scaled to; None for the CLIP's own size.
    """

    resize: int | None = None

    def __call__(self, picture: Tensor, preprocessing: Preprocessing) -> tuple[View, ...]:
        size = preprocessing.size
        top, left, height, width = middle(*picture.shape[-2:])
        scaled = _scaled(height, width, self.resize or size)
        below, beside = picture.shape[-2] - height, picture.shape[-1] - width
        corners = (
            View(
                (bottom * below, right * beside, height, width),
                scaled,
                (bottom * (scaled[0] - size), right * (scaled[1] - size)),
            )
            for bottom, right in ((0, 0), (0, 1), (1, 0), (1, 1))
        )
        return (*corners, View((top, left, height, width), scaled, _central(scaled, size)))


class HostTransform:
    """The views of a picture, normalised, all of it on the host.

    Args:
        preprocessing: of the CLIP.
        views: which.
    """

    def __init__(self, preprocessing: Preprocessing, views: Views) -> None:
        self.preprocessing, self.views = preprocessing, views
        self._normalise = v2.Compose(
            [
                # Resized pictures come with the channel innermost, which normalising takes 4 times
                # as long.
                v2.Lambda(torch.Tensor.contiguous),
                v2.ToDtype(torch.float32, scale=True),
                # In place, in the fresh tensor that the conversion from uint8 made.
                v2.Normalize(list(preprocessing.mean), list(preprocessing.std), inplace=True),
            ]
        )

    def for_epoch(self, epoch: int) -> "HostTransform":
        """The transform of an epoch, from 0."""
        return with_views(self, self.views.for_epoch(epoch))

    def __call__(self, picture: Tensor) -> Tensor:
        """uint8 [3, H, W] -> float32 [3, size, size], or [5, 3, size, size]."""
        squares = cut(picture, self.views(picture, self.preprocessing), self.preprocessing)
        return self._normalise(squares[0] if len(squares) == 1 else torch.stack(squares))


def with_views(transform, views: Views):
    """The same kind of transform with other views."""
    if views is transform.views:
        return transform
    other = copy.copy(transform)
    other.views = views
    return other


def cut(picture: Tensor, views: Sequence[View], preprocessing: Preprocessing) -> list[Tensor]:
    """The views of a picture as torchvision scales them: each uint8 [3, size, size]."""
    mode, size = InterpolationMode(preprocessing.interpolation), preprocessing.size
    squares, scaled = [], {}
    for view in views:
        key = view.crop, view.scaled
        if key not in scaled:  # the crops of a picture that is not thin share it
            top, left, height, width = view.crop
            crop = picture[..., top : top + height, left : left + width]
            scaled[key] = functional.resize(crop, list(view.scaled), mode, antialias=True)
        top, left = view.corner
        square = scaled[key][..., top : top + size, left : left + size]
        squares.append(functional.horizontal_flip(square) if view.flip else square)
    return squares


def evaluation_transform(preprocessing: Preprocessing, resize: int | None = None) -> HostTransform:
    """The deterministic transform of a test picture: resize, centre crop, normalise.

    Bit for bit what torchvision's transforms of these names make of a picture that is not thin.
    """
    return HostTransform(preprocessing, CentreCrop(resize))


def five_crop_transform(preprocessing: Preprocessing, resize: int | None = None) -> HostTransform:
    """Four corners and the centre of the resized picture, centre last: [5, 3, size, size]."""
    return HostTransform(preprocessing, FiveCrops(resize))


def training_transform(preprocessing: Preprocessing) -> HostTransform:
    """The random transform of a training picture: see :class:`RandomCrop`; then normalise."""
    return HostTransform(preprocessing, RandomCrop())
