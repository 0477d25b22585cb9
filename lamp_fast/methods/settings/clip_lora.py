"""Settings of CLIP-LoRA, and published values."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import Bounds
from lamp_fast.methods.settings import ADAMW_BY_STEPS, MethodEntry, Preset, SteppedSettings


@dataclass(frozen=True)
class ClipLoraSettings(SteppedSettings):
    """CLIP-LoRA: low-rank changes of queries, keys and values in every block of both towers."""

    lora_rank: Annotated[int, Bounds(1, 16_384)] = 2
    """r: rank of each change."""
    lora_alpha: Annotated[float, Bounds(above=0, high=1_000_000)] = 1.0
    """A change is multiplied by this / sqrt(r)."""
    lora_dropout: Annotated[float, Bounds(0, below=1)] = 0.25
    """Share of each change's inputs that a training step drops."""


CLIP_LORA = MethodEntry(
    "clip_lora.ClipLora",
    "CLIP-LoRA",
    ClipLoraSettings,
    presets={"clip-lora": Preset(ADAMW_BY_STEPS)},
)
