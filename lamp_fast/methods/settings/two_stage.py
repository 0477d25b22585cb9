"""Settings of 2SFS, and published values."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import Bounds
from lamp_fast.methods.settings import ADAMW_BY_STEPS, MethodEntry, Preset, SteppedSettings


@dataclass(frozen=True)
class TwoStageSettings(SteppedSettings):
    """2SFS: LayerNorms of both towers, then a vector a trained class."""

    steps_per_shot: Annotated[int, Bounds(1, 1_000_000)] = 300
    """With --epochs none: optimiser steps for each picture that a class has, in the mean over
    classes where they differ, of both stages; rounded to whole epochs. A number of --epochs is
    taken instead."""
    first_stage: Annotated[float, Bounds(0, 1)] = 0.6
    """Share of the epochs that train the LayerNorms, rounded to whole ones; the second stage has
    at least one."""
    outer_norms: bool = True
    """Also train the LayerNorms outside the blocks (the image tower's first and last, the text
    tower's last), as the paper intends; off is what its code does."""


TWO_STAGE = MethodEntry(
    "two_stage.TwoStage",
    "2SFS",
    TwoStageSettings,
    presets={"2sfs": Preset(ADAMW_BY_STEPS)},
)
