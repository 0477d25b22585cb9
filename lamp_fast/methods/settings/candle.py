"""Settings of Candle, and published values."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import Bounds
from lamp_fast.methods.settings import MethodEntry, MethodSettings, Preset, sgd


@dataclass(frozen=True)
class CandleSettings(MethodSettings):
    """Candle: prototypes of both kinds and attention between them."""

    prototype_scale: Annotated[float, Bounds(0, 1_000_000)] = 1.0
    """Logit scale against visual prototypes, in units of CLIP's."""
    fusion_heads: Annotated[int, Bounds(1, 16_384)] = 8
    """Attention heads."""
    fusion_dropout: Annotated[float, Bounds(0, below=1)] = 0.1
    """Dropout of attention weights in training."""


CANDLE = MethodEntry(
    "candle.Candle",
    "Candle",
    CandleSettings,
    no_ensemble=None,
    presets={"candle": Preset(sgd(3e-4, 50, 128))},
    own_loss="Candle's own loss compensates the class sizes already",
)
