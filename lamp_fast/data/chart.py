"""A chart of the training pictures of each class."""

import io
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lamp_fast.data.describe import Description
from lamp_fast.errors import printable
from lamp_fast.files import write_bytes

COLOURS = {"head": "C0", "tail": "C1", "new": "C7", None: "C0"}
# Bars of more classes are too thin for names beside them.
MAX_NAMED_BARS = 120


def plot(file: Path, description: Description) -> None:
    """Draw training pictures by class, the largest first, into a PNG."""
    ranked = sorted(description.trained, key=lambda each: -each.training)
    named = len(ranked) <= MAX_NAMED_BARS
    height = 1.5 + (0.2 * len(ranked) if named else 6)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(ranked))
    bars = axes.barh(
        places,
        [each.training for each in ranked],
        height=0.8 if named else 1.0,
        color=[COLOURS[each.group] for each in ranked],
    )
    if named:
        axes.bar_label(bars, padding=3, fontsize=7)
        axes.set_yticks(places, [_plain(each.name) for each in ranked], fontsize=8)
    axes.set(
        title=f"{description.data}: {len(ranked)} trained classes",
        xlabel="training pictures",
        ylabel=None if named else "class, by rank",
        ylim=(len(ranked) - 0.4, -0.6),
    )
    groups = [group for group in ("head", "tail") if any(each.group == group for each in ranked)]
    if groups:
        patches = [Patch(color=COLOURS[group], label=group) for group in groups]
        axes.legend(handles=patches, frameon=False, loc="lower right")
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_bytes(file, content.getvalue())


def _plain(name: str) -> str:
    """A class name as matplotlib shall print it: dollars begin no formula."""
    return printable(name).replace("$", r"\$")
