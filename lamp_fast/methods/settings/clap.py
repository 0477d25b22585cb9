"""Settings of ZS-LP and CLAP, and published values."""

from dataclasses import dataclass, replace
from typing import Annotated

from lamp_fast.fields import Bounds
from lamp_fast.methods.settings import MethodEntry, MethodSettings, Preset, sgd

_OPTIM = {**sgd(0.1, 300, 256), "weight_decay": 0.0}


@dataclass(frozen=True)
class ClapSettings(MethodSettings):
    """A linear probe on features that were computed once."""

    feature_views: Annotated[int, Bounds(1, 1000)] = 20
    """Random crops of each training picture to draw epochs from (one, as in testing, where crops
    would spoil it)."""


ZS_LP = MethodEntry(
    "clap.ZeroShotProbe",
    "ZS-LP",
    ClapSettings,
    presets={"zs-lp": Preset(_OPTIM)},
)

CLAP = replace(ZS_LP, model="clap.Clap", title="CLAP", presets={"clap": Preset(_OPTIM)})
