"""Outcomes of jobs become the cells of a table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from lamp_fast.reproduce.jobs import Job
from lamp_fast.reproduce.layout import AVERAGE, METHOD, ZEROSHOT, Metric, Panel, Row
from lamp_fast.reproduce.paper import paper_figure
from lamp_fast.reproduce.plan import Plan
from lamp_fast.runs import stats

JobResult = Mapping[str, Any]
Key = tuple[str, str, str, str]

MIB = 1024**2


@dataclass(frozen=True)
class Cell:
    """One figure of a table, in the unit that is shown.

    Attributes:
        by_seed: the value of each seed that is there.
        runs: the run folders that each seed's value comes from.
        asked: how many seeds there should be.
        drawn: whether seeds differ at all; zero-shot CLIP is one run whatever the seed.
        paper: the paper's figure.
    """

    by_seed: Mapping[int, float]
    runs: Mapping[int, tuple[str, ...]]
    asked: int
    drawn: bool
    paper: float | None = None

    @property
    def values(self) -> tuple[float, ...]:
        """Of distinct runs."""
        return tuple(dict(zip(self.runs.values(), self.by_seed.values(), strict=True)).values())

    @property
    def mean(self) -> float | None:
        """Over seeds."""
        return stats.mean(self.values)

    @property
    def spread(self) -> float | None:
        """Over seeds, see :func:`lamp_fast.runs.stats.spread`."""
        return stats.spread(self.values)

    @property
    def missing(self) -> int:
        """Seeds without a value."""
        return self.asked - len(self.by_seed)


def read_cells(plan: Plan, outcome: Callable[[Job], JobResult | None]) -> dict[Key, Cell]:
    """Every cell by (panel, row, column, metric), the average column included.

    Args:
        plan: the table.
        outcome: of a job; None where it has none.
    """
    cells: dict[Key, Cell] = {}
    table = plan.table
    for panel in table.panels:
        for row in table.rows:
            for metric in table.metrics:
                for column in table.columns:
                    by_seed, runs = {}, {}
                    for seed in plan.seeds:
                        found = outcome(plan.job(panel, row, column, seed, metric))
                        value = None if found is None else read_metric(metric, row.reading, found)
                        if value is not None:
                            by_seed[seed], runs[seed] = value, (found["run"],)
                    cell = Cell(by_seed, runs, len(plan.seeds), row.method != ZEROSHOT)
                    cells[panel.title, row.title, column.key, metric.key] = cell
                if table.averaged:
                    key = (panel.title, row.title, AVERAGE, metric.key)
                    cells[key] = _average(cells, plan, panel, row, metric)
        for title, column, metric in product(table.published, table.columns, table.metrics):
            key = panel.title, title, column.key, metric.key
            cells[key] = Cell({}, {}, asked=0, drawn=False)
    return {key: _beside_paper(plan, key, cell) for key, cell in cells.items()}


def read_metric(metric: Metric, reading: str, outcome: JobResult) -> float | None:
    """A metric in the unit that is shown; None where the outcome lacks it."""
    row, figures = outcome["rows"].get(reading), outcome["figures"]
    values = []
    for source in metric.sources or (metric.key,):
        if source in figures:
            values.append(figures[source])
        else:
            values.append(None if row is None else row.get(source))
    if None in values:
        return None
    return sum(values) / len(values) * {"%": 100, "MiB": 1 / MIB}.get(metric.unit, 1)


def _average(cells: Mapping[Key, Cell], plan: Plan, panel: Panel, row: Row, metric: Metric) -> Cell:
    """Per seed the mean over data sets, where all of them have that seed."""
    of = [cells[panel.title, row.title, key, metric.key] for key in plan.table.averaged]
    complete = [seed for seed in plan.seeds if all(seed in each.by_seed for each in of)]
    return replace(
        of[0],
        by_seed={seed: sum(each.by_seed[seed] for each in of) / len(of) for seed in complete},
        runs={seed: sum((each.runs[seed] for each in of), ()) for seed in complete},
    )


def _beside_paper(plan: Plan, key: Key, cell: Cell) -> Cell:
    panel, title, column, metric = key
    if column == AVERAGE and not plan.whole:
        return cell
    row = plan.table.paper_rows[title]
    return replace(cell, paper=paper_figure(plan.table.name, panel, row, column, metric))


def compare(
    plan: Plan, cells: Mapping[Key, Cell], first: str, second: str
) -> dict[tuple[str, str], stats.PairedTest | None]:
    """Paired tests of two rows by (panel, metric key), over data sets and seeds.

    A data set that has a column for each of several ratios is one data set.
    """
    table = plan.table
    columns = [each for each in table.columns if each.key in table.averaged] or table.columns

    def values(panel: str, row: str, metric: str) -> dict[tuple[str, tuple[float, int]], float]:
        return {
            (column.target or column.data, (column.imb or 0.0, seed)): value
            for column in columns
            for seed, value in cells[panel, row, column.key, metric].by_seed.items()
        }

    return {
        (panel.title, metric.key): stats.paired_test(
            values(panel.title, first, metric.key), values(panel.title, second, metric.key)
        )
        for panel in table.panels
        for metric in table.metrics
        if metric.unit == "%"
    }


def default_pairs(plan: Plan) -> list[tuple[str, str]]:
    """LAMP against every other row; where each row is LAMP, none is the one to compare with."""
    titles = [row.title for row in plan.table.rows]
    if "LAMP" not in titles:
        return []
    return [("LAMP", title) for title in titles if title != "LAMP"]


def best(plan: Plan, cells: Mapping[Key, Cell]) -> set[Key]:
    """The best mean of each column among rows that see no new-class picture, ties included."""
    found = set()
    table = plan.table
    rows = [row for row in table.rows if row.reading == METHOD]
    for metric in table.metrics:
        for panel in table.panels:
            for column in {key[2] for key in cells}:
                keys = [(panel.title, row.title, column, metric.key) for row in rows]
                means = {key: cells[key].mean for key in keys if cells[key].mean is not None}
                if len(means) > 1:
                    most = (min if metric.lowest else max)(means.values())
                    found |= {key for key, value in means.items() if value == most}
    return found
