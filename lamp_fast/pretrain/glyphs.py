"""Pictures of glyphs that pass for scans of handwriting, and captions for them.

A glyph of a font is thinned to its centre line. Drawing bends the line and inks it with a pen of
some width, which makes shapes closer to handwriting than any type is. What comes out is a 32 x 32
bitmap that the drawing fills, as UCI's normalised scans are, and it is brought through the
same block counting and test transform as they are.
"""

import functools
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from torch import Generator, Tensor
from torch.nn.functional import grid_sample

from lamp_fast.data.sources import digits
from lamp_fast.data.transforms import Preprocessing, evaluation_transform
from lamp_fast.pretrain.settings import LETTERS

BITMAP_SIZE = 32
PICTURE_SIZE = 32

TRAINING_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "cmb10",
    "cmmi10",
    "cmr10",
)
HELD_OUT_FONTS = ("DejaVuSerif-Bold", "STIXGeneralBolIta", "cmss10", "cmtt10")

# How people write digits where type does not: a round nought, a one without its foot or flag, a
# flat-topped three, an open four, a barred seven, a nine with a straight stem. Characters of one
# form are drawn over one another.
_FORMS = {digit: (digit,) for digit in string.digits} | {
    "0": ("0", "O"),
    "1": ("1", "\N{DIVIDES}", "\N{UPWARDS HARPOON WITH BARB LEFTWARDS}"),
    "3": ("3", "\N{LATIN CAPITAL LETTER EZH}"),
    "4": ("4", "\N{CYRILLIC CAPITAL LETTER CHE}"),
    "7": ("7", "7\N{MINUS SIGN}"),
    "9": ("9", "q"),
}
# These letters are digits once they fill their box.
_LIKE_DIGITS = "Ilq"

CLASSES = (*digits.NAMES, *LETTERS)
"""Class c is digit c for c < 10, a letter after that."""

DIGIT_TEMPLATES = (
    digits.TEMPLATE,
    "a photo of the number {}.",
    "a photo of {}.",
    "a scan of the digit {}.",
    "a scan of a handwritten {}.",
    "a picture of a {}.",
    "a drawing of the number {}.",
    "an image of the handwritten digit {}.",
    "a photo of the handwritten number {}.",
    "the digit {}.",
    "the number {}",
    "handwritten {}",
    "{}.",
    "{}",
)
LETTER_TEMPLATES = tuple(
    template.replace("digit", "letter").replace("number", "letter") for template in DIGIT_TEMPLATES
)
HELD_OUT_TEMPLATES = (
    "a photo of a {}.",
    "a picture of the digit {}.",
    "the handwritten number {}.",
)

_CANVAS = 64
_GLYPH = 44
"""Height of a glyph on its canvas in pixels, or its width where that is larger."""


@dataclass(frozen=True)
class Shapes:
    """Centre lines of glyphs.

    Attributes:
        distance: from each point of the canvas to the nearest centre line, in canvas pixels,
            float32 [S, 64, 64].
        classes: index into ``CLASSES``, int64 [S].
    """

    distance: Tensor
    classes: Tensor

    @functools.cached_property
    def of_class(self) -> tuple[Tensor, ...]:
        """For each class the indices of its shapes."""
        return tuple((self.classes == index).nonzero()[:, 0] for index in range(len(CLASSES)))

    def choose(self, classes: Tensor, generator: Generator) -> Tensor:
        """A random shape of each class: int64 [N] of classes -> int64 [N] of shapes."""
        draws = torch.rand(len(classes), generator=generator).tolist()
        chosen = []
        for index, draw in zip(classes.tolist(), draws, strict=True):
            shapes = self.of_class[index]
            chosen.append(shapes[int(draw * len(shapes))])
        return torch.stack(chosen)


@dataclass(frozen=True)
class Distortion:
    """How far a drawing may stray from its centre line; every draw is uniform or normal.

    Attributes:
        rotation: largest angle either way, in radians.
        slant: largest horizontal shear either way.
        stretch: standard deviation of the logarithm of width over height.
        bend: standard deviation of the elastic displacement, in half canvases.
        pen: smallest and largest half width of a stroke, in canvas pixels.
        fill: how much of its own aspect ratio a drawing narrower than its box keeps, smallest and
            largest; 0 stretches it to the box's width.
    """

    rotation: float = 0.2
    slant: float = 0.4
    stretch: float = 0.2
    bend: float = 0.13
    pen: tuple[float, float] = (1.5, 3.6)
    fill: tuple[float, float] = (0.4, 1.0)


