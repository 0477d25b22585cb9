"""The frozen CLIP: its towers, where its weights come from, and class prompts as its tokens."""

from lamp_fast.clip.features import FeatureReader, unprojected_features
from lamp_fast.clip.load import load_clip
from lamp_fast.clip.prompts import (
    ClassPrompts,
    ClassTokens,
    TextForest,
    TokenForest,
    Trimming,
    check_distinct,
    class_prompts,
    plant,
    tokenise,
    whole_prompts,
)
from lamp_fast.clip.settings import ClipConfig, caution
from lamp_fast.clip.towers import (
    Block,
    ClipIdentity,
    FrozenClip,
    TextTower,
    VisionTower,
    activation_of,
    at_least_float32,
    check_supported,
    last_cls,
    through,
)
from lamp_fast.clip.usage import completed_record
from lamp_fast.clip.weights import fingerprint

__all__ = [
    "Block",
    "ClassPrompts",
    "ClassTokens",
    "ClipConfig",
    "ClipIdentity",
    "FeatureReader",
    "FrozenClip",
    "TextForest",
    "TextTower",
    "TokenForest",
    "Trimming",
    "VisionTower",
    "activation_of",
    "at_least_float32",
    "caution",
    "check_distinct",
    "check_supported",
    "class_prompts",
    "completed_record",
    "fingerprint",
    "last_cls",
    "load_clip",
    "plant",
    "through",
    "tokenise",
    "unprojected_features",
    "whole_prompts",
]
