"""Settings of MaPLe, and published values."""

from dataclasses import dataclass

from lamp_fast.methods.settings import MethodEntry, Preset, sgd
from lamp_fast.methods.settings.deep_prompts import DeepPromptSettings


@dataclass(frozen=True)
class MapleSettings(DeepPromptSettings):
    """MaPLe."""


MAPLE = MethodEntry(
    "maple.MaPLe",
    "MaPLe",
    MapleSettings,
    presets={
        "maple": Preset(sgd(3.5e-3, 5, 4), {"n_ctx": 2}),
        "maple-source": Preset(sgd(2.6e-3, 2, 4), {"n_ctx": 2, "depth": 3}),
    },
    own_prompt=True,
)