HELD_OUT_DISTORTION = Distortion(rotation=0.25, slant=0.5, stretch=0.25, bend=0.16)
"""Stronger than training's: people's hands differ from type by more than training dares."""


@functools.cache
def load_shapes(fonts: tuple[str, ...]) -> Shapes:
    """The centre lines of every class in some of matplotlib's fonts; a missing glyph is skipped.

    Args:
        fonts: names of files in matplotlib's ``fonts/ttf``, without the suffix.
    """
    ink, classes = [], []
    for name in fonts:
        path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
        characters = FT2Font(str(path)).get_charmap()
        font = ImageFont.truetype(str(path), 2 * _GLYPH)
        for index, forms in enumerate(_forms_of_classes()):
            for form in forms:
                if all(ord(character) in characters for character in form):
                    ink.append(_render(font, form))
                    classes.append(index)
    distance = [distance_transform_edt(~line) for line in thin(np.stack(ink))]
    return Shapes(torch.from_numpy(np.stack(distance)).float(), torch.tensor(classes))


def draw(
    shapes: Shapes, indices: Tensor, generator: Generator, distortion: Distortion | None = None
) -> Tensor:
    """Draw distorted glyphs.

    Args:
        shapes: what to draw from.
        indices: which of them, int64 [N].
        generator: the only source of chance.
        distortion: the default's if None.

    Returns:
        bool [N, 32, 32], set where there is ink; the ink touches top and bottom, or both sides.
    """
    distortion = distortion or Distortion()
    count = len(indices)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle = uniform(-distortion.rotation, distortion.rotation)
    slant = uniform(-distortion.slant, distortion.slant)
    stretch = torch.exp(distortion.stretch * torch.randn(count, generator=generator))
    cosine, sine = angle.cos(), angle.sin()
    rotation = torch.stack([cosine, -sine, sine, cosine], -1).view(count, 2, 2)
    one, zero = torch.ones(count), torch.zeros(count)
    shear = torch.stack([stretch, slant, zero, one], -1).view(count, 2, 2)
    linear = rotation @ shear  # [N, 2, 2]
    bend = distortion.bend * torch.randn(count, 2, 4, 4, generator=generator)
    pen = uniform(*distortion.pen)[:, None, None]
    distance = shapes.distance[indices][:, None]

    def inked(points: Tensor) -> Tensor:  # [N, H, W, 2], x before y -> bool [N, H, W]
        # The elastic field spans more than the canvas, which a slanted glyph may leave.
        moved = grid_sample(bend, points / 1.5, "bicubic", "border", align_corners=True)
        source = torch.einsum("nij,nhwj->nhwi", linear, points) + moved.permute(0, 2, 3, 1)
        sampled = grid_sample(distance, source, "bilinear", "border", align_corners=False)
        return sampled[:, 0] < pen

    reach = 1.4
    coarse = inked(_square(_CANVAS).mul(reach).expand(count, -1, -1, -1))
    low_x, high_x = _extent(coarse.any(dim=1))
    low_y, high_y = _extent(coarse.any(dim=2))
    half_x, half_y = reach * (high_x - low_x) / 2, reach * (high_y - low_y) / 2
    kept = uniform(*distortion.fill)
    box = torch.maximum(half_x, half_y)
    half = torch.stack([half_x ** (1 - kept) * box**kept, half_y ** (1 - kept) * box**kept], dim=-1)
    centre = reach * torch.stack([low_x + high_x, low_y + high_y], dim=-1) / 2
    return inked(_square(BITMAP_SIZE) * half[:, None, None] + centre[:, None, None])


def scan(bitmaps: Tensor) -> Tensor:
    """What a CLIP sees of bitmaps: bool [N, 32, 32] -> float32 [N, 3, 32, 32]."""
    pictures = digits.to_pictures(digits.block_counts(bitmaps.numpy()))  # uint8 [N, 8, 8, 3]
    return _transform()(torch.from_numpy(pictures).permute(0, 3, 1, 2))


