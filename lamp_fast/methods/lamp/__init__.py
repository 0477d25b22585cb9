"""LAMP: the paper's method."""

from lamp_fast.methods.lamp.model import Lamp
from lamp_fast.methods.lamp.settings import LampSettings

__all__ = ["Lamp", "LampSettings"]
