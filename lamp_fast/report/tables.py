"""The tables of figures on the page about a run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lamp_fast.data.protocol import SIZE_GROUP_TITLES
from lamp_fast.runs import scoring
from lamp_fast.runs.reliability import Reliability, percent


def result_table(rows: Sequence[Mapping[str, Any]], union: bool) -> dict[str, Any]:
    """Header and lines of the closing table, without columns that nothing fills.

    Args:
        rows: of the run.
        union: see :func:`lamp_fast.runs.scoring.columns`.
    """
    columns = [
        (key, title)
        for key, title in scoring.columns(rows, union)
        if any(row.get(key) is not None for row in rows)
    ]
    return {
        "header": [title for _, title in columns],
        "rows": [
            {
                "name": row["name"],
                "values": [percent(row.get(key)) for key, _ in columns],
                "parameters": f"{row['parameters']:,}",
                "seconds": f"{row['seconds']:.1f}",
            }
            for row in rows
        ],
    }


def by_class_table(
    rows: Sequence[Mapping[str, Any]], classes: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Lines of figures that give each class the same weight, a value a row of the closing table.

    Without lines that nothing fills: a run of 0.2.0 has none at all.
    """
    sizes = Counter(each["size_group"] for each in classes)
    base = ", base classes" if any(each["half"] == "new" for each in classes) else ""
    titles = {
        **{
            group: f"{title}, classes: {sizes[group]}" for group, title in SIZE_GROUP_TITLES.items()
        },
        "balanced_base": f"balanced accuracy{base}",
        "worst_base": f"worst class{base}",
        "geometric_mean_base": f"geometric mean{base}",
        "harmonic_mean_base": f"harmonic mean{base}",
        "balanced_new": "balanced accuracy, new classes",
        "worst_new": "worst class, new classes",
    }
    lines = []
    for key, title in titles.items():
        values = [row.get(key) for row in rows]
        if all(value is None for value in values):
            continue
        shown = [*map(percent, values)]
        if key.startswith("worst_"):
            named = [row.get(key.replace("worst_", "worst_class_")) for row in rows]
            shown = [
                value if name is None else f"{name}: {value}"
                for name, value in zip(named, shown, strict=True)
            ]
        lines.append({"title": title, "values": shown})
    return lines


def reliability_table(found: Reliability) -> dict[str, Any]:
    """How far answers can be trusted: header and lines by group of classes, and what is beside."""
    titles = {"accuracy": "accuracy", "ece": "ECE", "ece_calibrated": "ECE, calibrated"}
    sets = found.class_gap is not None
    if sets:
        titles |= {"covered": f"in sets of {100 * found.coverage:g} %", "empty_sets": "empty sets"}
    rows = [
        {
            "name": each.name,
            "pictures": f"{each.pictures:,}",
            "values": [
                *(percent(getattr(each, name)) for name in titles),
                *([f"{each.set_size:.2f}"] if sets else []),
            ],
        }
        for each in found.groups
    ]
    return {
        "about": found.about,
        "header": [*titles.values(), *(["names a set"] if sets else [])],
        "rows": rows,
        "calibrated": any(each.calibrated for each in found.diagrams),
        "coverage": f"{100 * found.coverage:g}",
        "class_gap": percent(found.class_gap) if sets else None,
        "why_no_sets": found.why_no_sets,
        "areas": [(each.by, percent(each.aurc)) for each in found.curves],
    }
