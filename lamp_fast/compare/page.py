"""The page about a comparison: one HTML file that loads nothing and runs no script."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from lamp_fast.compare.results import p_value, percent, seconds
from lamp_fast.compare.work import TESTED
from lamp_fast.pages import page_environment
from lamp_fast.report import drawing

TEMPLATE = "page.html.jinja"
CHOSEN, OTHER = "#c4302b", "#2f6fde"


def build_page(record: Mapping[str, Any]) -> str:
    """One HTML page.

    Args:
        record: see :func:`lamp_fast.compare.results.build_record`, with its ``warnings``.
    """
    filters = {"percent": percent, "seconds": seconds, "p_value": p_value, "points": points}
    tested = tested_rows(record)
    shown = {row["method"]: row for row in tested}
    chosen = shown.get(record["chosen"])
    beside = [row for row in (shown.get("zeroshot"),) if row is not None and row is not chosen]
    return (
        page_environment(__file__, **filters)
        .get_template(TEMPLATE)
        .render(
            title=f"Methods compared on {record['data']['name']}",
            record=record,
            tested=tested,
            others=[row for row in record["rows"] if row["state"] != TESTED],
            chosen=chosen,
            beside=([chosen] if chosen else []) + beside,
            svg=_svgs(record, tested),
        )
    )


def tested_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The methods that were tested, as validation ranks them, each with its number on the page."""
    rows = [row for row in record["rows"] if row["state"] == TESTED]
    rows.sort(key=lambda row: -row["validation"]["macro_f1"]["value"])
    return [{**row, "number": number} for number, row in enumerate(rows, 1)]


def points(against: Mapping[str, Any]) -> str:
    """A difference in percentage points with its interval: ``+3.1 [-0.4, +6.0]``."""
    low, high = against["interval"]
    return f"{100 * against['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _svgs(record: Mapping[str, Any], tested: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    if not tested:
        return {}
    with matplotlib.rc_context(drawing.STYLE):
        drawings = {
            "intervals": draw_intervals(tested, record["chosen"]),
            "costs": draw_costs(tested, record["chosen"]),
        }
        return {name: drawing.to_svg(figure, name) for name, figure in drawings.items()}


def draw_intervals(tested: Sequence[Mapping[str, Any]], chosen: str) -> Figure:
    """Macro-F1 on the test pictures with its interval, and on the validation pictures, a line a
    method, the one that validation prefers on top."""
    figure = Figure(figsize=(5.2, 1.1 + 0.27 * len(tested)), layout="constrained")
    axes = figure.subplots()
    places = range(len(tested), 0, -1)
    for place, row in zip(places, tested, strict=True):
        colour = CHOSEN if row["method"] == chosen else OTHER
        test = row["test"]["macro_f1"]
        low, high = (100 * each for each in test["interval"])
        first = place == len(tested)
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(100 * test["value"], place, "o", color=colour, label="test" if first else None)
        axes.plot(
            100 * row["validation"]["macro_f1"]["value"],
            place,
            "D",
            markerfacecolor="none",
            markeredgecolor="gray",
            label="validation" if first else None,
        )
    axes.set_yticks(list(places), [_plain(row) for row in tested])
    axes.set_xlabel("macro-F1 in %; 95% interval on the test pictures")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _open_frame(axes)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, labelcolor=drawing.INK)
    return figure


def draw_costs(tested: Sequence[Mapping[str, Any]], chosen: str) -> Figure:
    """Macro-F1 on the test pictures over the seconds that fit and test took; numbers are those of
    the table."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for row in tested:
        colour = CHOSEN if row["method"] == chosen else OTHER
        at = row["took_seconds"], 100 * row["test"]["macro_f1"]["value"]
        axes.plot(*at, "o", color=colour, markersize=5)
        axes.annotate(str(row["number"]), at, xytext=(5, 3), textcoords="offset points", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlabel("seconds that fit and test took")
    axes.set_ylabel("macro-F1 on the test pictures in %")
    axes.grid(alpha=0.3)
    axes.margins(x=0.08, y=0.12)
    _open_frame(axes)
    return figure


def _open_frame(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _plain(row: Mapping[str, Any]) -> str:
    """Dollars begin no formula."""
    return f"{row['number']}  {row['title']}".replace("$", r"\$")
