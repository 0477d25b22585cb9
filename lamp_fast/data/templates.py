"""Named sets of templates for class names, by which the field's methods are defined.

Of CLIP's eighty for ImageNet: the seven that its authors chose from them, which Tip-Adapter, LFA
and CLAP take there, and the sixty whose mean PromptSRC stays close to.
"""

from collections.abc import Callable

IMAGENET_7 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

PROMPTSRC_60 = (
    "a bad photo of a {}.", "a bad photo of the {}.",
    "a black and white photo of the {}.",
    "a blurry photo of a {}.", "a blurry photo of the {}.",
    "a bright photo of a {}.", "a bright photo of the {}.",
    "a cartoon {}.",
    "a close-up photo of a {}.", "a close-up photo of the {}.",
    "a cropped photo of a {}.", "a cropped photo of the {}.",
    "a dark photo of the {}.",
    "a doodle of a {}.", "a doodle of the {}.",
    "a drawing of a {}.",
    "a embroidered {}.", "the embroidered {}.",
    "a good photo of the {}.",
    "a jpeg corrupted photo of a {}.",
    "a low resolution photo of a {}.", "a low resolution photo of the {}.",
    "a origami {}.", "the origami {}.",
    "a painting of a {}.", "a painting of the {}.",
    "a photo of a {}.", "a photo of the {}.",
    "a photo of a clean {}.", "a photo of the clean {}.",
    "a photo of a dirty {}.", "a photo of the dirty {}.",
    "a photo of a hard to see {}.", "a photo of the hard to see {}.",
    "a photo of a large {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a photo of many {}.",
    "a photo of my {}.",
    "a photo of one {}.",
    "a photo of the cool {}.",
    "a pixelated photo of a {}.",
    "a plastic {}.", "the plastic {}.",
    "a rendering of a {}.", "a rendering of the {}.",
    "a rendition of a {}.", "a rendition of the {}.",
    "a sculpture of a {}.", "a sculpture of the {}.",
    "a sketch of a {}.", "a sketch of the {}.",
    "a tattoo of a {}.",
    "a {} in a video game.", "the {} in a video game.",
    "art of a {}.",
    "graffiti of a {}.",
    "itap of the {}.",
    "the toy {}.",
    "a pixelated photo of the {}.",
)  # fmt: skip


def openai_80() -> tuple[str, ...]:
    """CLIP's eighty, as open_clip has them."""
    # Here, because it takes seconds.
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


SETS: dict[str, Callable[[], tuple[str, ...]]] = {
    "imagenet-7": lambda: IMAGENET_7,
    "promptsrc-60": lambda: PROMPTSRC_60,
    "openai-80": openai_80,
}
