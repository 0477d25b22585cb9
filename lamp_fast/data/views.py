"""Which squares of its pictures a run trains on and is tested on."""

import re
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from lamp_fast.data.transforms import (
    LEAST_AREA,
    CentreCrop,
    FiveCrops,
    MinimalistCrop,
    Preprocessing,
    RandomCrop,
    Views,
)
from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds

MAX_SIDE = 65_536
# For five crops the shorter side is scaled to 248 where the CLIP takes 224, and in proportion.
EXPANSION = (24, 224)
# What commands that use a run say of its test-time ensemble, and what they mean.
Tte = Literal["as-trained", "on", "off"]
TTE: dict[str, bool | None] = {"as-trained": None, "on": True, "off": False}


def _read_resize(arguments: list[str]) -> int | str | None:
    word = arguments[0].lower()
    if word == "none":
        return None
    return int(word) if word.isdecimal() else word


Resize = Annotated[
    int | str | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|A/B|none",
        instance_from_str=_read_resize,
        is_instance=lambda value: value is None or isinstance(value, (int, str)),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    ),
]


@dataclass(frozen=True)
class ViewConfig:
    """How pictures are cropped."""

    augment: Literal["auto", "standard", "minimalist", "none"] = "auto"
    """Of training pictures: standard is a random crop of random shape; minimalist (LIFT+) a random
    square, never mirrored, that shows more from epoch to epoch; none is the test crop. auto is
    standard, but none for data that crops would spoil (digits)."""
    crop_area: Annotated[float, Bounds(above=0, high=1)] = LEAST_AREA
    """The least share of a picture that a random crop shows."""
    flip: bool = True
    """Mirror half of the training pictures, with --augment standard."""
    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    """How pictures are scaled, in training and testing; auto as the CLIP's own."""
    test_resize: Annotated[Resize, Bounds(1, MAX_SIDE)] = None
    """What a test picture's shorter side is scaled to before its centre is cut out: pixels, or as
    8/7 of what the CLIP takes; none is just that."""
    tte: bool = False
    """Test-time ensemble: the mean of the logits of four corners and the centre, of pictures scaled
    to 248 where the CLIP takes 224, and in proportion; five times the work. --test-resize has then
    no part in testing."""

    def check_together(self) -> None:
        """Refuse a size that is none.

        Raises:
            InputError: naming it.
        """
        if isinstance(self.test_resize, str) and self._ratio is None:
            raise InputError(
                f"--test-resize {self.test_resize}: expected pixels, a ratio from 1 to 16 such as"
                " 8/7, or none"
            )

    @property
    def _ratio(self) -> tuple[int, int] | None:
        found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", str(self.test_resize), re.ASCII)
        if found is None:
            return None
        above, below = map(int, found.groups())
        return (above, below) if 0 < below <= above <= 16 * below else None

    def describe(self) -> str:
        """What differs from the defaults, on one line."""
        plain = vars(ViewConfig())
        return " ".join(
            f"{name}={value}" for name, value in vars(self).items() if value != plain[name]
        )

    def check_size(self, size: int) -> None:
        """Refuse a ``test_resize`` that leaves less than a CLIP takes.

        Args:
            size: what it takes, in pixels.

        Raises:
            InputError: naming both.
        """
        if isinstance(self.test_resize, int) and self.test_resize < size:
            raise InputError(
                f"--test-resize {self.test_resize}: expected at least {size}, which the CLIP takes"
            )

    def preprocessing(self, own: Preprocessing) -> Preprocessing:
        """A CLIP's own, or the same with another filter."""
        if self.interpolation == "auto":
            return own
        return replace(own, interpolation=self.interpolation)

    def training(self, size: int, epochs: int, *, croppable: bool) -> Views:
        """The views of training pictures.

        Args:
            size: what the CLIP takes, in pixels.
            epochs: of the run.
            croppable: whether random crops leave the classes what they are; for "auto".
        """
        augment = self.augment
        if augment == "auto":
            augment = "standard" if croppable else "none"
        if augment == "minimalist":
            return MinimalistCrop(epochs, self.crop_area)
        return RandomCrop(self.crop_area, self.flip) if augment == "standard" else self.centre(size)

    def testing(self, size: int) -> Views:
        """The view, or the five views, of test pictures; ``size`` as in :meth:`training`."""
        if not self.tte:
            return self.centre(size)
        expansion, of = EXPANSION
        return FiveCrops(size + round(size * expansion / of))

    def centre(self, size: int) -> CentreCrop:
        """The one view of a picture that is deterministic; ``size`` as in :meth:`training`."""
        if self._ratio is not None:
            above, below = self._ratio
            return CentreCrop(size * above // below)
        return CentreCrop(self.test_resize)
