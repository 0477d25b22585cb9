"""Methods by name: one file and one line here each."""

from lamp_fast.clip import FrozenClip
from lamp_fast.errors import InputError
from lamp_fast.methods.base import Method, RunClasses, Step, TrainingSet
from lamp_fast.methods.candle import Candle
from lamp_fast.methods.cocoop import CoCoOp
from lamp_fast.methods.coop import CoOp
from lamp_fast.methods.lamp import Lamp
from lamp_fast.methods.lfa import Lfa
from lamp_fast.methods.maple import MaPLe
from lamp_fast.methods.mma import Mma
from lamp_fast.methods.tcp import Tcp
from lamp_fast.methods.zeroshot import ZeroShot
from lamp_fast.runs.config import TrainConfig

METHODS: dict[str, type[Method]] = {
    "lamp": Lamp,
    "zeroshot": ZeroShot,
    "coop": CoOp,
    "cocoop": CoCoOp,
    "maple": MaPLe,
    "tcp": Tcp,
    "mma": Mma,
    "lfa": Lfa,
    "candle": Candle,
}


def build_method(
    clip: FrozenClip, config: TrainConfig, classes: RunClasses | None = None
) -> Method:
    """The method that ``config.method`` names, with fresh parameters.

    Args:
        clip: the frozen CLIP.
        config: the settings.
        classes: of the run; none where only the method's own parameters are of interest.

    Raises:
        InputError: an unknown name, settings that the CLIP cannot serve, or ``--logit-adjustment``
            where the method has no use for it.
    """
    if config.method not in METHODS:
        raise InputError(f"--method {config.method}: expected one of {', '.join(METHODS)}")
    kind = METHODS[config.method]
    if config.optim.logit_adjustment and kind.no_logit_adjustment:
        raise InputError(f"--logit-adjustment: {kind.no_logit_adjustment}")
    return kind.build(clip, config, classes or RunClasses())


__all__ = [
    "METHODS",
    "Candle",
    "CoCoOp",
    "CoOp",
    "Lamp",
    "Lfa",
    "MaPLe",
    "Method",
    "Mma",
    "RunClasses",
    "Step",
    "Tcp",
    "TrainingSet",
    "ZeroShot",
    "build_method",
]
