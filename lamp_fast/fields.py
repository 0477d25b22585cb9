"""What settings are made of: kinds of values that a flag can take, bounds, settings as JSON."""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from lamp_fast.cli import expand_path
from lamp_fast.errors import InputError

# Deeper than any transformer; a typing error must not become a list of a thousand million numbers.
MAX_LAYER = 1000
# The largest seed that every generator takes.
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Bounds:
    """What a number may be, written beside its field: ``k: Annotated[int, Bounds(1, 16)] = 2``.

    What is no number (``none``, a word) is not looked at; of layers, every one is.

    Attributes:
        low, high: both allowed.
        above, below: neither allowed.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def expected(self, value: Any) -> str | None:
        """What is expected in place of a value; None where it is within."""
        if isinstance(value, tuple):
            return next(filter(None, map(self.expected, value)), None)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            return None
        # Written so that NaN, which compares to nothing, is outside.
        for words, limit, within in (
            ("at least", self.low, self.low is None or value >= self.low),
            ("more than", self.above, self.above is None or value > self.above),
            ("at most", self.high, self.high is None or value <= self.high),
            ("less than", self.below, self.below is None or value < self.below),
        ):
            if not within:
                return f"{words} {limit}"
        return None


def flag_of(name: str) -> str:
    """The command line's name of a field."""
    return f"--{name.replace('_', '-')}"


def validate(config: Any) -> None:
    """Hold every number of a dataclass of settings to the :class:`Bounds` beside its field, then
    call its ``check_together``, if it has one, for what must go together.

    Raises:
        InputError: naming the first such flag, its value and what was expected.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            validate(value)
            continue
        for note in getattr(hints[each.name], "__metadata__", ()):
            if isinstance(note, Bounds) and (expected := note.expected(value)) is not None:
                shown = format_layers(value) if isinstance(value, tuple) else value
                raise InputError(f"{flag_of(each.name)} {shown}: expected {expected}")
    if hasattr(config, "check_together"):
        config.check_together()


def parse_layers(text: str) -> tuple[int, ...]:
    """Read ``3..12``, ``6`` or ``3,5,9..12`` as 1-based layer numbers, ascending.

    Raises:
        ValueError: anything else, naming the text.
    """
    expected = f"--layers {text}: expected layers such as 3..12 or 3,5,9..12, numbered from 1"
    layers: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        if not first.strip().isdigit() or (dots and not last.strip().isdigit()):
            raise ValueError(expected)
        low, high = int(first), int(last) if dots else int(first)
        if low < 1 or high < low:
            raise ValueError(expected)
        if high > MAX_LAYER:
            raise ValueError(f"--layers {text}: expected layers of at most {MAX_LAYER}")
        layers.update(range(low, high + 1))
    return tuple(sorted(layers))


def format_layers(layers: tuple[int, ...]) -> str:
    """Write layer numbers the way :func:`parse_layers` reads them."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def _text_or_none() -> tyro.constructors.PrimitiveConstructorSpec:
    """Words, or ``none`` in any case."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="WORDS|none",
        instance_from_str=lambda given: None if given[0].lower() == "none" else given[0],
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: ["none" if value is None else value],
    )


def _or_none(convert: type) -> tyro.constructors.PrimitiveConstructorSpec:
    """A number, or ``none`` in any case."""
    name = convert.__name__

    def read(arguments: list[str]) -> Any:
        return None if arguments[0].lower() == "none" else convert(arguments[0])

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{name.upper()}|none",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, convert),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


Layers = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="A..B",
        instance_from_str=lambda arguments: parse_layers(arguments[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda layers: [format_layers(layers)],
    ),
]
Seed = Annotated[int, Bounds(0, MAX_SEED)]
IntOrNone = Annotated[int | None, _or_none(int)]
FloatOrNone = Annotated[float | None, _or_none(float)]
TextOrNone = Annotated[str | None, _text_or_none()]


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass of settings as plain JSON values."""
    return json.loads(json.dumps(asdict(config), default=_plain))


def _plain(value: Any) -> Any:
    """A value that JSON does not know: a number of numpy's as Python's, a path as its words."""
    return value.item() if isinstance(value, np.generic) else str(value)


def from_json(config_class: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """Rebuild a dataclass of settings from :func:`to_json`'s values.

    Raises:
        InputError: an unknown field or a value of another kind, by name.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected an object of settings, got {values!r}")
    known = {each.name: each for each in fields(config_class)}
    hints = typing.get_type_hints(config_class)
    if unknown := sorted(set(values) - set(known)):
        raise InputError(f"{where}: unknown setting {unknown[0]!r}")
    return config_class(
        **{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    )


def _value(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return from_json(hint, value, where)
    if isinstance(value, np.generic):
        value = value.item()
    if typing.get_origin(hint) is Literal:
        accepted = value in typing.get_args(hint)
    elif typing.get_origin(hint) is tuple:
        if isinstance(value, list):
            value = [each.item() if isinstance(each, np.generic) else each for each in value]
        kind = typing.get_args(hint)[0]
        accepted = isinstance(value, list) and all(type(each) is kind for each in value)
        value = tuple(value) if accepted else value
    else:
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        accepted = (
            (value is None and type(None) in options)
            or (isinstance(value, str) and (str in options or Path in options))
            or (isinstance(value, bool) and bool in options)
            or (type(value) is int and (int in options or float in options))
            or (type(value) is float and float in options)
        )
        if accepted and isinstance(value, str) and Path in options:
            value = expand_path(value)
    if not accepted:
        raise InputError(f"{where}: {value!r} is not {hint}")
    return value


def peek(argv: typing.Sequence[str], *names: str) -> dict[str, str]:
    """Values of some flags in raw arguments, before they are parsed as a whole."""
    found = {}
    for position, argument in enumerate(argv):
        for name in names:
            if argument == f"--{name}" and position + 1 < len(argv):
                found[name] = argv[position + 1]
            elif argument.startswith(f"--{name}="):
                found[name] = argument.partition("=")[2]
    return found
