"""Which squares of its pictures a run trains on and is tested on, by its settings."""

from dataclasses import replace

from lamp_fast.data.settings import ViewConfig
from lamp_fast.data.transforms import (
    CentreCrop,
    FiveCrops,
    MinimalistCrop,
    Preprocessing,
    RandomCrop,
    Views,
)

# For five crops the shorter side is scaled to 248 where the CLIP takes 224, and in proportion.
EXPANSION = (24, 224)


def used_preprocessing(config: ViewConfig, own: Preprocessing) -> Preprocessing:
    """A CLIP's own, or the same with another filter."""
    if config.interpolation == "auto":
        return own
    return replace(own, interpolation=config.interpolation)


def training_views(config: ViewConfig, size: int, epochs: int, *, croppable: bool) -> Views:
    """The views of training pictures.

    Args:
        config: of the run.
        size: what the CLIP takes, in pixels.
        epochs: of the run.
        croppable: whether random crops leave the classes what they are; for "auto".
    """
    augment = config.augment
    if augment == "auto":
        augment = "standard" if croppable else "none"
    if augment == "minimalist":
        return MinimalistCrop(epochs, config.crop_area)
    if augment == "standard":
        return RandomCrop(config.crop_area, config.flip)
    return centre_view(config, size)


def testing_views(config: ViewConfig, size: int) -> Views:
    """The view, or the five views, of test pictures; arguments as of :func:`training_views`."""
    if not config.tte:
        return centre_view(config, size)
    expansion, of = EXPANSION
    return FiveCrops(size + round(size * expansion / of))


def centre_view(config: ViewConfig, size: int) -> CentreCrop:
    """The one view of a picture that is deterministic; arguments as of :func:`training_views`."""
    if config.test_ratio is not None:
        above, below = config.test_ratio
        return CentreCrop(size * above // below)
    return CentreCrop(config.test_resize)
