"""A table as Markdown, LaTeX, CSV, JSON and, for a figure of the paper, a picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import LATEX_ESCAPE_RULES, tabulate

from lamp_fast.fields import format_layers
from lamp_fast.files import write_bytes, write_csv, write_json
from lamp_fast.reproduce import paper
from lamp_fast.reproduce.layout import AVERAGE, AVERAGE_TITLE, METHOD, Metric, Panel, Plot, Row
from lamp_fast.reproduce.plan import Plan
from lamp_fast.reproduce.results import Cell, Key, best
from lamp_fast.runs.figures import save_figure
from lamp_fast.runs.stats import PairedTest

# The paper prints so many data sets beside each other, and so many figures of them.
COLUMNS_ABREAST, FIGURES_ABREAST = 6, 18
NOTHING = "-"

Tests = Mapping[tuple[str, str], Mapping[tuple[str, str], PairedTest | None]]


@dataclass(frozen=True)
class Drawn:
    """A training set: its pictures, and those of its largest and its smallest class."""

    panel: str
    data: str
    cap: int | None
    pictures: int
    most: int
    least: int


@dataclass(frozen=True)
class Rendered:
    """A table with everything that is shown of it.

    Attributes:
        plan: what was asked for.
        cells: by (panel, row, column, metric).
        tests: of pairs of rows, by (panel, metric).
        remarks: below the table, first what decides whether figures can be compared.
        drawn: what was trained on.
        codes: the code identity of each method.
    """

    plan: Plan
    cells: Mapping[Key, Cell]
    tests: Tests
    remarks: Sequence[str]
    drawn: Sequence[Drawn] = ()
    codes: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(key, title) of each column, the average last."""
        table = self.plan.table
        found = [(each.key, each.title) for each in table.columns]
        return found + ([(AVERAGE, AVERAGE_TITLE)] if table.averaged else [])

    @property
    def notes(self) -> list[dict[str, str]]:
        """Footnotes about figures of the paper that are shown."""
        shown = [key for key, cell in self.cells.items() if cell.paper is not None]
        names = self.plan.table.paper_rows
        return [
            note
            for note in paper.footnotes(self.plan.table.name)
            if any(_is_about(note, key, names[key[1]]) for key in shown)
        ]

    def marks(self, key: Key) -> list[int]:
        """Numbers, from 1, of the footnotes about a cell's paper figure."""
        if self.cells[key].paper is None:
            return []
        row = self.plan.table.paper_rows[key[1]]
        return [number for number, note in enumerate(self.notes, 1) if _is_about(note, key, row)]


def _is_about(note: Mapping[str, str], key: Key, paper_row: str | None) -> bool:
    panel, _, column, metric = key
    of = {"panel": panel, "row": paper_row, "column": column, "metric": metric}
    return all(note.get(name, value) == value for name, value in of.items())


def write_table(rendered: Rendered, folder: Path) -> list[Path]:
    """Write every form of a table below ``folder``; returns the files."""
    table = rendered.plan.table
    files = [folder / f"{table.name}.{kind}" for kind in ("md", "tex", "csv", "json")]
    write_bytes(files[0], markdown(rendered).encode())
    write_bytes(files[1], latex(rendered).encode())
    write_csv(files[2], *flat(rendered))
    write_json(files[3], record(rendered))
    if table.plot is not None:
        files.append(folder / f"{table.name}.png")
        save_figure(draw(rendered, table.plot), files[-1])
    return files


def markdown(rendered: Rendered) -> str:
    """The table with its remarks, footnotes and tests."""
    table, bold = rendered.plan.table, best(rendered.plan, rendered.cells)
    metrics = table.metrics
    parts = [f"# {_headline(rendered)}"]
    for panel in table.panels:
        parts.append(f"## {panel.title}")
        for columns in _blocks(rendered.columns, len(table.metrics)):
            titles = [f"{title}<br>{each.title}" for (_, title), each in product(columns, metrics)]
            body = _body(rendered, panel, columns, partial(_markdown_cell, rendered, bold))
            parts.append(_github(["", *titles], body))
    notes = [f"[{number}] {note['text']}" for number, note in enumerate(rendered.notes, 1)]
    parts += [*rendered.remarks, *notes]
    if rendered.drawn:
        parts += ["## Training pictures", _drawn_table(rendered.drawn)]
    if any(tests for tests in rendered.tests.values()):
        parts += ["## Paired tests", _tests_table(rendered), TESTS_REMARK]
    return "\n\n".join(parts) + "\n"


