"""Every setting of a run: what its parts read, put together, saved and read again.

The dataclasses are the single source of the command line, of the saved ``config.json`` and of the
Python interface. A setting stands in the ``settings`` of the folder whose code reads it; names of
fields are the flags' names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from lamp_fast import cli
from lamp_fast.clip.settings import ClipConfig, Trimming
from lamp_fast.data.settings import DataConfig, ViewConfig
from lamp_fast.errors import InputError
from lamp_fast.fields import Seed, from_json, peek, to_json
from lamp_fast.files import read_json
from lamp_fast.methods import METHODS, find_preset
from lamp_fast.methods.settings import MethodSettings, SteppedSettings
from lamp_fast.methods.settings.coop import ContextSettings
from lamp_fast.runs.selection import BEFORE, SelectionConfig
from lamp_fast.runs.settings import MachineConfig, OptimConfig

Own = TypeVar("Own", bound=MethodSettings)

METHOD_HELP = f"One of {', '.join(METHODS)}; --help behind it shows its own flags."


@dataclass(frozen=True)
class TrainConfig(Generic[Own]):
    """A whole run; ``own`` holds what its method alone reads."""

    method: Annotated[str, tyro.conf.arg(help=METHOD_HELP)] = "lamp"
    preset: str | None = None
    """Defaults for the flags below: what --method was published with; for LAMP "tiny" over the tiny
    CLIP, "table16-imb" over others."""
    config: Path | None = None
    """Take the defaults, but for --out, from this saved config.json."""
    seed: Seed = 1
    out: Path | None = None
    """Run folder; by default a new one under runs/."""
    resume: bool = False
    """Go on from the checkpoint in --out."""
    overwrite: bool = False
    """Replace what is in --out."""
    tensorboard: bool = False
    """Also write each epoch as TensorBoard events (needs the tensorboard extra)."""
    union: bool = False
    """Also show in the closing table how base and new names do when all are asked for at once;
    result.json says it in any case."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    own: Own = None  # of the method, see __post_init__
    optim: OptimConfig = field(default_factory=OptimConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    trim: Trimming = field(default_factory=Trimming)

    def __post_init__(self) -> None:
        if self.own is None:
            object.__setattr__(self, "own", settings_of(self.method)())

    def check_together(self) -> None:
        """Refuse values of different parts that do not go together.

        Raises:
            InputError: naming the first such flag, its value and what was expected.
        """
        if self.resume and self.overwrite:
            raise InputError("--resume --overwrite: expected one of the two")
        if type(self.own) is not settings_of(self.method):
            raise InputError(f"--method {self.method}: the settings are those of another method")
        entry = METHODS[self.method]
        if self.trim.as_published and entry.no_as_published:
            raise InputError(f"--as-published: {entry.no_as_published}")
        for flag, given in (
            ("--logit-adjustment", self.optim.logit_adjustment),
            (f"--loss {self.optim.loss}", self.optim.loss != "ce"),
            ("--class-weights", self.optim.class_weights != "none"),
        ):
            if given and entry.own_loss is not None:
                raise InputError(f"{flag}: {entry.own_loss}")
        if self.optim.epochs is None and not isinstance(self.own, SteppedSettings):
            raise InputError(
                f"--epochs none: --method {self.method} has no published number of steps, expected"
                " a number of epochs"
            )
        self.resolved_selection().check(entry, self.data.resolved().split)
        if self.data.template and entry.own_prompt:
            raise InputError(
                f"--template {self.data.template[0]!r}: --method {self.method} has a prompt of its"
                " own"
            )

    def resolved_selection(self) -> SelectionConfig:
        """What is chosen on validation pictures, with the defaults of data and method."""
        return self.selection.resolved(self.data.data, METHODS[self.method])


def settings_of(method: str) -> type[MethodSettings]:
    """The class of a method's own settings.

    Raises:
        InputError: an unknown method.
    """
    if method not in METHODS:
        raise InputError(f"--method {method}: expected one of {', '.join(METHODS)}")
    return METHODS[method].Settings


def uses_validation(config: TrainConfig) -> bool:
    """Whether a run holds validation pictures: its settings ask for them, or its method chooses on
    them."""
    return config.own.uses_validation or config.resolved_selection().uses_validation


# The flags that decide what the others' defaults are.
CHOOSE_DEFAULTS = ("method", "preset", "config", "clip", "data", "split", "shots")


def default_config(given: Mapping[str, Any]) -> TrainConfig:
    """The defaults that explicit values override: of ``config``, of the preset, or of the method.

    Args:
        given: values by their flags' names, as words or as what they mean; only
            :data:`CHOOSE_DEFAULTS` are looked at.

    Raises:
        InputError: an unknown method, an unknown preset or one of another method, or a config file
            that cannot be read.
    """
    given = {name: str(given[name]) for name in CHOOSE_DEFAULTS if given.get(name) is not None}
    if "method" in given:
        settings_of(given["method"])
    base = TrainConfig()
    if "config" in given:
        # Its settings, not its folder: that one is full.
        file = cli.expand_path(given["config"])
        base = replace(load_config(file), config=file, out=None)
        if given.get("method", base.method) == base.method and "preset" not in given:
            return base
    if "preset" in given:
        config = apply_preset(base, given["preset"])
        if given.get("method", config.method) != config.method:
            raise InputError(
                f"--preset {given['preset']}: is of --method {config.method}, not {given['method']}"
            )
        return config
    method = given.get("method", "lamp")
    named = {name: given[name] for name in ("data", "split") if name in given}
    # Words that are no number are refused when the flags are read.
    word = given.get("shots", str(base.data.shots))
    shots = int(word) if word.isdigit() else None
    data = replace(base.data, shots=shots, **named).resolved()
    clip = replace(base.clip, clip=given.get("clip", base.clip.clip)).resolved(data.data)
    name = METHODS[method].default_preset(method, clip.clip, data)
    if name is None:
        plain = {"optim": OptimConfig(), "views": ViewConfig()}
        return replace(base, method=method, preset=None, own=None, **plain)
    preset = METHODS[method].presets[name]
    return replace(
        apply_preset(base, name),
        own=settings_of(method)(**preset.own_for(data.data)),
        optim=OptimConfig(**preset.optim_for(data.data, shots)),
    )


def apply_preset(config: TrainConfig, name: str) -> TrainConfig:
    """Set everything that the preset ``name`` says, its method's other settings to their own.

    Raises:
        InputError: an unknown name.
    """
    method, preset = find_preset(name)
    return replace(
        config,
        method=method,
        preset=name,
        own=settings_of(method)(**preset.own),
        optim=OptimConfig(**preset.optim),
        views=ViewConfig(**preset.views),
    )


def choosing_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Of raw arguments those that decide about defaults, in ``--flag value`` or ``--flag=value``
    form, for :func:`default_config` and :func:`lamp_fast.runs.folder.resumed_defaults`."""
    found: dict[str, Any] = peek(argv, *CHOOSE_DEFAULTS, "out")
    return {**found, "resume": True} if "--resume" in argv else found


def parse_flags(argv: Sequence[str], default: TrainConfig, **texts: str | None) -> TrainConfig:
    """Read flags of ``lamp_fast.train`` over their defaults; the method decides which there are.

    Args:
        argv: the raw arguments.
        default: what the flags leave out.
        texts: ``prog`` and ``description`` for ``--help``.

    Raises:
        InputError: a flag or value that does not fit, or a flag that the method does not have.
    """
    if any(word.partition("=")[0] == "--template" for word in argv):
        # Each adds one to those before it; those of a preset or a run are to give way.
        default = replace(default, data=replace(default.data, template=()))
    try:
        return cli.parse(TrainConfig[type(default.own)], argv, default=default, **texts)
    except cli.UnknownFlagError as error:
        message = f"{error.flag}: --method {default.method} has no such flag"
        raise InputError(message) from None


def to_saved(config: TrainConfig) -> dict[str, Any]:
    """The settings as ``config.json`` holds them: the method's own under the method's name."""
    values = to_json(config)
    return {config.method if name == "own" else name: each for name, each in values.items()}


# Until 0.1.0 every run saved these groups, whichever its method read.
_GROUPS_BEFORE = ("lamp", "context", "maple", "tcp", "mma", "lfa", "candle")


def from_saved(values: Any, where: str) -> TrainConfig:
    """Settings as :func:`to_saved` writes them, or as 0.1.0 did; what is missing has its default.

    Raises:
        InputError: an unknown setting or a value of another kind, by name.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected an object of settings, got {values!r}")
    method = values.get("method", TrainConfig.method)
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"{where}.method: {method!r} is none of {', '.join(METHODS)}")
    kind = settings_of(method)
    own = values.get(method, {})
    if issubclass(kind, ContextSettings) and isinstance(own, Mapping):
        context = values.get("context", {})
        own = {**context, **own} if isinstance(context, Mapping) else context
    shared = {name: each for name, each in values.items() if name not in (method, *_GROUPS_BEFORE)}
    data = shared.get("data")
    if isinstance(data, Mapping) and not isinstance(data.get("template", []), list):
        # Up to 0.2.0 there was one, or none.
        shared["data"] = {**data, "template": [data["template"]] if data["template"] else []}
    config = from_json(TrainConfig, {**shared, "method": method}, where)
    return replace(config, own=from_json(kind, own, f"{where}.{method}"))


