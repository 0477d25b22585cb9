"""Methods by name: one file and one line here each."""

from lamp_fast.clip import FrozenClip
from lamp_fast.config import TrainConfig
from lamp_fast.errors import InputError
from lamp_fast.methods.base import Method, Step
from lamp_fast.methods.lamp import Lamp
from lamp_fast.methods.zeroshot import ZeroShot

METHODS = {
    "lamp": lambda clip, config: Lamp(clip, config.lamp, config.machine.path, config.trim),
    "zeroshot": lambda clip, config: ZeroShot(clip),
}


def build_method(clip: FrozenClip, config: TrainConfig) -> Method:
    """The method that ``config.method`` names, with fresh parameters.

    Raises:
        InputError: an unknown name.
    """
    if config.method not in METHODS:
        raise InputError(f"--method {config.method}: expected one of {', '.join(METHODS)}")
    return METHODS[config.method](clip, config)


__all__ = ["METHODS", "Lamp", "Method", "Step", "ZeroShot", "build_method"]