def captions(classes: Sequence[int], generator: Generator, numerals: float = 0.2) -> list[str]:
    """A random caption of each class; a digit is called by its numeral with chance ``numerals``."""
    choices = torch.rand(len(classes), 2, generator=generator).tolist()
    texts = []
    for index, (template, numeral) in zip(classes, choices, strict=True):
        is_digit = index < len(digits.NAMES)
        templates = DIGIT_TEMPLATES if is_digit else LETTER_TEMPLATES
        name = str(index) if is_digit and numeral < numerals else CLASSES[index]
        texts.append(templates[int(template * len(templates))].format(name))
    return texts


def all_captions() -> list[str]:
    """Every caption that :func:`captions` can draw."""
    named = [*digits.NAMES, *string.digits]
    return [template.format(name) for template in DIGIT_TEMPLATES for name in named] + [
        template.format(letter) for template in LETTER_TEMPLATES for letter in LETTERS
    ]


def thin(ink: np.ndarray) -> np.ndarray:
    """Thin strokes to lines a pixel wide (Zhang and Suen, 1984): bool [N, H, W] -> the same.

    Ink on the outermost pixels is taken as absent.
    """
    line = np.pad(ink[:, 1:-1, 1:-1], ((0, 0), (1, 1), (1, 1)))
    active = np.arange(len(line))
    while len(active):
        before = line[active]
        after = before.copy()
        for first in (True, False):
            after &= ~_removable(after, first)
        line[active] = after
        active = active[(before != after).any(axis=(1, 2))]
    return line


def _removable(line: np.ndarray, first: bool) -> np.ndarray:
    # Neighbours clockwise from north, as the paper's P2 to P9.
    offsets = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
    ring = [np.roll(line, (-dy, -dx), axis=(1, 2)) for dy, dx in offsets]
    count = sum(each.astype(np.int8) for each in ring)
    rises = sum(
        (~each & following).astype(np.int8)
        for each, following in zip(ring, [*ring[1:], ring[0]], strict=True)
    )
    north, east, south, west = ring[0::2]
    if first:
        kept = (north & east & south) | (east & south & west)
    else:
        kept = (north & east & west) | (north & south & west)
    return line & (count >= 2) & (count <= 6) & (rises == 1) & ~kept


def _forms_of_classes() -> list[tuple[str, ...]]:
    letters = (
        tuple(each for each in (letter, letter.upper()) if each not in _LIKE_DIGITS)
        for letter in LETTERS
    )
    return [*_FORMS.values(), *letters]


def _render(font: ImageFont.FreeTypeFont, form: str) -> np.ndarray:
    """A form in the middle of its canvas, bool [64, 64]."""
    page = Image.new("L", (4 * _CANVAS, 4 * _CANVAS))
    for character in form:
        ImageDraw.Draw(page).text(
            (2 * _CANVAS, 2.5 * _CANVAS), character, fill=255, font=font, anchor="ms"
        )
    glyph = page.crop(page.getbbox())
    scale = _GLYPH / max(glyph.size)
    size = tuple(max(3, round(side * scale)) for side in glyph.size)
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    corner = tuple((_CANVAS - side) // 2 for side in size)
    canvas.paste(glyph.resize(size, Image.Resampling.BOX), corner)
    return np.asarray(canvas) > 127


@functools.cache
def _square(size: int) -> Tensor:
    """Pixel centres of the square [-1, 1] x [-1, 1], float32 [1, size, size, 2], x before y."""
    centres = (2 * torch.arange(size) + 1) / size - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1)[None]


def _extent(inked: Tensor) -> tuple[Tensor, Tensor]:
    """Outer edges of the first and last set pixel, in -1..1: bool [N, size] -> two of [N]."""
    size = inked.shape[1]
    first = inked.int().argmax(dim=1)
    last = size - inked.flip(1).int().argmax(dim=1)
    return 2 * first / size - 1, 2 * last / size - 1


@functools.cache
def _transform():
    return evaluation_transform(Preprocessing(size=PICTURE_SIZE))
