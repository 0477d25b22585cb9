"""Settings of ProLIP, and published values."""

from dataclasses import dataclass
from typing import Annotated, Literal

from lamp_fast.fields import Bounds, FloatOrNone
from lamp_fast.methods.settings import MethodEntry, MethodSettings, Preset


@dataclass(frozen=True)
class ProLipSettings(MethodSettings):
    """ProLIP; --epochs counts its full-batch steps."""

    prolip_views: Annotated[int, Bounds(1, 1_000_000)] = 300
    """Random crops of each training picture, one a step, in turn; one, as in testing, where crops
    would spoil it. The run costs one image forward of every crop, but for those in the cache."""
    prolip_lambda: Annotated[FloatOrNone, Bounds(0, 1_000_000)] = None
    """How much the projection is held to CLIP's own; none is 1 / pictures a class, with a long tail
    their mean."""
    prolip_map: Literal["projection", "residual"] = "projection"
    """What is trained: CLIP's projection, or (RLA) a square map behind it that starts at the
    identity."""


PROLIP = MethodEntry(
    "prolip.ProLip",
    "ProLIP",
    ProLipSettings,
    no_ensemble=None,
    presets={
        "prolip": Preset(
            {
                "optimiser": "adam",
                "lr": 1e-5,
                "eps": 1e-4,
                "weight_decay": 0.0,
                "epochs": 300,
                "warmup_epochs": 0,
                "batch": 1 << 20,
            },
            views={"crop_area": 0.5},
        )
    },
)
