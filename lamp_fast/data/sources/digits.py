"""Handwritten digits (UCI, as scikit-learn ships them): the data set of the default run.

A scan was digitised by UCI at 32 x 32 black and white points and counted in 4 x 4 blocks, which
gives 8 x 8 values in 0..16 (Alpaydin and Kaynak, 1998). The package's own pre-training renders
glyphs and brings them through the same counting, so both kinds of picture share this module.
"""

import numpy as np

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATE = "a photo of the digit {}."


def block_counts(bitmap: np.ndarray) -> np.ndarray:
    """Count the set points of 4 x 4 blocks: bool [..., 32, 32] -> uint8 [..., 8, 8] in 0..16."""
    *batch, height, width = bitmap.shape
    blocks = bitmap.reshape(*batch, height // 4, 4, width // 4, 4)
    return blocks.sum(axis=(-3, -1), dtype=np.uint8)


def to_pictures(counts: np.ndarray) -> np.ndarray:
    """Turn counts [N, 8, 8] in 0..16 into RGB pictures, uint8 [N, 8, 8, 3], white ink on black."""
    grey = np.round(np.asarray(counts, dtype=np.float64) * (255 / 16)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)
