"""Settings of LFA, and published values."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import Bounds, FloatOrNone
from lamp_fast.methods.settings import MethodEntry, MethodSettings, Preset


@dataclass(frozen=True)
class LfaSettings(MethodSettings):
    """LFA: linear feature alignment; --epochs counts its iterations."""

    procrustes_beta: Annotated[FloatOrNone, Bounds(0, 1_000_000)] = 0.9
    """How far the closed-form start is drawn to the identity; none cross-validates it on the
    training set."""
    neighbours: Annotated[int, Bounds(1, 1_000_000)] = 3
    """Nearest classes that the re-ranking loss looks at."""
    feature_noise: Annotated[float, Bounds(0, 1_000_000)] = 0.035
    """Standard deviation of the noise on every second iteration's features."""
    feature_dropout: Annotated[float, Bounds(0, below=1)] = 0.05
    """Share of every second iteration's features that is dropped."""


_ADAMW = {"lr": 5e-4, "lr_end": 1e-7, "warmup_epochs": 0, "batch": 1 << 20}


# Iterations: base-to-new, and on every class.
_ITERATIONS = {
    "caltech101": (40, 1000),
    "dtd": (100, 1000),
    "eurosat": (50, 100),
    "fgvc_aircraft": (100, 1000),
    "flowers102": (50, 100),
    "food101": (50, 100),
    "imagenet": (100, 200),
    "oxford_pets": (10, 30),
    "stanford_cars": (50, 2000),
    "sun397": (50, 100),
    "ucf101": (100, 200),
}


_BASE_NEW, _ALL = (
    {data: {"epochs": both[which]} for data, both in _ITERATIONS.items()} for which in (0, 1)
)


LFA = MethodEntry(
    "lfa.Lfa",
    "LFA",
    LfaSettings,
    no_ensemble=None,
    presets={
        "lfa": Preset({**_ADAMW, "epochs": 50}, by_data=_BASE_NEW),
        "lfa-all": Preset({**_ADAMW, "epochs": 200}, {"procrustes_beta": None}, by_data=_ALL),
    },
    own_loss="LFA's loss compares distances and has no logits to adjust",
)
