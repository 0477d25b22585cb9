"""Settings of Tip-Adapter and Tip-Adapter-F, and published values."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import Bounds, FloatOrNone, IntOrNone
from lamp_fast.methods.settings import MethodEntry, MethodSettings, Preset

# Random crops show at least half of a picture.
VIEWS = {"crop_area": 0.5}


@dataclass(frozen=True)
class TipSettings(MethodSettings):
    """Tip-Adapter: a cache of training features."""

    tip_alpha: Annotated[FloatOrNone, Bounds(0, 1_000_000)] = None
    """Weight of the cache beside the class texts; none searches it on the validation pictures."""
    tip_beta: Annotated[FloatOrNone, Bounds(0, 1_000_000)] = None
    """Sharpness: a picture counts exp(-beta (1 - cosine)); none searches it on the validation
    pictures."""
    tip_balanced: bool = False
    """Weigh each class's pictures by mean class size / class size, so that a large class has no
    advantage (not published; without effect where classes have one size)."""
    tip_passes: Annotated[int, Bounds(1, 100_000)] = 10
    """Random crops of each training picture, whose mean feature is its key."""

    @property
    def uses_validation(self) -> bool:
        return None in (self.tip_alpha, self.tip_beta)


@dataclass(frozen=True)
class TipFSettings(TipSettings):
    """Tip-Adapter-F: a cache of training features, trained."""

    tip_views: Annotated[IntOrNone, Bounds(1, 100_000)] = None
    """Random crops of each picture to train on, one an epoch, then again from the first; none
    takes as many as epochs."""


TIP = MethodEntry(
    "tip.Tip",
    "Tip-Adapter",
    TipSettings,
    no_ensemble=None,
    presets={"tip": Preset(views=VIEWS)},
    own_loss="Tip-Adapter trains nothing, so it has no loss to adjust",
)

TIP_F = MethodEntry(
    "tip.TipF",
    "Tip-Adapter-F",
    TipFSettings,
    presets={
        "tip-f": Preset(
            {
                "lr": 1e-3,
                "lr_per": "step",
                "eps": 1e-4,
                "weight_decay": 0.01,
                "epochs": 20,
                "batch": 256,
                "warmup_epochs": 0,
            },
            by_data={"eurosat": {"epochs": 100}},
            views=VIEWS,
        )
    },
)
