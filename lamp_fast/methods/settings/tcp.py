"""Settings of TCP, and published values."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import MAX_LAYER, Bounds
from lamp_fast.methods.settings import MethodEntry, Preset
from lamp_fast.methods.settings.coop import ContextSettings


@dataclass(frozen=True)
class TcpSettings(ContextSettings):
    """TCP: textual class-aware prompts."""

    knowledge_layer: Annotated[int, Bounds(1, MAX_LAYER)] = 9
    """The text layer, from 1, before which the learned tokens give way to class-aware ones: 9 of
    12; two thirds down in a text tower of another depth."""
    knowledge_weight: Annotated[float, Bounds(0, 1_000_000)] = 8.0
    """Weight of the distance between learned and zero-shot text features."""


TCP = MethodEntry(
    "tcp.Tcp",
    "TCP",
    TcpSettings,
    presets={
        "tcp": Preset(
            {"optimiser": "adam", "lr": 2e-3, "eps": 1e-3, "epochs": 50, "batch": 32},
            {"ctx_init": None},
            by_data={"imagenet": {"epochs": 25}, "sun397": {"epochs": 25}},
        )
    },
)
