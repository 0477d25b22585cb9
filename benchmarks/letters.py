"""Drawn letters under a shift of domain: a data set on which nothing of this package was chosen.

The letters of fonts that pre-training never saw, turned further, drawn with a thicker pen, paler
and noisy. The shift was fixed by zero-shot CLIP alone, which it leaves between 60 and 90%.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from lamp_fast.data.pictures import Pictures
from lamp_fast.data.sources import DataSource, digits
from lamp_fast.pretrain import glyphs

TEMPLATE = "a photo of the letter {}."


# Wider angles and a thicker pen than any that pre-training drew.
DISTORTION = glyphs.Distortion(rotation=0.45, slant=0.5, stretch=0.25, bend=0.16, pen=(3.0, 5.0))


@dataclass(frozen=True)
class Shift:
    """What a picture goes through after the held-out drawing.

    Attributes:
        distortion: of the drawing.
        contrast: what is left of the ink's brightness.
        noise: standard deviation of the noise on every pixel, of a full range of 1.
    """

    distortion: glyphs.Distortion = DISTORTION
    contrast: float = 0.6
    noise: float = 0.08


def letters(
    train: int = 100, test: int = 40, shift: Shift | None = None, seed: int = 0
) -> DataSource:
    """The 25 letters of ``glyphs.LETTERS`` in ``glyphs.HELD_OUT_FONTS``.

    Args:
        train, test: pictures of each letter.
        shift: the one above by default.
        seed: of every drawing.
    """
    shift = shift or Shift()
    generator = torch.Generator().manual_seed(seed)
    shapes = glyphs.load_shapes(glyphs.HELD_OUT_FONTS)
    first = glyphs.CLASSES.index(glyphs.LETTERS[0])
    # Every letter in turn, so that a stretch of the list holds equally many of each.
    labels = torch.arange(len(glyphs.LETTERS)).repeat(train + test)
    chosen = shapes.choose(labels + first, generator)
    bitmaps = glyphs.draw(shapes, chosen, generator, shift.distortion)
    ink = digits.to_pictures(digits.block_counts(bitmaps.numpy()))[..., 0] / 255  # [N, 8, 8]
    noise = shift.noise * torch.randn(ink.shape, generator=generator).numpy()
    grey = np.clip(shift.contrast * ink + noise, 0, 1)
    arrays = np.repeat(np.round(255 * grey).astype(np.uint8)[..., None], 3, axis=-1)
    pictures = Pictures(
        names=tuple(f"letters/{index}" for index in range(len(labels))),
        labels=labels.numpy(),
        arrays=arrays,
    )
    ends = np.cumsum([0, train, test]) * len(glyphs.LETTERS)
    parts = [pictures.select(np.arange(low, high)) for low, high in pairwise(ends)]
    return DataSource(
        name="letters",
        classnames=glyphs.LETTERS,
        template=TEMPLATE,
        train=parts[0],
        val=pictures.select([]),
        test=parts[1],
        augment=False,
    )
