"""Settings become a CLIP and a method."""

from collections.abc import Mapping
from typing import Any

import torch

from lamp_fast.clip import FrozenClip, load_clip, warn_if_random
from lamp_fast.errors import InputError
from lamp_fast.methods import METHODS, Method, RunClasses, Surroundings
from lamp_fast.runs.config import TrainConfig

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
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
        InputError: settings that the CLIP cannot serve, or of the loss where the method has its
            own.
    """
    kind, optim = METHODS[config.method], config.optim
    for flag, given in (
        ("--logit-adjustment", optim.logit_adjustment),
        (f"--loss {optim.loss}", optim.loss != "ce"),
        ("--class-weights", optim.class_weights != "none"),
    ):
        if given and kind.own_loss is not None:
            raise InputError(f"{flag}: {kind.own_loss}")
    surroundings = Surroundings(
        classes=classes or RunClasses(),
        trimming=config.trim,
        path=config.machine.path,
        epochs=config.optim.epochs,
        tau=config.optim.tau,
    )
    return kind.build(clip, config.own, surroundings)


def build_clip(config: TrainConfig, recorded: Mapping[str, Any] | None = None) -> FrozenClip:
    """The frozen CLIP of a run whose machine is resolved; random weights are warned of.

    ``recorded`` is the CLIP of the run's record, where there is one: it decides how weights are
    used, wherever they lie now.

    Raises:
        InputError: see :func:`load_clip`.
    """
    clip = load_clip(
        config.clip.clip,
        config.clip.pretrained,
        weights_of=config.clip.weights_of,
        recorded=recorded,
        init_seed=config.clip.init_seed,
        device=config.machine.device,
        dtype=DTYPES[config.machine.precision],
        fold=config.trim.fold_quick_gelu,
    )
    warn_if_random(clip.identity)
    return clip
