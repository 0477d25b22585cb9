"""CLIP's features of pictures: read, computed or found, and written."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

import lamp_fast
from lamp_fast import cli
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.entries import SPLIT_PARTS
from lamp_fast.data.loading import report_dead_workers
from lamp_fast.data.pictures import Pictures, inspect_pictures, unreadable_message
from lamp_fast.data.settings import DataConfig
from lamp_fast.data.sources.files import LeftOut
from lamp_fast.data.sources.given import list_pictures
from lamp_fast.data.views import testing_views, training_views
from lamp_fast.errors import InputError
from lamp_fast.features.settings import FeaturesConfig
from lamp_fast.fields import to_json
from lamp_fast.files import write_bytes, write_csv, write_json
from lamp_fast.runs.building import build_clip, build_reader, build_transform, warn_of
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.experiment import find_source
from lamp_fast.runs.folder import make_folder
from lamp_fast.runs.machine import resolve_machine
from lamp_fast.runs.settings import MachineConfig

FEATURES, PICTURES, ABOUT = "features.safetensors", "pictures.csv", "features.json"
# Rows that are projected at once.
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Listed:
    """Pictures in the order of the rows, and what is known of each.

    Attributes:
        pictures: readable ones, with digests.
        known: further columns of the table by their names.
        croppable: whether random crops leave the pictures what they are.
        unreadable: how many were left out, or may be pictures in a format that is not read.
    """

    pictures: Pictures
    known: dict[str, Sequence[Any]]
    croppable: bool
    unreadable: int


def compute_features(config: FeaturesConfig) -> int:
    """Compute what is not kept yet, then write everything; the exit code.

    Raises:
        InputError: what cannot be read or served; nothing has been written.
    """
    with make_folder(config.out):
        listed = read_pictures(config)
        machine, _ = resolve_machine(config.machine)
        if machine.threads is not None:
            torch.set_num_threads(machine.threads)
        # Pictures that somebody names are no data set of ours.
        data = DataConfig(data="folder") if config.sources else config.data
        clip = build_clip(TrainConfig(clip=config.clip, data=data, machine=machine))
        warn_of(clip, data.data)
        with report_dead_workers():
            unprojected = compute(config, clip, machine, listed)
        write(config, clip, listed, unprojected)
    shape = " x ".join(f"{each:,}" for each in unprojected.shape[:-1])
    cli.say(f"wrote   {config.out}: {shape} pictures")
    return 1 if listed.unreadable else 0


def read_pictures(config: FeaturesConfig) -> Listed:
    """List what the command line names and read every picture once.

    Raises:
        InputError: both kinds are named; see also :func:`list_pictures`, :func:`find_source`.
    """
    given = replace(DataConfig(), path_column=config.data.path_column)
    known, croppable, left_out = {}, True, LeftOut(skip_unreadable=True)
    if config.sources:
        if config.data != given:
            raise InputError(
                f"--data {config.data.data}: expected pictures alone, or a data set alone"
            )
        column = config.data.path_column
        files = [
            each for source in config.sources for each in list_pictures(source, column, left_out)
        ]
        pictures = Pictures(tuple(map(str, files)), np.zeros(len(files)), root=Path())
    else:
        source = find_source(config.data)
        parts = {name: getattr(source, name) for name in SPLIT_PARTS}
        pictures = _together(list(parts.values()))
        names = [name for name, part in parts.items() for _ in range(len(part))]
        known = {
            "part": names,
            "label": pictures.labels.tolist(),
            "class": [source.classnames[label] for label in pictures.labels],
        }
        croppable = source.augment
    return _readable(pictures, known, croppable, left_out)


def _together(parts: Sequence[Pictures]) -> Pictures:
    """The pictures of all parts, one after the other; the parts of a data set share a store."""
    in_memory, store = parts[0].arrays is not None, parts[0].store
    return Pictures(
        names=tuple(
            each.names[i] if in_memory else each.name(i) for each in parts for i in range(len(each))
        ),
        labels=np.concatenate([each.labels for each in parts]),
        root=None if in_memory else Path(),
        arrays=np.concatenate([each.arrays for each in parts]) if in_memory else None,
        store=store,
        places=None if store is None else np.concatenate([each.places for each in parts]),
    )


def _readable(
    pictures: Pictures, known: dict[str, Sequence[Any]], croppable: bool, left_out: LeftOut
) -> Listed:
    rows, digests = [], []
    for index, outcome in enumerate(inspect_pictures(pictures)):
        if isinstance(outcome, bytes):
            rows.append(index)
            digests.append(outcome)
        else:
            message = unreadable_message(pictures.name(index), outcome)
            cli.say(f"skipped {message}", stream=sys.stderr)
    for line in left_out.lines():
        cli.say(line, stream=sys.stderr)
    if not rows:
        raise InputError("FILE|FOLDER|CSV: no picture can be read, expected at least 1")
    kept = pictures.select(rows)
    if pictures.arrays is None:
        found = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(rows), -1)
        kept = replace(kept, digests=found)
    known = {name: [values[row] for row in rows] for name, values in known.items()}
    lost = len(pictures) - len(rows) + left_out.looks_like_pictures
    return Listed(kept, known, croppable, lost)


def compute(
    config: FeaturesConfig, clip: FrozenClip, machine: MachineConfig, listed: Listed
) -> Tensor:
    """Features before the projection, [N, V], [N, 5, V] with --tte, or [N, crops, V]."""
    views, size = config.views, clip.preprocessing.size
    views.check_size(size)
    reader = build_reader(clip, machine)
    pictures = replace(listed.pictures, downscale=config.data.downscale)
    if not config.crops:
        return reader.read(
            pictures, build_transform(clip, views, machine, testing_views(views, size))
        )
    shown = training_views(views, size, config.crops, croppable=listed.croppable)
    transform = build_transform(clip, views, machine, shown)
    return reader.read_views(pictures, transform, config.seed, config.crops)


def write(config: FeaturesConfig, clip: FrozenClip, listed: Listed, unprojected: Tensor) -> None:
    """Write the three files; that which describes the others last."""
    device = next(clip.parameters()).device
    with torch.no_grad():
        chunks = unprojected.split(_ROWS)
        projected = torch.cat([clip.vision.project(each.to(device)).cpu() for each in chunks])
    tensors = {"projected": projected, "unprojected": unprojected.contiguous()}
    write_bytes(config.out / FEATURES, to_safetensors(tensors))
    pictures = listed.pictures
    hashes = [each.tobytes().hex() for each in pictures.content_digests()]
    write_csv(
        config.out / PICTURES,
        ["row", "path", "sha256", *listed.known],
        zip(range(len(pictures)), pictures.names, hashes, *listed.known.values(), strict=True),
    )
    about = {
        "version": lamp_fast.__version__,
        "clip": to_json(clip.identity),
        "crops": config.crops,
        "seed": config.seed,
        "views": to_json(config.views),
        "shapes": {"projected": list(projected.shape), "unprojected": list(unprojected.shape)},
    }
    write_json(config.out / ABOUT, about)
