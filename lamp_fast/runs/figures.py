"""Pictures of a run: its curves, its accuracy by class size, its activated prompts."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lamp_fast.data.protocol import SIZE_GROUPS
from lamp_fast.files import write_bytes
from lamp_fast.runs.metrics import balanced_accuracy
from lamp_fast.runs.reliability import Curve, Diagram
from lamp_fast.runs.selection import SCORE, selected_epoch


def plot_curves(file: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Loss terms, training accuracy and learning rate by epoch."""
    save_figure(draw_curves(history), file)


def draw_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure of :func:`plot_curves`."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    losses, accuracy, rate = figure.subplots(1, 3)
    epochs = [line["epoch"] for line in history]
    for key, label in (
        ("loss", "loss"),
        ("cross_entropy", "cross-entropy"),
        ("similarity_loss", "similarity loss"),
    ):
        if history and key in history[0]:
            losses.plot(epochs, [line[key] for line in history], label=label, marker=".")
    losses.set(title="training loss", xlabel="epoch")
    losses.legend(frameon=False)
    accuracy.plot(epochs, [100 * line["accuracy"] for line in history], marker=".", color="C2")
    accuracy.set(title="training accuracy (running)", xlabel="epoch", ylabel="%")
    rate.plot(epochs, [line["lr"] for line in history], marker=".", color="C3")
    rate.set(title="learning rate", xlabel="epoch")
    return figure


