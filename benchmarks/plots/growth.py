"""How a step grows: with classes, batch, name length and layers, and from method to method."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure


def draw_sweeps(
    title: str, panels: Mapping[str, Sequence[str]], lines: Mapping[str, Sequence[Sequence[float]]]
) -> Figure:
    """One panel a sweep, one line a setting.

    Args:
        title: of the whole.
        panels: by the name of what is swept, its values in words.
        lines: by name, the ratios of every panel's values.
    """
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for number, (axes, (name, values)) in enumerate(zip(all_axes, panels.items(), strict=True)):
        for (line, ratios), marker in zip(lines.items(), "os", strict=True):
            axes.plot(values, ratios[number], marker=marker, label=line)
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    most = max(ratio for panels in lines.values() for ratios in panels for ratio in ratios)
    all_axes[0].set(ylabel="step / image forward", ylim=(0, 1.05 * most))
    all_axes[0].legend(frameon=False)
    figure.suptitle(title)
    return figure


@dataclass(frozen=True)
class GrowthLine:
    """A line of :func:`draw_methods`.

    Attributes:
        title: in words.
        colour: a number, shared by the two ways of a method.
        dashed: computes as published.
        ratios: by number of classes.
    """

    title: str
    colour: int
    dashed: bool
    ratios: Mapping[int, float]


def draw_methods(title: str, lines: Iterable[GrowthLine], classes: Sequence[int]) -> Figure:
    """One line a contender, both axes logarithmic."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        style = {"linestyle": "--", "marker": "x"} if line.dashed else {"marker": "o"}
        axes.plot(
            [*line.ratios],
            [*line.ratios.values()],
            color=f"C{line.colour}",
            label=line.title,
            **style,
        )
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel="classes C", ylabel="training step / image forward of the batch")
    axes.set_xticks(classes, [str(count) for count in classes])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside right center")
    return figure
