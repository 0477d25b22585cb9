"""Bounds beside fields, and numbers of numpy in place of Python's."""

import math
import types
import typing
from dataclasses import dataclass, fields
from typing import Annotated

import numpy as np
import pytest

from lamp_fast.clip.settings import ClipConfig, Trimming
from lamp_fast.data.settings import DataConfig
from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds, IntOrNone, Layers, from_json, to_json, validate
from lamp_fast.methods import METHODS
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.settings import MachineConfig, OptimConfig


@dataclass(frozen=True)
class Inner:
    """Of which a test breaks one at a time."""

    share_kept: Annotated[float, Bounds(0, below=1)] = 0.5
    rate: Annotated[float, Bounds(above=0, high=10)] = 1.0
    count: Annotated[IntOrNone, Bounds(1, 8)] = None
    layers: Annotated[Layers, Bounds(1, 12)] = (1, 2)
    switch: bool = True


@dataclass(frozen=True)
class Outer:
    """Settings within settings."""

    inner: Inner


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share_kept": 1}, "--share-kept 1: expected less than 1"),
        ({"share_kept": -1e-300}, "--share-kept -1e-300: expected at least 0"),
        ({"rate": 0}, "--rate 0: expected more than 0"),
        ({"rate": math.inf}, "--rate inf: expected at most 10"),
        ({"rate": math.nan}, "--rate nan: expected more than 0"),
        ({"rate": np.float32(11)}, "--rate 11.0: expected at most 10"),
        ({"count": 10**400}, f"--count {10**400}: expected at most 8"),
        ({"count": np.int64(0)}, "--count 0: expected at least 1"),
        ({"layers": (1, 13)}, "--layers 1,13: expected at most 12"),
    ],
)
def test_a_number_out_of_its_bounds_is_named(change, message):
    with pytest.raises(InputError) as caught:
        validate(Outer(Inner(**change)))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "change",
    [{"share_kept": 0}, {"rate": 10}, {"count": 8}, {"count": np.int8(1)}, {"layers": ()}],
)
def test_the_bounds_themselves_are_within_but_for_open_ones(change):
    validate(Outer(Inner(**change)))


def test_numbers_of_numpy_are_numbers():
    """As they are kept, and read."""
    inner = Inner(share_kept=np.float64(0.25), count=np.int64(3), switch=np.bool_(False))
    expected = Inner(share_kept=0.25, count=3, switch=False)
    assert to_json(inner) == to_json(expected)
    given = {"share_kept": np.float32(0.25), "count": np.uint8(3), "switch": np.bool_(False)}
    read = from_json(Inner, {**given, "layers": list(np.arange(1, 3))})
    assert read == expected
    assert {type(value) for value in vars(read).values()} == {float, int, tuple, bool}
    with pytest.raises(InputError, match=r"config\.count: 3\.0 is not"):
        from_json(Inner, {"count": np.float64(3)})


SETTINGS = {TrainConfig, ClipConfig, DataConfig, OptimConfig, MachineConfig, Trimming} | {
    method.Settings for method in METHODS.values()
}


@pytest.mark.parametrize("kind", sorted(SETTINGS, key=lambda kind: kind.__name__))
def test_every_number_of_a_run_has_both_bounds(kind):
    """And the default is within."""
    plain, noted = (typing.get_type_hints(kind, include_extras=extras) for extras in (False, True))
    for each in fields(kind):
        hint = plain[each.name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not {int, float, tuple[int, ...]} & set(options):
            continue
        (bounds,) = (
            note
            for note in getattr(noted[each.name], "__metadata__", ())
            if isinstance(note, Bounds)
        )
        assert bounds.expected(-math.inf), each.name
        assert bounds.expected(math.inf), each.name
        assert bounds.expected(each.default) is None, each.name
