"""How a step grows: with classes, batch, name length and layers, and from method to method."""

from collections.abc import Mapping, Sequence

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


def draw_methods(
    title: str,
    ratios: Mapping[str, Mapping[int, float]],
    styles: Mapping[str, tuple[int, bool]],
) -> Figure:
    """One line a contender, both axes logarithmic.

    Args:
        title: of the whole.
        ratios: by contender, by number of classes.
        styles: by contender, its colour, which the two ways of a method share, and whether it is
            dashed.
    """
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    for name, points in ratios.items():
        colour, dashed = styles[name]
        style = {"linestyle": "--", "marker": "x"} if dashed else {"marker": "o"}
        axes.plot([*points], [*points.values()], color=f"C{colour}", label=name, **style)
    ticks = sorted({count for points in ratios.values() for count in points})
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel="classes C", ylabel="training step / image forward of the batch")
    axes.set_xticks(ticks, [str(count) for count in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside right center")
    return figure
