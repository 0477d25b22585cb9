"""Settings of PromptSRC, and published values."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import Bounds
from lamp_fast.methods.settings import MethodEntry, Preset, sgd
from lamp_fast.methods.settings.deep_prompts import DeepPromptSettings


@dataclass(frozen=True)
class PromptSrcSettings(DeepPromptSettings):
    """PromptSRC: prompts that regulate themselves."""

    text_weight: Annotated[float, Bounds(0, 1_000_000)] = 25.0
    """Weight of the mean distance of prompted from zero-shot text features, number by number."""
    image_weight: Annotated[float, Bounds(0, 1_000_000)] = 10.0
    """The same of image features."""
    gpa_mean: Annotated[float, Bounds(-1_000_000, 1_000_000)] = 15.0
    """The epoch, from 1, whose weights count most in the average that a run ends with."""
    gpa_std: Annotated[float, Bounds(above=0, high=1_000_000)] = 1.0
    """Over how many epochs around it that average reaches."""


PROMPTSRC = MethodEntry(
    "promptsrc.PromptSrc",
    "PromptSRC",
    PromptSrcSettings,
    presets={
        "promptsrc": Preset(sgd(2.5e-3, 20, 4)),
        "promptsrc-all": Preset(
            sgd(2.5e-3, 50, 4),
            {"gpa_mean": 30.0, "gpa_std": 30.0},
            own_by_data={
                data: {"gpa_mean": 45.0, "gpa_std": 5.0}
                for data in ("stanford_cars", "flowers102", "fgvc_aircraft", "dtd", "eurosat")
            },
        ),
        "promptsrc-source": Preset(
            sgd(2.5e-3, 20, 4), {"depth": 3, "gpa_mean": 6.0, "gpa_std": 10.0}
        ),
    },
    own_prompt=True,
    no_selection="PromptSRC's result is an average of the weights of all epochs, not one of them",
)
