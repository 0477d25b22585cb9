"""Settings of PromptLT, and published values."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import MAX_LAYER, Bounds, Layers
from lamp_fast.methods.settings import MethodEntry, MethodSettings, Preset
from lamp_fast.methods.settings.lamp import LampSettings

# Width inside the projectors.
HIDDEN = 32


_IMAGENET = {"imagenet": {"lr": 1e-3, "epochs": 5, "batch": 32}}


@dataclass(frozen=True)
class PromptLtSettings(MethodSettings):
    """PromptLT: shared prompts, and one of each class group's."""

    shared: Annotated[int, Bounds(1, 4096)] = 2
    """Prompts of each layer that both towers share."""
    groups: Annotated[int, Bounds(1, 4096)] = 3
    """Extra prompts of each layer and tower, of which each query has one: for many, medium and few
    pictures, in the authors' minds."""
    d: Annotated[int, Bounds(1, 4096)] = 32
    """Width of the prompts before projection."""
    layers: Annotated[Layers, Bounds(1, MAX_LAYER)] = tuple(range(3, 13))
    """Layers with prompts, from 1; the published ones are cut to the shallower tower."""

    def in_lamps_words(self) -> LampSettings:
        """The same in LAMP's words: its pool is the groups."""
        sizes = {"k": 1, "m": self.groups, "s": self.shared, "d": self.d}
        return LampSettings(**sizes, phi="mlp", phi_hidden=HIDDEN, layers=self.layers)


PROMPTLT = MethodEntry(
    "promptlt.PromptLt",
    "PromptLT",
    PromptLtSettings,
    presets={
        "promptlt": Preset({"lr": 3e-3, "epochs": 50, "batch": 4}, by_data=_IMAGENET),
        "promptlt-all": Preset({"lr": 1e-3, "epochs": 50, "batch": 32}, by_data=_IMAGENET),
        "promptlt-source": Preset({"lr": 1e-3, "epochs": 1, "batch": 32}),
    },
)
