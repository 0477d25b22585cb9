"""The frozen CLIP: its towers, where its weights come from, and class prompts as its tokens."""

from lamp_fast.clip.load import (
    ClipConfig,
    activation_of,
    completed_record,
    fingerprint,
    load_clip,
    warn_if_random,
)
from lamp_fast.clip.prompts import (
    ClassTokens,
    TokenForest,
    Trimming,
    check_distinct,
    plant,
    tokenise,
)
from lamp_fast.clip.towers import (
    Block,
    ClipIdentity,
    FrozenClip,
    TextTower,
    VisionTower,
    at_least_float32,
    check_supported,
    through,
)

__all__ = [
    "Block",
    "ClassTokens",
    "ClipConfig",
    "ClipIdentity",
    "FrozenClip",
    "TextTower",
    "TokenForest",
    "Trimming",
    "VisionTower",
    "activation_of",
    "at_least_float32",
    "check_distinct",
    "check_supported",
    "completed_record",
    "fingerprint",
    "load_clip",
    "plant",
    "through",
    "tokenise",
    "warn_if_random",
]
