"""Crop, scale, mirror and normalise a batch of pictures of any sizes, on any device.

Scaling is separable, antialiased bicubic or bilinear, as torchvision's: every output column is a
weighted sum of input columns, then every output row one of rows, with 8 bits in between. A matrix
product would need all pictures padded to the largest; here each pass is one ``embedding_bag``,
which sums weighted rows of a table and asks nothing about which picture they are of. For the first
pass a table row is 64 pixels of one column and channel (so a picture is padded by at most 63 rows);
for the second it is one whole output row, already ``size`` wide. That makes some thirty launches a
batch, most of them tiny, whatever its pictures are; mirroring is the order of the first sums.

Only the pixels of the crop travel to the device, as uint8.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lamp_fast.data.transforms import Preprocessing, View, Views, cut, middle, with_views

# Pixels of a table row.
STRIP = 64
CHANNELS = 3
# How far the filters reach, in output pixels when scaling down, in input pixels when scaling up.
_REACH = {"bilinear": 1.0, "bicubic": 2.0}


class Packed(NamedTuple):
    """The pixels of a batch of pictures and what to make of them.

    Attributes:
        pixels: uint8 [strips, 64]; for each picture, channel and column of its crop, from top to
            bottom, the last strip padded.
        views: int64 [B, 7], or [5 B, 7] where all five of a picture follow one another: height and
            width of the crop, rows and columns that it is scaled to, top and left of the window,
            1 where it is mirrored.
        preprocessing: size, filter and normalisation.
        views_each: 1, or 5 of the same pixels.
    """

    pixels: Tensor
    views: Tensor
    preprocessing: Preprocessing
    views_each: int = 1


class PackTransform:
    """A transform for the host's part: uint8 [3, H, W] -> :class:`Packed` of this one picture.

    Args:
        preprocessing: of the CLIP.
        views: which are shown.
    """

    def __init__(self, preprocessing: Preprocessing, views: Views) -> None:
        self.preprocessing, self.views = preprocessing, views

    def for_epoch(self, epoch: int) -> "PackTransform":
        """The transform of an epoch, from 0."""
        return with_views(self, self.views.for_epoch(epoch))

    def __call__(self, picture: Tensor) -> Packed:
        views = self.views(picture, self.preprocessing)
        _, _, height, width = views[0].crop
        thin = middle(height, width)[2:] != (height, width)
        if thin or any(view.crop != views[0].crop for view in views):
            # Thin and squashed as a whole: as strips it could take 64 times its own size. Or five
            # crops from both ends of a thin one. Cut here, one below the other, they are windows
            # of one picture that is scaled by 1, which no filter changes.
            squares = cut(picture, views, self.preprocessing)
            size, picture = self.preprocessing.size, torch.cat(squares, dim=-2)
            whole = len(views) * size, size
            views = [View((0, 0, *whole), whole, (size * n, 0)) for n in range(len(views))]
        return pack(picture, views, self.preprocessing)


def pack(picture: Tensor, views: Sequence[View], preprocessing: Preprocessing) -> Packed:
    """One picture, uint8 [3, H, W], as a batch of one; its views have one crop."""
    top, left, height, width = views[0].crop
    pixels = np.zeros((CHANNELS, width, -(-height // STRIP) * STRIP), dtype=np.uint8)
    crop = picture[:, top : top + height, left : left + width]
    pixels[:, :, :height] = crop.numpy().transpose(0, 2, 1)
    facts = [[height, width, *each.scaled, *each.corner, int(each.flip)] for each in views]
    strips = torch.from_numpy(pixels).view(-1, STRIP)
    return Packed(strips, torch.tensor(facts), preprocessing, len(views))


def join(pictures: Sequence[Packed]) -> Packed:
    """Several batches as one."""
    pixels = torch.cat([each.pixels for each in pictures])
    return pictures[0]._replace(pixels=pixels, views=torch.cat([each.views for each in pictures]))


def resample(packed: Packed, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The normalised pictures.

    Args:
        packed: B pictures, on the host; from pinned memory they are copied asynchronously.
        device: where the work is done.
        dtype: of the result; it is computed in float32.

    Returns:
        [B, 3, size, size], or [B, 5, 3, size, size]. Within one step of 255 of torchvision's uint8
        result almost everywhere: its weights have fewer bits.
    """
    preprocessing, size = packed.preprocessing, packed.preprocessing.size
    reach = _REACH[preprocessing.interpolation]
    # Everything that shapes depend on is decided on the host, so that nothing waits for the device.
    taps_x = _most_taps(packed.views[:, 1], packed.views[:, 3], reach)
    taps_y = _most_taps(packed.views[:, 0], packed.views[:, 2], reach)
    groups = int(CHANNELS * (-(-packed.views[:, 0] // STRIP)).sum())
    views = packed.views.to(device, non_blocking=True)
    table = packed.pixels.to(device, non_blocking=True).float()
    height, width, rows, columns, top, left, flip = views.unbind(1)
    strips = -(-height // STRIP)

    # A group is one picture, channel and strip; they come in this order.
    groups_of = CHANNELS * strips
    # Where a view's pixels begin.
    sharing = packed.views_each
    begin = _start((groups_of * width)[::sharing]).repeat_interleave(sharing)
    picture = torch.repeat_interleave(groups_of, output_size=groups)  # [G]
    within = torch.arange(groups, device=device) - _start(groups_of)[picture]
    channel, strip = within // strips[picture], within % strips[picture]
    first = begin[picture] + channel * (width * strips)[picture] + strip

    index, weight = _taps(width, columns, left, flip, size, taps_x, reach)  # [B, size, taps]
    index = first[:, None, None] + index[picture] * strips[picture, None, None]
    scaled = _weighted_sums(table, index, weight[picture])  # [G, size, STRIP]
    scaled = scaled.round_().clamp_(0, 255).mT.reshape(groups * STRIP, size)

    index, weight = _taps(height, rows, top, torch.zeros_like(flip), size, taps_y, reach)
    start = STRIP * (
        _start(groups_of)[:, None] + torch.arange(CHANNELS, device=device) * strips[:, None]
    )
    index = start[:, :, None, None] + index[:, None]  # [B, 3, size, taps]
    scaled = _weighted_sums(scaled, index, weight[:, None].expand_as(index))
    scaled = scaled.round_().clamp_(0, 255)  # [B, 3, size, size]
    gain = [1 / (255 * std) for std in preprocessing.std]
    shift = [-mean / std for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)]
    gain, shift = (_constant(values, device) for values in (gain, shift))
    pictures = torch.addcmul(shift, scaled, gain).to(dtype)
    return pictures if sharing == 1 else pictures.unflatten(0, (-1, sharing))


def _most_taps(pixels: Tensor, scaled: Tensor, reach: float) -> int:
    """The most input pixels that an output pixel depends on; sides int64 [B] on the host."""
    spans = 2 * reach * (pixels / scaled).clamp(min=1)
    return int(torch.minimum(spans.ceil() + 1, pixels.double()).max()) if len(pixels) else 1


def _taps(
    pixels: Tensor, scaled: Tensor, corner: Tensor, flip: Tensor, size: int, taps: int, reach: float
) -> tuple[Tensor, Tensor]:
    """Along one side: which input pixels each output pixel is a sum of, int64, and float32 weights.

    Both are [B, size, taps]; the definition is that of torchvision's antialiased interpolation.

    Args:
        pixels: int64 [B], length of the side.
        scaled: int64 [B], what it is scaled to.
        corner: int64 [B], the first scaled pixel that is wanted.
        flip: int64 [B], 1 where they are wanted in reverse.
    """
    out = torch.arange(size, device=pixels.device)
    out = torch.where(flip[:, None] == 1, size - 1 - out, out) + corner[:, None]  # [B, size]
    step = pixels.double() / scaled
    centre = step[:, None] * (out + 0.5)
    widening = step.clamp(min=1)[:, None]
    first = (centre - reach * widening + 0.5).floor().clamp(min=0)
    end = torch.minimum((centre + reach * widening + 0.5).floor(), pixels[:, None].double())
    at = first[..., None] + torch.arange(taps, device=pixels.device)  # [B, size, taps]
    distance = (at - centre[..., None] + 0.5) / widening[..., None]
    weight = _filter(distance.abs(), reach).masked_fill(at >= end[..., None], 0)
    weight = weight / weight.sum(-1, keepdim=True)
    return torch.minimum(at.long(), pixels[:, None, None] - 1), weight.float()


def _filter(distance: Tensor, reach: float) -> Tensor:
    """The triangle, or Keys' cubic with a = -0.5, of distances from 0."""
    x = distance
    if reach == 1.0:
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = -0.5 * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, far.masked_fill(x >= 2, 0))


def _weighted_sums(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """[..., taps] of rows of a table [N, D] -> their weighted sums [..., D]."""
    shape = (*index.shape[:-1], table.shape[1])
    sums = F.embedding_bag(
        index.flatten(0, -2), table, mode="sum", per_sample_weights=weight.flatten(0, -2)
    )
    return sums.view(shape)


def _start(lengths: Tensor) -> Tensor:
    """Where each of some consecutive stretches begins."""
    return lengths.cumsum(0) - lengths


def _constant(values: Sequence[float], device: torch.device) -> Tensor:
    """[3, 1, 1], filled without a copy from the host."""
    filled = [torch.full((1, 1, 1), each, device=device) for each in values]
    return torch.cat(filled)
