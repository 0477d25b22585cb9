"""The figures that the paper and others print, and what is odd in them or must be known of them."""

import functools
import importlib.resources
import json
from dataclasses import dataclass
from typing import Any

PAPER, FILES = "paper.json", ("paper.json", "long_tail.json")


@dataclass(frozen=True)
class Origin:
    """Where the figures beside a table's own come from.

    Attributes:
        name: of those who printed them, in a sentence.
        word: before a figure.
        clip: the CLIP that they are of.
    """

    name: str
    word: str
    clip: str


@functools.cache
def _read(name: str) -> dict[str, Any]:
    file = importlib.resources.files("lamp_fast.reproduce") / name
    return json.loads(file.read_text(encoding="utf-8"))


def _of(table: str) -> dict[str, Any]:
    """The file with a table's figures; the paper's for those that have none."""
    return next((each for each in map(_read, FILES) if table in each["tables"]), _read(PAPER))


def origin(table: str) -> Origin:
    """Of the figures beside a table."""
    found = _of(table)
    return Origin(found["name"], found["word"], found["clip"])


def paper_figure(table: str, panel: str, row: str | None, column: str, metric: str) -> float | None:
    """A printed figure (percentages for what is measured in 0..1); None where there is none.

    Args:
        table, panel, row, column, metric: as the files name them.
    """
    found: Any = _of(table)["tables"]
    for name in (table, panel, row, column, metric):
        found = found.get(name)
        if found is None:
            return None
    return found


def footnotes(table: str) -> list[dict[str, str]]:
    """Of a table: ``text``, and any of panel, row, column and metric that it is about."""
    return [each for each in _of(table)["footnotes"] if each["table"] == table]
