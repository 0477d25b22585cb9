"""Where the time of a step goes, beside the floor of each part."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


def draw_parts(title: str, bars: Mapping[str, Mapping[str, float]], parts: Sequence[str]) -> Figure:
    """Bars in pairs, measured and floor, divided into the same parts.

    Args:
        title: of the whole.
        bars: by name, the seconds of each part; the two of a step follow one another.
        parts: in the order in which a bar has them.
    """
    figure = Figure(figsize=(10, 1.2 + 0.55 * len(bars)), layout="constrained")
    axes = figure.subplots()
    at = [1.2 * number - 0.3 * (number % 2) for number in range(len(bars))]
    left = [0.0] * len(bars)
    for number, part in enumerate(parts):
        widths = [1e3 * seconds.get(part, 0.0) for seconds in bars.values()]
        if any(widths):
            axes.barh(at, widths, left=left, label=part, color=f"C{number}")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(at, [*bars])
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds of one training step", title=title)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return figure
