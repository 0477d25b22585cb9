"""Settings of prompts in the first layers of both towers."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import MAX_LAYER, Bounds
from lamp_fast.methods.settings.coop import ContextSettings


@dataclass(frozen=True)
class DeepPromptSettings(ContextSettings):
    """Prompts in the first layers of both towers."""

    depth: Annotated[int, Bounds(1, MAX_LAYER)] = 9
    """Layers with prompts of their own, from the first; cut to the shallower tower."""
