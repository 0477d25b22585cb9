"""What a job's result depends on, and the address that says it.

An address is the sha256 of:

- the settings that its method reads, after presets and defaults (so a preset's name is not in it,
  and one run serves every table that needs it). For zero-shot CLIP nothing that is drawn or trained
  counts, so five seeds are one job;
- the data: class names, template, and name, label and size of every picture. Not their bytes, for
  which 140 GB of ImageNet would have to be read before a job had a name; the run records the sha256
  of the bytes that it read, and a table says so where rows that should have seen the same did not;
- the CLIP: the fingerprint of its weights, its model name and its activation;
- the code: the sha256 over the sources that a result can depend on, see :func:`code_identity`.

Not in it, because nothing of it changes a result beyond rounding: device, threads, loading
processes, test batch, and the versions of Python and torch. They are in the run's ``config.json``.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import lamp_fast
from lamp_fast.clip.load import load_clip
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.clip.towers import ClipIdentity
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.settings import PLACES, DataConfig
from lamp_fast.fields import to_json
from lamp_fast.methods import METHODS
from lamp_fast.runs.config import TrainConfig, to_saved
from lamp_fast.runs.experiment import find_source

ZEROSHOT = "zeroshot"

# Settings that say where, how fast, or under which name, but not what.
_ASIDE = ("out", "resume", "overwrite", "config", "preset", "tensorboard", "union", "clip")
_ASIDE_OF = {"data": (*PLACES, "skip_unreadable"), "trim": ("block",)}
# Of the machine, which changes no result beyond rounding: rounding itself, and what is timed.
_MACHINE = ("precision", "path")
# Without training there is no seed, no long tail and no optimiser.
_UNTRAINED = ("seed", "optim", "selection")
_UNTRAINED_OF = {"data": ("imb", "cap", "shots"), "views": ("augment", "crop_area", "flip")}

# Sources that no result depends on. What they decide is in the settings (config, the registry), is
# made of results (report), or comes after them; whatever is not listed counts.
_WITHOUT_INFLUENCE = (
    "cache", "classifier", "cli", "compare", "errors", "export", "fields", "info", "jobs",
    "predict", "pretrain", "report", "reproduce", "data/__main__", "data/chart", "data/describe",
    "data/names", "methods/__init__", "runs/config", "runs/figures", "runs/hub", "runs/stats",
    "runs/tensorboard",
)  # fmt: skip


def address(identity: Mapping[str, Any]) -> str:
    """The name that JSON values have in a queue: 32 hex digits."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def run_identity(config: TrainConfig, code: str, *, by_size: bool = False) -> dict[str, Any]:
    """Everything that the result of a run depends on, as JSON values.

    Args:
        config: of the run, every default resolved.
        code: what stands for the sources, see :func:`code_identity`.
        by_size: groups of classes by their training pictures are read of it, so what is drawn
            counts although nothing is trained on it.

    Raises:
        InputError: see :func:`describe_clip` and :func:`data_identity`.
    """
    clip, _ = describe_clip(config.clip)
    return {
        "settings": read_settings(config, by_size=by_size),
        "data": data_identity(config.data),
        "clip": [clip.name, clip.activation, clip.fingerprint, to_json(clip.preprocessing)],
        "code": code,
    }


def read_settings(config: TrainConfig, *, by_size: bool = False) -> dict[str, Any]:
    """The settings, as JSON values, that a run's result depends on.

    Args:
        config: of the run.
        by_size: see :func:`run_identity`.
    """
    values = to_saved(config)
    aside, aside_of = list(_ASIDE), {name: list(each) for name, each in _ASIDE_OF.items()}
    if config.method == ZEROSHOT:
        aside += _UNTRAINED
        for name, each in _UNTRAINED_OF.items():
            if name == "data" and by_size:
                continue
            aside_of[name] = [*aside_of.get(name, ()), *each]
    for name in aside:
        values.pop(name, None)
    values["machine"] = {name: values["machine"][name] for name in _MACHINE}
    for group, names in aside_of.items():
        for name in names:
            values.get(group, {}).pop(name, None)
    return values


@functools.cache
def describe_clip(clip: ClipConfig) -> tuple[ClipIdentity, int]:
    """What CLIP a run would load, and how many layers its shallower tower has.

    Raises:
        InputError: see :func:`lamp_fast.clip.load.load_clip`.
    """
    loaded = load_clip(
        clip.clip, clip.pretrained, weights_of=clip.weights_of, init_seed=clip.init_seed
    )
    return loaded.identity, min(len(loaded.vision.blocks), len(loaded.text.blocks))


def data_identity(data: DataConfig) -> str:
    """sha256, in hex, over what a data set lists; see the module's text.

    Raises:
        InputError: a data set that is missing, incomplete or malformed.
    """
    # The same pictures whatever is drawn from them.
    return _data_identity(replace(data, imb=1.0, cap=None, shots=None, split="all"))


@functools.cache
def _data_identity(data: DataConfig) -> str:
    source = find_source(data)
    words = [] if source.words is None else [to_json(source.words)]
    called = [source.classnames, source.template, *words]
    digest = hashlib.sha256(json.dumps(called).encode())
    for pictures in (source.train, source.val, source.test):
        digest.update(_listing(pictures))
    return digest.hexdigest()


def _listing(pictures: Pictures) -> bytes:
    if pictures.arrays is not None:
        held = json.dumps([pictures.names, pictures.labels.tolist()])
        return held.encode() + np.ascontiguousarray(pictures.arrays).tobytes()
    if pictures.store is not None:
        sizes = pictures.places.tolist()
    else:
        sizes = [(pictures.root / name).stat().st_size for name in pictures.names]
    return json.dumps([pictures.names, pictures.labels.tolist(), sizes]).encode()


@functools.cache
def code_identity(method: str) -> str:
    """sha256, in hex, over the sources that a method's results can depend on.

    Every source of the package counts, kernels included, but for those that no result depends on
    and the files of other methods: to add a method, or to change how a table looks, repeats
    nothing. A changed comment counts; ``--code-of`` keeps results that are known to stand.
    """
    others = {_file_of(each) for each in METHODS} - {_file_of(method)}
    folders = ("methods", "methods/settings")
    aside = [*_WITHOUT_INFLUENCE, *(f"{each}/{name}" for each in folders for name in others)]
    digest = hashlib.sha256()
    for name, file in sorted(_sources().items()):
        stem = f"{name.removesuffix(file.suffix)}/"
        if not any(stem.startswith(f"{each}/") for each in aside):
            digest.update(f"{name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _file_of(method: str) -> str:
    """What a method's file or folder is called, of its model and of its settings."""
    return METHODS[method].model.partition(".")[0]


def _sources() -> dict[str, Path]:
    """Files by their name in the package; kernels and csrc lie beside it in a checkout."""
    package = Path(lamp_fast.__file__).parent
    found = {}
    for start, folder in (
        (package, package),
        *((package.parent, package.parent / each) for each in ("kernels", "csrc")),
    ):
        for file in folder.rglob("*"):
            if file.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                found[file.relative_to(start).as_posix()] = file
    return found
