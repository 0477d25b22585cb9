"""Settings of CoCoOp, and published values."""

from lamp_fast.methods.settings import MethodEntry, Preset, sgd
from lamp_fast.methods.settings.coop import ContextSettings

COCOOP = MethodEntry(
    "cocoop.CoCoOp",
    "CoCoOp",
    ContextSettings,
    own_prompt=True,
    presets={"cocoop": Preset(sgd(2e-3, 10, 1))},
)
