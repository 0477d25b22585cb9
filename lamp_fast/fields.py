"""What settings are made of: kinds of values that a flag can take, and settings as JSON."""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lamp_fast.cli import expand_path
from lamp_fast.errors import InputError


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
IntOrNone = Annotated[int | None, _or_none(int)]
FloatOrNone = Annotated[float | None, _or_none(float)]
TextOrNone = Annotated[str | None, _text_or_none()]


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass of settings as plain JSON values."""
    return json.loads(json.dumps(asdict(config), default=str))


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
    if typing.get_origin(hint) is Literal:
        accepted = value in typing.get_args(hint)
    elif typing.get_origin(hint) is tuple:
        accepted = isinstance(value, list) and all(type(each) is int for each in value)
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
