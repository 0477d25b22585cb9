"""What the files of a run say, checked as they are read: none is trusted to be a run's.

One schema for the record (``config.json``), the facts beside the learned tensors, the closing
table and the log, of this version and of 0.1.0.
"""

import dataclasses
import math
import subprocess
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import lamp_fast
from lamp_fast.data import catalog
from lamp_fast.data.hierarchy import Hierarchy, saved_hierarchy
from lamp_fast.data.sources.excluded import saved_excluded
from lamp_fast.data.words import Words, saved_words
from lamp_fast.errors import InputError
from lamp_fast.fields import format_layers, parse_layers, validate
from lamp_fast.files import parse_json, read_json
from lamp_fast.runs import config as settings
from lamp_fast.runs.config import TrainConfig, to_saved
from lamp_fast.runs.selection import is_figure

# A plot's axes go a little beyond what they show, which must stay finite.
MAX_SHOWN = 1e30


@dataclass(frozen=True)
class SavedClip:
    """Which CLIP a run used; see :class:`lamp_fast.clip.towers.ClipIdentity`."""

    name: str
    weights: str
    activation: str
    fingerprint: str
    random: bool


@dataclass(frozen=True)
class SavedData:
    """What pictures a run used.

    Attributes:
        sha256: over names, labels and bytes of all of them.
        base_names, new_names: the trained classes in label order, and those that were not trained.
        held_out: those of the base half that stood in for new ones, the first of ``new_names``.
        template: the class prompt, with {} for the name.
        counts: training pictures of each trained class.
        unreadable: names of the pictures that were skipped.
        words: several texts a class, see :func:`lamp_fast.data.words.saved_words`.
        hierarchy: see :func:`lamp_fast.data.hierarchy.saved_hierarchy`.
        excluded: see :func:`lamp_fast.data.sources.excluded.saved_excluded`.
    """

    sha256: str
    base_names: tuple[str, ...]
    new_names: tuple[str, ...]
    template: str
    counts: tuple[int, ...]
    unreadable: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    words: dict | None = None
    hierarchy: dict | None = None
    excluded: dict | None = None


@dataclass(frozen=True)
class Record:
    """The ``config.json`` of a run.

    Attributes:
        settings: with every "auto" resolved.
        version, commit, torch: the program that wrote it.
        clip, data: what the settings led to.
        launch: of the torchrun that began it, if one did.
        block: (image, class) pairs at once, decided when it was begun, so that a run that goes on,
            or is scored again, adds up in the same order; None where nothing was decided.
        values: all of it as JSON values, with every setting that this version knows.
        words: several texts a class; None where it has one.
        hierarchy: what classes are kinds of, where the run was told.
        excluded: names of the pictures of each part that the run was told to leave out.
    """

    settings: TrainConfig
    version: str
    commit: str | None
    torch: str
    clip: SavedClip
    data: SavedData
    launch: str | None
    block: int | None
    values: Mapping[str, Any]
    words: Words | None = None
    hierarchy: Hierarchy | None = None
    excluded: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class _Program:
    version: str
    torch: str
    commit: str | None = None
    launch: str | None = None
    block: int | None = None


@dataclass(frozen=True)
class _Facts:
    seconds: float
    epochs: int
    adaptation: dict | None = None
    selected: int | None = None


@dataclass(frozen=True)
class _Row:
    name: str
    acc_base: float
    acc_new: float | None
    hm_a: float | None
    f1_base: float
    f1_new: float | None
    hm_m: float | None
    head: float | None
    tail: float | None
    parameters: int
    seconds: float
    # 0.2.0 and earlier did not report these.
    many: float | None = None
    medium: float | None = None
    few: float | None = None
    balanced_base: float | None = None
    balanced_new: float | None = None
    worst_base: float | None = None
    worst_new: float | None = None
    worst_class_base: str | None = None
    worst_class_new: str | None = None
    geometric_mean_base: float | None = None
    harmonic_mean_base: float | None = None
    union: float | None = None
    union_base: float | None = None
    union_new: float | None = None
    union_hm: float | None = None
    openworld_auc: float | None = None


