"""Settings of CLIP-Adapter, and published values."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import Bounds
from lamp_fast.methods.settings import MethodEntry, MethodSettings, Preset, sgd


@dataclass(frozen=True)
class ClipAdapterSettings(MethodSettings):
    """CLIP-Adapter: a bottleneck beside the image feature."""

    adapter_ratio: Annotated[float, Bounds(0, 1)] = 0.2
    """Share of the bottleneck's output in the adapted feature; the rest is CLIP's own."""
    adapter_views: Annotated[int, Bounds(1, 100_000)] = 10
    """Random crops of each training picture, one an epoch, then again from the first."""


CLIP_ADAPTER = MethodEntry(
    "clip_adapter.ClipAdapter",
    "CLIP-Adapter",
    ClipAdapterSettings,
    no_ensemble=None,
    presets={"clip-adapter": Preset(sgd(1e-2, 300, 32))},
)
