"""One number a class, as users write them: a JSON file ``{"cat": 2, "dog": 0.5}``, or its text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lamp_fast.cli import expand_path
from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds

# What float32 still holds, with room for products.
POSITIVE = Bounds(above=0, high=1e30)


def read_numbers(flag: str, given: str) -> dict[str, Any]:
    """The JSON object in a file, or in ``given`` itself where it begins with a brace.

    Raises:
        InputError: no such file, or something else than an object that names each class once.
    """
    shown, text = flag, given
    if not given.lstrip().startswith("{"):
        shown = f"{flag} {given}"
        file = expand_path(given)
        try:
            if file.exists() and not file.is_file():
                raise OSError("no regular file")
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{shown}: cannot be read ({reason})") from None
    try:
        values = json.loads(text, object_pairs_hook=_named_once)
    except RecursionError:
        raise InputError(f"{shown}: not JSON (nested too deeply)") from None
    except ValueError as error:
        raise InputError(f"{shown}: not JSON of class names and numbers ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f'{shown}: expected an object such as {{"cat": 2, "dog": 0.5}}')
    return values


def check_numbers(flag: str, values: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """A positive number for every class, in the order of ``names``.

    Classes that share a name share its number.

    Raises:
        InputError: a class without a number, a name that is no class, or another value than a
            positive number, by name.
    """
    if missing := [name for name in names if name not in values]:
        raise InputError(f"{flag}: lacks class {missing[0]!r}, expected every class")
    if unknown := [name for name in values if name not in set(names)]:
        raise InputError(f"{flag}: {unknown[0]!r} is none of the {len(names)} classes")
    for name, value in values.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        expected = POSITIVE.expected(value) if number else "a number"
        if expected is not None:
            raise InputError(f"{flag}: class {name!r} has {str(value)[:40]}, expected {expected}")
    return {name: float(values[name]) for name in names}


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r} is there twice")
        values[name] = value
    return values
