"""Contrastive pre-training of the tiny CLIP that the package carries.

    python -m lamp_fast.pretrain --out DIR

Pairs are drawn on the fly: a glyph that :mod:`lamp_fast.pretrain.glyphs` draws, and a caption of
it. Each step has several groups. A group holds every digit once and some letters once, so no two of
its captions name the same thing: open_clip's loss, which takes every other pair of a batch for a
negative, is computed within each group and meets no false negative.

The seed decides the result: the same seed, threads and machine give the same weights.
"""

from lamp_fast import cli
from lamp_fast.fields import validate
from lamp_fast.pretrain.settings import PretrainConfig


def main(config: PretrainConfig) -> None:
    """Pre-train, print scores on held-out glyphs, write the weights."""
    validate(config)
    from lamp_fast.pretrain import train

    train.main(config)


if __name__ == "__main__":
    cli.run(PretrainConfig, main, prog="python -m lamp_fast.pretrain", description=__doc__)