TESTS_REMARK = (
    "Difference: first - second, the mean over data sets of the mean over seeds. p (pairs):"
    " two-sided sign-flip permutation test over all pairs of data set and seed; it speaks of these"
    " data sets. p (data sets): Wilcoxon's signed-rank test over the data sets' mean differences;"
    " n/a below six, where it cannot reach 0.05. Neither is corrected for the number of tests."
)


def _tests_table(rendered: Rendered) -> str:
    titles = {metric.key: metric.title for metric in rendered.plan.table.metrics}
    body = [
        (first, second, panel, titles[metric], f"{test.difference:+.2f}",
         f"{test.pairs} / {test.data_sets}", _p_value(test.p_pairs), _p_value(test.p_data_sets))
        for (first, second), tests in rendered.tests.items()
        for (panel, metric), test in tests.items()
        if test is not None
    ]  # fmt: skip
    header = ("first", "second", "", "metric", "difference", "pairs / data sets", "p (pairs)",
              "p (data sets)")  # fmt: skip
    return _github(header, body, texts=4)


def _drawn_table(drawn: Sequence[Drawn]) -> str:
    header = ["", "", "cap", "pictures", "largest class", "smallest class", "realised imbalance"]
    body = [
        [each.data, each.panel, "none" if each.cap is None else str(each.cap),
         f"{each.pictures:,}", f"{each.most:,}", f"{each.least:,}",
         f"{each.most / each.least:.4g}"]
        for each in drawn
    ]  # fmt: skip
    return _github(header, body, texts=2)


def _p_value(value: float | None) -> str:
    if value is None:
        return "n/a"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _github(header: Sequence[str], body: Sequence[Sequence[str]], texts: int = 1) -> str:
    alignment = ["left"] * texts + ["right"] * (len(header) - texts)
    return tabulate(body, header, tablefmt="github", colalign=alignment, disable_numparse=True)


def _headline(rendered: Rendered) -> str:
    table = rendered.plan.table
    for kind in ("table", "figure"):
        if table.name.startswith(kind):
            return f"{kind.capitalize()} {table.name.removeprefix(kind)}: {table.caption}"
    return table.caption


