"""Settings become a CLIP and a method."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from lamp_fast.clip.features import FeatureReader
from lamp_fast.clip.load import load_clip
from lamp_fast.clip.settings import caution
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.disk_cache import default_folder
from lamp_fast.data.feature_cache import FeatureCache
from lamp_fast.data.loading import Transform
from lamp_fast.data.resample import PackTransform
from lamp_fast.data.settings import ViewConfig
from lamp_fast.data.transforms import HostTransform, Views
from lamp_fast.data.views import used_preprocessing
from lamp_fast.data.words import Words
from lamp_fast.errors import InputError
from lamp_fast.methods import METHODS
from lamp_fast.methods.base import Method
from lamp_fast.methods.settings import MethodEntry
from lamp_fast.methods.surroundings import RunClasses, Surroundings
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.settings import MachineConfig

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
        InputError: settings that the CLIP cannot serve.
    """
    surroundings = Surroundings(
        classes=classes or RunClasses(),
        trimming=config.trim,
        path=config.machine.path,
        epochs=config.optim.epochs,
        tau=config.optim.tau,
    )
    return METHODS[config.method].load().build(clip, config.own, surroundings)


def refuse_ensemble(method: MethodEntry, words: Words) -> None:
    """Refuse several texts a class where the method reads one.

    Raises:
        InputError: with the method's own reason.
    """
    if method.no_ensemble is not None:
        flag = "--descriptions" if words.descriptions else "--template"
        raise InputError(
            f"{flag}: {words}: expected one --template, for {method.title} takes no mean of several"
            f" texts: {method.no_ensemble}"
        )


def build_transform(
    clip: FrozenClip, views: ViewConfig, machine: MachineConfig, shown: Views
) -> Transform:
    """What a resolved machine does to pictures before the tower: all of it, or the host's part."""
    kind = PackTransform if machine.transforms == "device" else HostTransform
    return kind(used_preprocessing(views, clip.preprocessing), shown)


def build_reader(clip: FrozenClip, machine: MachineConfig) -> FeatureReader:
    """What reads features on a resolved machine, through the cache unless there is none."""
    cache = None
    if machine.cache_size:
        cache = FeatureCache(default_folder(), round(machine.cache_size * 1e9))
    return FeatureReader(clip, cache, machine.test_batch, machine.workers)


def build_clip(config: TrainConfig, recorded: Mapping[str, Any] | None = None) -> FrozenClip:
    """The frozen CLIP of a run whose machine is resolved.

    ``recorded`` is the CLIP of the run's record, where there is one: it decides how weights are
    used, wherever they lie now.

    Raises:
        InputError: see :func:`load_clip`, or views that are not of its size.
    """
    chosen = config.clip.resolved(config.data.data)
    clip = load_clip(
        chosen.clip,
        chosen.pretrained,
        weights_of=chosen.weights_of,
        recorded=recorded,
        init_seed=chosen.init_seed,
        device=config.machine.device,
        dtype=DTYPES[config.machine.precision],
        fold=config.trim.fold_quick_gelu,
    )
    config.views.check_size(clip.preprocessing.size)
    return clip


def warn_of(clip: FrozenClip, data: str) -> None:
    """Warn where answers of a CLIP about a data set, by its name, mean nothing."""
    about = caution(clip.identity.name, clip.identity.random, data)
    if about is not None:
        warnings.warn(about, stacklevel=2)