@dataclass(frozen=True)
class _Epoch:
    epoch: int
    lr: float
    loss: float
    accuracy: float
    seconds: float
    cross_entropy: float = 0.0
    similarity_loss: float = 0.0
    val_score: float = 0.0
    val_macro_f1: float = 0.0
    val_accuracy: float = 0.0
    val_macro_f1_held_out: float = 0.0
    val_accuracy_held_out: float = 0.0
    val_seconds: float = 0.0
    layers: tuple[int, ...] = ()
    activations: tuple[tuple[int, ...], ...] = ()


def read_record(file: Path) -> Record:
    """The record of a run, whose settings are valid.

    Raises:
        InputError: missing, damaged, or not what a run of this or an earlier version writes.
    """
    values = _object(read_json(file), str(file))
    if not is_record(values):
        raise InputError(f"{file}: not the {file.name} of a run")
    config = settings.saved_settings(values["settings"], f"{file}: settings")
    validate(config)
    for name, value in vars(config.own).items():
        if isinstance(value, tuple):
            _check_layers(value, f"{file}: settings.{config.method}.{name}")
    program = read_as(_Program, values, str(file))
    if program.block is not None and program.block < 1:
        raise InputError(f"{file}: block {program.block}: expected at least 1")
    data = read_as(SavedData, values["data"], f"{file}: data")
    if data.template.count("{}") != 1:
        raise InputError(f"{file}: data.template {data.template!r}: expected {{}} once")
    names = data.base_names + data.new_names
    if len(data.base_names) < 2 or not all(name.strip() for name in names):
        raise InputError(f"{file}: data.base_names: expected at least 2 names, none empty")
    entry = catalog.CATALOG.get(config.data.data)
    distinct = entry is None or entry.distinct_names
    if distinct and len(set(names)) < len(names):
        raise InputError(f"{file}: data: a class is named twice, expected distinct names")
    if len(data.counts) != len(data.base_names) or min(data.counts) < 0:
        raise InputError(f"{file}: data.counts: expected one count from 0 for each trained class")
    return Record(
        settings=config,
        version=program.version,
        commit=program.commit,
        torch=program.torch,
        clip=read_as(SavedClip, values["clip"], f"{file}: clip"),
        data=data,
        launch=program.launch,
        block=program.block,
        words=saved_words(data.words, f"{file}: data.words"),
        excluded=saved_excluded(data.excluded, f"{file}: data.excluded"),
        hierarchy=saved_hierarchy(data.hierarchy, f"{file}: data.hierarchy"),
        values={**values, "commit": program.commit, "settings": to_saved(config)},
    )


def is_record(values: Any) -> bool:
    """Whether JSON values look like a run's record, however well: other programs' files do not."""
    marks = {"settings": "method", "clip": "fingerprint", "data": "sha256"}
    return (
        isinstance(values, Mapping)
        and "version" in values
        and all(isinstance(values.get(part), Mapping) for part in marks)
        and all(mark in values[part] for part, mark in marks.items())
    )


def holds_record(file: Path) -> bool:
    """Whether a file is the ``config.json`` of a run or a saved classifier of this package."""
    try:
        return is_record(read_json(file))
    except InputError:
        return False


def check_facts(values: Any, where: str) -> dict[str, Any]:
    """What is stored with learned tensors: training seconds, epochs, the one that was chosen, and
    how the bias was adapted.

    Raises:
        InputError: a fact that is missing or of another kind.
    """
    facts = read_as(_Facts, values, where)
    if facts.seconds < 0 or facts.epochs < 0:
        raise InputError(f"{where}: expected seconds and epochs from 0")
    if facts.selected is not None and not 1 <= facts.selected <= facts.epochs:
        raise InputError(f"{where}: selected {facts.selected}: expected one of the epochs")
    return {"adaptation": None, "selected": None, **values}