def plot_validation(file: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """The validation figures by epoch, where epochs were compared."""
    figure = draw_validation(history)
    if figure is not None:
        save_figure(figure, file)


def draw_validation(history: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The figure of :func:`plot_validation`; None where no epoch was scored."""
    lines = [line for line in history if SCORE in line]
    if not lines:
        return None
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    epochs = [line["epoch"] for line in lines]
    held_out = "val_macro_f1_held_out" in lines[0]
    curves = {"val_macro_f1": "macro-F1, trained classes" if held_out else "macro-F1"}
    if held_out:
        curves |= {"val_macro_f1_held_out": "macro-F1, classes held out"}
        curves |= {SCORE: "harmonic mean of the two"}
    else:
        curves |= {"val_accuracy": "accuracy"}
    for key, label in curves.items():
        axes.plot(epochs, [100 * line[key] for line in lines], label=label, marker=".")
    chosen = selected_epoch(lines)
    axes.axvline(chosen, color="0.5", linestyle=":", label=f"chosen: epoch {chosen}")
    axes.set(title="validation pictures", xlabel="epoch", ylabel="%")
    axes.legend(frameon=False)
    return figure


def plot_per_class(
    file: Path,
    counts: Sequence[int],
    accuracies: Mapping[str, Sequence[float]],
    size_groups: Sequence[str] | None = None,
) -> None:
    """Test accuracy of each base class against its number of training pictures.

    A line over the classes of a size group shows the mean of their accuracies.

    Args:
        file: the picture to write.
        counts: training pictures of each class.
        accuracies: per method, the accuracy in 0..1 of each class; NaN without a test picture.
        size_groups: of each class, see :func:`lamp_fast.data.protocol.size_groups`.
    """
    save_figure(draw_per_class(counts, accuracies, size_groups), file)


def draw_per_class(
    counts: Sequence[int],
    accuracies: Mapping[str, Sequence[float]],
    size_groups: Sequence[str] | None = None,
) -> Figure:
    """The figure of :func:`plot_per_class`."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    order = np.argsort(counts, kind="stable")[::-1]
    for index, (name, values) in enumerate(accuracies.items()):
        shift = 1 + 0.02 * (index - (len(accuracies) - 1) / 2)
        axes.scatter(
            np.asarray(counts)[order] * shift,
            100 * np.asarray(values)[order],
            label=name,
            alpha=0.75,
            marker="os^D"[index % 4],
            s=30,
        )
    axes.set_xscale("log")
    axes.set(
        title="trained classes: accuracy against class size",
        xlabel="training pictures of the class",
        ylabel="test accuracy, %",
        ylim=(-3, 103),
    )
    if size_groups is not None:
        _draw_size_groups(axes, np.asarray(counts), accuracies, np.asarray(size_groups))
    axes.legend(frameon=False)
    return figure


def _draw_size_groups(
    axes: Axes,
    counts: np.ndarray,
    accuracies: Mapping[str, Sequence[float]],
    size_groups: np.ndarray,
) -> None:
    for group in SIZE_GROUPS:
        members = size_groups == group
        if not members.any():
            continue
        # A little to both sides of the dots, so that a group of one size has a line, too.
        span = np.array([counts[members].min() / 1.06, counts[members].max() * 1.06])
        for index, values in enumerate(accuracies.values()):
            mean = balanced_accuracy(np.asarray(values), members)
            if mean is not None:
                axes.plot(span, [100 * mean] * 2, color=f"C{index}", linewidth=1.5, alpha=0.8)
        axes.annotate(
            group,
            (np.sqrt(span.prod()), 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    # The groups' names stand between the plot and its title.
    axes.set_title(axes.get_title(), pad=18)


def plot_activations(file: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """How often every prompt of every layer was activated, epoch by epoch."""
    figure = draw_activations(history)
    if figure is not None:
        save_figure(figure, file)


def draw_activations(history: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The figure of :func:`plot_activations`; None without a prompt pool."""
    lines = [line for line in history if line.get("activations")]
    if not lines:
        return None
    layers = lines[0]["layers"]
    counts = np.array([line["activations"] for line in lines], dtype=float)  # [E, layers, M]
    share = counts / counts.sum(axis=2, keepdims=True).clip(min=1)
    columns = min(len(layers), 5)
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(2.6 * columns + 1, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    last_epoch = lines[-1]["epoch"] + 0.5
    for axes, layer, values in zip(grid.flat, layers, share.transpose(1, 2, 0), strict=False):
        image = axes.imshow(
            values,
            aspect="auto",
            cmap="viridis",
            vmin=0,
            vmax=share.max(),
            extent=(lines[0]["epoch"] - 0.5, last_epoch, values.shape[0] - 0.5, -0.5),
            interpolation="nearest",
        )
        axes.set(title=f"layer {layer}", xlabel="epoch", ylabel="prompt")
    for axes in grid.flat[len(layers) :]:
        axes.set_axis_off()
    figure.colorbar(
        image, ax=grid, label=f"share of activations\n(even: {1 / counts.shape[2]:.3f})"
    )
    return figure


def draw_reliability(diagrams: Sequence[Diagram]) -> Figure:
    """How often answers are right against how sure they are, with how many there are of each.

    Args:
        diagrams: as the scores are and, where there is a temperature, calibrated.
    """
    figure = Figure(figsize=(5.5 * len(diagrams), 4.2), layout="constrained")
    plots = figure.subplots(1, len(diagrams), squeeze=False)[0]
    for axes, diagram in zip(plots, diagrams, strict=True):
        counts, bins = np.array(diagram.counts), len(diagram.counts)
        some, accuracy = counts > 0, np.array(diagram.accuracy)
        left = np.arange(bins) / bins
        bars = {"width": 1 / bins, "align": "edge"}
        axes.bar(left, counts / counts.sum(), color="C7", alpha=0.35, **bars, label="pictures")
        axes.bar(left[some], accuracy[some], fill=False, edgecolor="C0", **bars, label="right")
        axes.plot(
            np.array(diagram.confidence)[some],
            accuracy[some],
            color="C1",
            marker="o",
            label="right, at the mean confidence",
        )
        axes.plot([0, 1], [0, 1], color="C7", linestyle="--", label="as sure as right")
        axes.set(
            title="calibrated" if diagram.calibrated else "as the scores are",
            xlabel="confidence",
            ylabel="share",
            xlim=(0, 1),
            ylim=(0, 1.02),
        )
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_risk_coverage(curves: Sequence[Curve]) -> Figure:
    """The share of wrong answers where only the surest ones are given, by several scores."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for curve, style in zip(curves, ("-", "--", "-.", ":"), strict=False):
        label = f"by {curve.by}, AURC {100 * curve.aurc:.2f} %"
        axes.plot(100 * np.array(curve.coverage), 100 * np.array(curve.risk), style, label=label)
    axes.set(
        title="wrong answers among those that are given",
        xlabel="answered, % of the pictures, the surest first",
        ylabel="wrong, %",
        xlim=(0, 100),
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure as PNG."""
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_bytes(file, content.getvalue())
