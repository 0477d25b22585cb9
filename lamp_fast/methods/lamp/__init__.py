"""LAMP: the paper's method."""

from lamp_fast.methods.lamp.model import Lamp

__all__ = ["Lamp"]
