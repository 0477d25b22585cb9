"""The flags of a comparison."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from lamp_fast.clip.settings import ClipConfig
from lamp_fast.data.settings import DataConfig
from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds, IntOrNone, Seed
from lamp_fast.methods import METHODS
from lamp_fast.runs.settings import MachineConfig

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
# From so many on the next two units are shown.
_UPPER = {"s": 3600, "m": 24 * 60}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+")


def parse_duration(text: str) -> float:
    """Seconds of ``90s``, ``20m``, ``1h30m`` or ``1.5h``.

    Raises:
        ValueError: anything else.
    """
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{text}: expected a time such as 90s, 20m or 1h30m")
    parts = re.findall(r"([\d.]+)([smhd])", text)
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def format_duration(seconds: float) -> str:
    """The same the other way round, to two units: ``1h30m``, ``2m5s``, ``20m``, ``0.4s``."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    for large, small in (("m", "s"), ("h", "m"), ("d", "h")):
        unit = _UNITS[small]
        count = round(seconds / unit)
        whole, rest = divmod(count, _UNITS[large] // unit)
        if large == "d" or count < _UPPER[small]:
            break
    first, second = f"{whole}{large}" if whole else "", f"{rest}{small}" if rest else ""
    return first + second


Duration = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="TIME",
        instance_from_str=lambda words: parse_duration(words[0]),
        is_instance=lambda value: isinstance(value, (int, float)),
        str_from_instance=lambda value: [format_duration(value)],
    ),
]


@dataclass(frozen=True)
class CompareConfig:
    """Compare methods on one's own pictures, and keep the one that validation pictures prefer.

    Zero-shot CLIP comes first, then the methods over features that are computed once, then the
    others, the quicker ones before the slower, as far as the budget reaches. The same command goes
    on where it was stopped; with a larger budget it adds what did not fit."""

    methods: tuple[str, ...] = ()
    """These alone, as --method of lamp_fast.train names them; by default every one."""
    budget: Annotated[Duration, Bounds(above=0, high=1e9)] = 20 * 60.0
    """Time that this call may take, such as 90s, 20m or 1h30m. What was done before costs
    nothing."""
    trials: Annotated[IntOrNone, Bounds(0, 1000)] = None
    """Further settings that are tried of each method that trains step by step, if time allows; the
    validation pictures decide. 0 takes the published settings alone. none: 4 where optuna is
    installed (pip install 'lamp_fast[compare]'), else 0."""
    epochs: Annotated[IntOrNone, Bounds(1, 1_000_000)] = None
    """Of every method that trains, in place of its own; none leaves each its own."""
    seed: Seed = 1
    """Of training and of the search."""
    out: Path = Path("runs/compare")
    """Folder of the comparison: its table and page, and the chosen run in chosen/."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    data: DataConfig = field(default_factory=DataConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    @property
    def pictures(self) -> DataConfig:
        """The data of every method, all classes together, defaults filled in."""
        return replace(self.data, split=self.data.split or "all").resolved()

    def check_together(self) -> None:
        """Refuse what no comparison could be made of.

        Raises:
            InputError: naming the first such flag, its value and what was expected.
        """
        for method in self.methods:
            if method not in METHODS:
                raise InputError(f"--methods {method}: expected some of {', '.join(METHODS)}")
        if self.data.split == "base-new":
            raise InputError(
                "--split base-new: methods are compared on all classes together, expected"
                " --split all"
            )