def check_rows(values: Any, where: str) -> list[dict[str, Any]]:
    """The rows of a closing table, figures in 0..1 or None where there is nothing to report.

    Raises:
        InputError: anything else.
    """
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: expected a list of rows")
    names = set()
    for number, value in enumerate(values, start=1):
        row = read_as(_Row, value, f"{where}: row {number}")
        if row.name in names:
            raise InputError(f"{where}: row {number}: {row.name!r} is there twice")
        names.add(row.name)
        for name, figure in vars(row).items():
            if name in ("parameters", "seconds") or figure is None or isinstance(figure, str):
                continue
            if not 0 <= figure <= 1:
                raise InputError(f"{where}: row {number}.{name} {figure}: expected 0..1")
    return values


def check_history(values: Any, where: str) -> list[dict[str, Any]]:
    """The log of a run, a line an epoch from the first.

    Raises:
        InputError: anything else.
    """
    if not isinstance(values, list):
        raise InputError(f"{where}: expected a list of epochs")
    shape: tuple[int, ...] | None = None
    for number, value in enumerate(values, start=1):
        line = read_as(_Epoch, value, f"{where}: epoch {number}")
        if line.epoch != number:
            raise InputError(f"{where}: epoch {line.epoch} in place of {number}")
        if not 0 <= line.accuracy <= 1 or max(abs(line.loss), abs(line.lr)) > MAX_SHOWN:
            raise InputError(f"{where}: epoch {number}: a figure that no training gives")
        if max(abs(line.cross_entropy), abs(line.similarity_loss)) > MAX_SHOWN:
            raise InputError(f"{where}: epoch {number}: a loss that no training gives")
        figures = (figure for name, figure in vars(line).items() if is_figure(name))
        if not all(0 <= figure <= 1 for figure in figures) or line.val_seconds < 0:
            raise InputError(f"{where}: epoch {number}: a figure that no validation gives")
        if values[0].keys() - value.keys():
            raise InputError(f"{where}: epoch {number} lacks what the first has")
        if line.activations:
            widths = {len(each) for each in line.activations}
            shape = shape or (len(line.layers), *widths)
            if 0 in widths or (len(line.activations), *widths) != shape or len(shape) != 2:
                raise InputError(f"{where}: epoch {number}: activations of another shape")
    return values


def read_history(file: Path) -> list[dict[str, Any]]:
    """The log of a run, from its ``metrics.jsonl``.

    Raises:
        InputError: missing, damaged, or see :func:`check_history`.
    """
    try:
        values = [parse_json(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: missing or damaged ({error})") from None
    return check_history(values, str(file))


def current_commit() -> str | None:
    """The package's git commit, where it runs from a checkout."""
    folder = Path(lamp_fast.__file__).parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _check_layers(layers: tuple[int, ...], where: str) -> None:
    try:
        fits = parse_layers(format_layers(layers)) == layers
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f"{where} {list(layers)[:12]}: expected ascending layers, from 1")


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected an object, got {str(value)[:60]!r}")
    return value


def read_as(kind: Any, value: Any, where: str) -> Any:
    """JSON values as a dataclass of this module; fields that it does not know are left out.

    Raises:
        InputError: a field that is missing, of another kind, or a number that is not finite.
    """
    if is_dataclass(kind):
        value, hints = _object(value, where), typing.get_type_hints(kind)
        found = {}
        for field in fields(kind):
            at = f"{where}.{field.name}" if ": " in where else f"{where}: {field.name}"
            if field.name in value:
                found[field.name] = read_as(hints[field.name], value[field.name], at)
            elif field.default is MISSING:
                raise InputError(f"{at} is missing")
        return kind(**found)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(read_as(item, each, f"{where}[]") for each in value)
    else:
        options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if type(value) in options or (value is None and type(None) in options):
            if not isinstance(value, float) or math.isfinite(value):
                return value
        elif type(value) is int and float in options:
            return float(value)
    expected = getattr(kind, "__name__", str(kind))
    raise InputError(f"{where}: {str(value)[:60]!r} is not {expected}")
