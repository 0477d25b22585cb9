"""The figures that the paper prints, and what is odd in them."""

import functools
import importlib.resources
import json
from typing import Any


@functools.cache
def _paper() -> dict[str, Any]:
    file = importlib.resources.files("lamp_fast.reproduce") / "paper.json"
    return json.loads(file.read_text(encoding="utf-8"))


def paper_clip() -> str:
    """The CLIP that the paper's figures are of."""
    return _paper()["clip"]


def paper_figure(table: str, panel: str, row: str | None, column: str, metric: str) -> float | None:
    """A printed figure (percentages for what is measured in 0..1); None where there is none.

    Args:
        table, panel, row, column, metric: as ``paper.json`` names them.
    """
    found: Any = _paper()["tables"]
    for name in (table, panel, row, column, metric):
        found = found.get(name)
        if found is None:
            return None
    return found


def footnotes(table: str) -> list[dict[str, str]]:
    """Of a table: ``text``, and any of panel, row, column and metric that it is about."""
    return [each for each in _paper()["footnotes"] if each["table"] == table]
