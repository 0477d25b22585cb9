"""Settings of tokens that both towers share."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import MAX_LAYER, Bounds, Layers
from lamp_fast.methods.settings import MethodSettings


@dataclass(frozen=True)
class RepTokenSettings(MethodSettings):
    """Tokens that both towers share."""

    rep_layers: Annotated[Layers, Bounds(1, MAX_LAYER)] = tuple(range(6, 13))
    """Layers with tokens of their own, from 1: 6..12 of 12; the upper half where the shallower
    tower has another depth. Layers above the first of them that are not listed carry tokens on."""
    rep_tokens: Annotated[int, Bounds(1, 1000)] = 5
    """How many vectors both towers share."""
    rep_width: Annotated[int, Bounds(1, 65_536)] = 512
    """Their width."""
    rep_alpha: Annotated[float, Bounds(0, 1)] = 0.7
    """Share of the class token in loss and scores of trained classes; the tokens have the rest."""
    reg_weight: Annotated[float, Bounds(0, 1_000_000)] = 1.0
    """Weight of the cosine distances from zero-shot CLIP's features."""
