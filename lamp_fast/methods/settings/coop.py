"""Settings of CoOp, and published values."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import Bounds, TextOrNone
from lamp_fast.methods.settings import MethodEntry, MethodSettings, Preset, sgd


@dataclass(frozen=True)
class ContextSettings(MethodSettings):
    """Learned context words."""

    n_ctx: Annotated[int, Bounds(1, 1000)] = 4
    """How many tokens of the class prompt are learned, right behind bot."""
    ctx_init: TextOrNone = "a photo of a"
    """Words that the class prompt begins with and whose embeddings start the learned tokens; none
    draws them from N(0, 0.02^2)."""


_IMAGENET = {"imagenet": {"epochs": 50}}


COOP = MethodEntry(
    "coop.CoOp",
    "CoOp",
    ContextSettings,
    own_prompt=True,
    presets={
        "coop": Preset(sgd(2e-3, 200, 32), by_data=_IMAGENET),
        "coop-all": Preset(
            sgd(2e-3, 200, 32),
            {"n_ctx": 16, "ctx_init": None},
            by_data=_IMAGENET,
            by_shots={1: {"epochs": 50}, 2: {"epochs": 100}, 4: {"epochs": 100}},
        ),
        "coop-source": Preset(sgd(2e-3, 50, 32)),
    },
)
