"""Settings of LIFT and LIFT+, and published values."""

from dataclasses import dataclass, replace
from typing import Annotated

from lamp_fast.fields import Bounds, IntOrNone
from lamp_fast.methods.settings import MethodEntry, MethodSettings, Preset, sgd


@dataclass(frozen=True)
class LiftSettings(MethodSettings):
    """LIFT: adapters beside the MLPs of the image tower, and a cosine classifier."""

    tuner_width: Annotated[IntOrNone, Bounds(1, 16_384)] = None
    """Width between an adapter's projections down and up; none is the largest power of two of at
    most C / (2 layers), C the trained classes."""


LIFT = MethodEntry(
    "lift.Lift",
    "LIFT",
    LiftSettings,
    own_prompt=True,
    no_new_names="the head has one row a trained class, and no other class has a score",
    presets={
        "lift": Preset(
            {**sgd(0.01, 10, 128, warmup_epochs=0), "logit_adjustment": True},
            by_data={"inaturalist2018": {"epochs": 20}},
            views={"interpolation": "bilinear", "test_resize": "8/7"},
        )
    },
)

LIFT_PLUS = replace(
    LIFT,
    model="lift.LiftPlus",
    title="LIFT+",
    presets={
        "lift+": Preset(
            {**sgd(0.02, 5, 128, warmup_epochs=0), "logit_adjustment": True},
            by_data={"inaturalist2018": {"epochs": 15}},
            views={"interpolation": "bicubic", "test_resize": "8/7", "augment": "minimalist"},
        )
    },
)