def saved_settings(values: Any, where: str) -> TrainConfig:
    """What a run saved of its settings, in this or an earlier version.

    Before there was a setting, what it decides was fixed: phi was linear, the similarity loss
    moved keys and tokens, and no epoch was chosen on validation pictures.

    Raises:
        InputError: see :func:`from_saved`.
    """
    lamp = values.get("lamp") if isinstance(values, Mapping) else None
    if isinstance(lamp, Mapping) and values.get("method") == "lamp":
        values = {**values, "lamp": {"phi": "linear", "similarity_gradient": "both", **lamp}}
    if isinstance(values, Mapping):
        values = {"selection": BEFORE, **values}
    return from_saved(values, where)


def load_config(file: Path) -> TrainConfig:
    """Read the settings of a run's ``config.json``, or of a file that holds settings alone.

    Raises:
        InputError: it is missing or damaged, or as :func:`from_saved`.
    """
    try:
        values = read_json(file)
    except InputError as error:
        raise InputError(f"--config {error}") from None
    if isinstance(values, dict) and isinstance(values.get("settings"), dict):
        return saved_settings(values["settings"], str(file))
    return from_saved(values, str(file))


def change(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Set dotted settings, such as ``optim.lr``, ``lamp.k`` (the method's own) or ``seed``."""
    for name, value in changes.items():
        group, dot, field = name.rpartition(".")
        group = "own" if group == config.method else group
        if dot:
            value = replace(getattr(config, group), **{field: value})
        config = replace(config, **{group or field: value})
    return config