def _blocks(columns: Sequence[tuple[str, str]], metrics: int) -> list[Sequence[tuple[str, str]]]:
    abreast = min(COLUMNS_ABREAST, max(1, FIGURES_ABREAST // metrics))
    return [columns[start : start + abreast] for start in range(0, len(columns), abreast)]


def _body(
    rendered: Rendered,
    panel: Panel,
    columns: Sequence[tuple[str, str]],
    show: Callable[[Key, Metric], str],
) -> list[list[str]]:
    """Of each row its title, and what is shown of its cells; of published rows those with any."""
    table = rendered.plan.table
    crossed = list(product(columns, table.metrics))

    def keys(row: str) -> list[Key]:
        return [(panel.title, row, column, metric.key) for (column, _), metric in crossed]

    rows = {title: keys(title) for title in table.paper_rows}
    for title in table.published:
        if all(rendered.cells[key].paper is None for key in rows[title]):
            del rows[title]
    return [
        [title, *(show(key, metric) for key, (_, metric) in zip(each, crossed, strict=True))]
        for title, each in rows.items()
    ]


def _number(value: float, metric: Metric) -> str:
    return f"{value:,.0f}" if metric.unit in ("", "MiB") else f"{value:.2f}"


def _spread(cell: Cell, metric: Metric) -> str | None:
    """None where there is nothing that could vary."""
    if cell.spread is None or metric.unit == "":
        return None
    return _number(cell.spread, metric)


def _markdown_cell(rendered: Rendered, bold: set[Key], key: Key, metric: Metric) -> str:
    cell = rendered.cells[key]
    if cell.mean is None:
        shown = NOTHING
    else:
        shown = _number(cell.mean, metric)
        shown = f"**{shown}**" if key in bold else shown
        if (spread := _spread(cell, metric)) is not None:
            shown += f" ± {spread}"
        if cell.missing:
            shown += f" ({cell.asked - cell.missing} of {cell.asked} seeds)"
    if cell.paper is not None:
        marks = "".join(f" [{number}]" for number in rendered.marks(key))
        word = paper.origin(rendered.plan.table.name).word
        shown += f" ({word} {_number(cell.paper, metric)}{marks})"
    return shown


def latex(rendered: Rendered) -> str:
    """The table for a paper that uses booktabs; remarks and footnotes below it."""
    table, bold = rendered.plan.table, best(rendered.plan, rendered.cells)
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        f"\\caption{{{_escape(table.caption)}.}}",
        f"\\label{{tab:{table.name}}}",
        "\\centering\\scriptsize",
    ]
    metrics = [_escape(each.title) for each in table.metrics]
    count = len(metrics)
    for panel in table.panels:
        for columns in _blocks(rendered.columns, len(table.metrics)):
            heads = [f"\\multicolumn{{{count}}}{{c}}{{{_escape(title)}}}" for _, title in columns]
            starts = range(2, 2 + count * len(columns), count)
            lines += [
                f"\\begin{{tabular}}{{l{'c' * count * len(columns)}}}",
                "\\toprule",
                _latex_line([_escape(panel.title), *heads]),
                "".join(f"\\cmidrule(lr){{{each}-{each + count - 1}}}" for each in starts),
                _latex_line(["", *metrics * len(columns)]),
                "\\midrule",
            ]
            body = _body(rendered, panel, columns, partial(_latex_cell, rendered, bold))
            lines += [_latex_line([_escape(title), *cells]) for title, *cells in body]
            lines += ["\\bottomrule", "\\end{tabular}", "\\par\\medskip"]
    lines += [f"{_escape(each)}\\par" for each in rendered.remarks]
    lines += [
        f"$^{{{number}}}$ {_escape(note['text'])}\\par"
        for number, note in enumerate(rendered.notes, 1)
    ]
    return "\n".join([*lines, "\\end{table}"]) + "\n"


def _latex_line(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _latex_cell(rendered: Rendered, bold: set[Key], key: Key, metric: Metric) -> str:
    cell = rendered.cells[key]
    if cell.mean is None:
        shown = "--"
    else:
        shown = _number(cell.mean, metric)
        shown = f"\\textbf{{{shown}}}" if key in bold else shown
        if (spread := _spread(cell, metric)) is not None:
            shown += f" $\\pm$ {spread}"
        if cell.missing:
            shown += f" [{cell.asked - cell.missing}/{cell.asked}]"
    if cell.paper is not None:
        marks = ",".join(map(str, rendered.marks(key)))
        raised = f"$^{{{marks}}}$" if marks else ""
        shown += f" ({_number(cell.paper, metric)}{raised})"
    return shown


def _escape(text: str) -> str:
    return "".join(LATEX_ESCAPE_RULES.get(each, each) for each in text)


CSV_HEADER = (
    "table", "panel", "row", "method", "column", "metric", "unit", "mean", "std", "seeds",
    "paper",
)  # fmt: skip


def flat(rendered: Rendered) -> tuple[Sequence[str], list[list[Any]]]:
    """Header and one line a cell."""
    table = rendered.plan.table
    methods = {row.title: row.method for row in table.rows}
    units = {metric.key: metric.unit for metric in table.metrics}
    lines = [
        [table.name, panel, row, methods.get(row, ""), column, metric, units[metric],
         _rounded(cell.mean), _rounded(cell.spread), len(cell.values),
         "" if cell.paper is None else cell.paper]
        for (panel, row, column, metric), cell in rendered.cells.items()
    ]  # fmt: skip
    return CSV_HEADER, lines


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def record(rendered: Rendered) -> dict[str, Any]:
    """The table with the run folders, below the queue's, of every value."""
    plan = rendered.plan
    return {
        "table": plan.table.name,
        "preset": plan.table.preset,
        "clip": {"clip": plan.clip.clip, "pretrained": plan.clip.pretrained},
        "seeds": list(plan.seeds),
        "code": dict(rendered.codes),
        "drawn": [vars(each) for each in rendered.drawn],
        "remarks": list(rendered.remarks),
        "footnotes": [note["text"] for note in rendered.notes],
        "cells": [
            {
                "panel": panel,
                "row": row,
                "column": column,
                "metric": metric,
                "mean": cell.mean,
                "std": cell.spread,
                "paper": cell.paper,
                "seeds": {
                    str(seed): {"value": value, "runs": list(cell.runs[seed])}
                    for seed, value in cell.by_seed.items()
                },
            }
            for (panel, row, column, metric), cell in rendered.cells.items()
        ],
        "tests": [
            {"first": first, "second": second, "panel": panel, "metric": metric, **vars(test)}
            for (first, second), tests in rendered.tests.items()
            for (panel, metric), test in tests.items()
            if test is not None
        ],
    }


def draw(rendered: Rendered, plot: Plot) -> Figure:
    """The figure as the paper draws it: a grid of means, or a line with its spread a metric."""
    if plot.vertical is not None:
        return _draw_grid(rendered, plot)
    table = rendered.plan.table
    metrics, columns = table.metrics, rendered.columns
    figure = Figure(figsize=(4.2 * len(columns), 3.0 * len(table.panels)), layout="constrained")
    grid = figure.subplots(len(table.panels), len(columns), squeeze=False)
    for line, panel in zip(grid, table.panels, strict=True):
        for axes, (column, title) in zip(line, columns, strict=True):
            for metric, colour in zip(metrics, ("C0", "C1"), strict=False):
                for reading, style in ((METHOD, "-"), ("transductive", ":")):
                    rows = [row for row in table.rows if row.reading == reading]
                    if rows:
                        label = metric.title + (", b_new on new" if style == ":" else "")
                        _draw_line(
                            axes,
                            rendered,
                            panel,
                            rows,
                            column,
                            metric,
                            plot,
                            {"color": colour, "linestyle": style, "label": label},
                        )
            axes.set(title=f"{title}, {panel.title}", xlabel=plot.label, ylabel="%")
            axes.grid(alpha=0.3)
    grid.flat[0].legend(frameon=False, fontsize=7)
    return figure


def _draw_line(
    axes: Axes, rendered: Rendered, panel: Panel, rows: Sequence[Row], column: str,
    metric: Metric, plot: Plot, style: Mapping[str, Any],
) -> None:  # fmt: skip
    labels = [_tick(row.settings[plot.axis]) for row in rows]
    cells = [rendered.cells[panel.title, row.title, column, metric.key] for row in rows]
    means = np.array([np.nan if cell.mean is None else cell.mean for cell in cells])
    spreads = np.array([cell.spread or 0.0 for cell in cells])
    axes.plot(labels, means, marker=".", **style)
    axes.fill_between(labels, means - spreads, means + spreads, color=style["color"], alpha=0.15)


def _draw_grid(rendered: Rendered, plot: Plot) -> Figure:
    table = rendered.plan.table
    (metric,) = table.metrics
    shown = [
        (panel, column, title, reading, [row for row in table.rows if row.reading == reading])
        for panel in table.panels
        for column, title in rendered.columns
        for reading in dict.fromkeys(row.reading for row in table.rows)
    ]
    figure = Figure(figsize=(4.4 * len(shown), 3.6), layout="constrained")
    for axes, (panel, column, title, reading, rows) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
    ):
        across = list(dict.fromkeys(row.settings[plot.axis] for row in rows))
        upward = list(dict.fromkeys(row.settings[plot.vertical] for row in rows))
        values = np.full((len(upward), len(across)), np.nan)
        for row in rows:
            mean = rendered.cells[panel.title, row.title, column, metric.key].mean
            place = upward.index(row.settings[plot.vertical]), across.index(row.settings[plot.axis])
            values[place] = np.nan if mean is None else mean
        axes.imshow(values, origin="lower", cmap="viridis")
        for (at_up, at_across), value in np.ndenumerate(values):
            text = NOTHING if np.isnan(value) else f"{value:.2f}"
            axes.text(
                at_across,
                at_up,
                text,
                ha="center",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
            )
        axes.set_xticks(range(len(across)), across)
        axes.set_yticks(range(len(upward)), upward)
        marked = "" if reading == METHOD else ", b_new on new"
        axes.set(
            title=f"{title}, {panel.title}{marked}", xlabel=plot.label, ylabel=plot.vertical_label
        )
    figure.suptitle("mean of HM-A and HM-M, %", fontsize=9)
    return figure


def _tick(value: Any) -> str:
    return format_layers(value) if isinstance(value, tuple) else f"{value:g}"
