"""Settings of MMA, and published values."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import MAX_LAYER, Bounds, Layers
from lamp_fast.methods.settings import MethodEntry, MethodSettings, Preset, sgd


@dataclass(frozen=True)
class MmaSettings(MethodSettings):
    """MMA: multi-modal adapters."""

    adapter_layers: Annotated[Layers, Bounds(1, MAX_LAYER)] = tuple(range(5, 13))
    """Layers with adapters, from 1; cut to the shallower tower."""
    adapter_width: Annotated[int, Bounds(1, 16_384)] = 32
    """Width between the projections down and up."""
    adapter_scale: Annotated[float, Bounds(above=0, high=1_000_000)] = 1e-3
    """What an adapter's output is multiplied by."""


MMA = MethodEntry(
    "mma.Mma",
    "MMA",
    MmaSettings,
    own_prompt=True,
    presets={
        "mma": Preset(sgd(1.5e-3, 5, 16, warmup_epochs=0), by_data={"imagenet": {"batch": 128}})
    },
)
