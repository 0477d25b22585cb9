"""A table and the command line become jobs: which, with what settings, and what was left out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lamp_fast.clip.settings import TINY, USUAL_WEIGHTS, ClipConfig, in_folder
from lamp_fast.data.catalog import find
from lamp_fast.data.protocol import SIZE_GROUPS
from lamp_fast.data.settings import DataConfig
from lamp_fast.errors import InputError
from lamp_fast.fields import flag_of, format_layers, validate
from lamp_fast.jobs.identity import describe_clip
from lamp_fast.methods import METHODS
from lamp_fast.reproduce.jobs import Job
from lamp_fast.reproduce.layout import (
    ADJUSTED,
    ZEROSHOT,
    Column,
    Metric,
    Panel,
    PaperTable,
    Row,
    imbalance_panels,
    is_drawn,
    shot_panels,
)
from lamp_fast.reproduce.settings import ReproduceConfig
from lamp_fast.reproduce.tables import TABLES
from lamp_fast.runs.config import TrainConfig, change, default_config, parse_flags


@dataclass(frozen=True)
class Plan:
    """What a command asks for.

    Attributes:
        table: narrowed to the rows, columns and panels that were asked for.
        seeds: of every cell.
        remarks: what a reader of the table must know of what was changed or left out.
        whole: the columns are the paper's, so that averages are over the same data sets.
        clip: of every run.
        jobs: of (panel, row, column, seed) by title, scored on the run's own data or its target.
    """

    table: PaperTable
    seeds: tuple[int, ...]
    remarks: tuple[str, ...]
    whole: bool
    clip: ClipConfig
    jobs: Mapping[tuple[str, str, str, int], Job] = field(repr=False)

    def job(self, panel: Panel, row: Row, column: Column, seed: int, metric: Metric) -> Job:
        """The job whose outcome has a metric."""
        job = self.jobs[panel.title, row.title, column.key, seed]
        return replace(job, target=job.settings.data) if metric.timed else job

    def every_job(self) -> Iterator[Job]:
        """All of them, what a job needs before it; several may have one address."""
        timed = any(metric.timed for metric in self.table.metrics)
        for job in self.jobs.values():
            yield job.trained
            if job.target is not None:
                yield job
            if timed:
                yield replace(job, target=job.settings.data)


def make_plan(config: ReproduceConfig, flags: Sequence[str] = ()) -> Plan:
    """Expand a table.

    Args:
        config: of the command line.
        flags: of ``lamp_fast.train``, for every run.

    Raises:
        InputError: the first argument that cannot be served.
    """
    table, remarks = _narrow(config)
    seeds = tuple(dict.fromkeys(config.seeds))
    if not seeds:
        raise InputError("--seeds: expected at least one")
    jobs, kept = {}, []
    build = _Settings(config, table, tuple(flags))
    depth = describe_clip(build.clip)[1]
    by_size = any(metric.key in SIZE_GROUPS for metric in table.metrics)
    for row in table.rows:
        too_deep = None
        for panel in table.panels:
            for column in table.columns:
                for seed in seeds:
                    trained = build(panel, row, column, seed)
                    if row.method == "lamp" and max(trained.own.layers) > depth:
                        too_deep = format_layers(trained.own.layers)
                        continue
                    validate(trained)
                    part = panel.title if column.imb is None else f"imb {column.imb:g}"
                    target = trained.data if row.tte else None
                    if column.target is not None:
                        target = build.data(column.target, "all")
                    jobs[panel.title, row.title, column.key, seed] = Job(
                        trained,
                        target,
                        f"{row.title}, {part}",
                        tte=row.tte,
                        by_size=by_size and row.method == ZEROSHOT,
                    )
        if too_deep is None:
            kept.append(row)
        elif "lamp.layers" in row.settings:
            remarks.append(f"Left out: {row.title}; the CLIP has {depth} layers.")
        else:
            raise InputError(
                f"--clip {config.clip}: has {depth} layers, fewer than {too_deep} of --preset"
                f" {table.preset}; give another --preset, or -- --layers A..B"
            )
    if not kept:
        raise InputError(f"--clip {config.clip}: {table.name} has no row for {depth} layers")
    if flags:
        remarks.append(f"Every run: {' '.join(flags)}.")
    if config.epochs is not None:
        remarks.append(f"Every run: {config.epochs} epochs in place of the preset's.")
    written = TABLES[config.table]
    if table.preset != written.preset:
        remarks.append(f"LAMP's preset is {table.preset} in place of {written.preset}.")
    whole = set(table.data) == set(written.data) and table.source == written.source
    table = replace(table, rows=tuple(kept))
    return Plan(table, seeds, tuple(remarks), whole, build.clip, jobs)


class _Settings:
    """Builds the settings of runs: method or preset, the user's flags, then the table's own."""

    def __init__(self, config: ReproduceConfig, table: PaperTable, flags: tuple[str, ...]) -> None:
        self.config, self.table, self.flags = config, table, flags
        pretrained = config.pretrained
        if pretrained is None and config.clip != TINY and not in_folder(config.clip):
            pretrained = USUAL_WEIGHTS
        self.clip = ClipConfig(config.clip, pretrained, config.weights_of)
        self._bases: dict[tuple[str, str, int | None], TrainConfig] = {}

    def data(self, name: str, split: str) -> DataConfig:
        """A data set as a whole, nothing drawn from it."""
        return DataConfig(data=name, root=self.config.root, split=split).resolved()

    def __call__(self, panel: Panel, row: Row, column: Column, seed: int) -> TrainConfig:
        shots = panel.settings.get("data.shots")
        base = self._base(row.method, column.data, shots)
        data = replace(base.data, data=column.data, root=self.config.root, split=self.table.split)
        changes: dict[str, Any] = {"seed": seed, "clip": self.clip, "data": data}
        if self.config.epochs is not None:
            changes["optim.epochs"] = self.config.epochs
        if column.imb is not None:
            changes["data.imb"] = column.imb
        config = change(base, changes | dict(panel.settings) | dict(row.settings))
        return replace(config, data=config.data.resolved())

    def _base(self, method: str, data: str, shots: int | None) -> TrainConfig:
        key = method, data, shots
        if key not in self._bases:
            base = default_config(
                {
                    "method": method,
                    "data": data,
                    "split": self.table.split,
                    "clip": self.config.clip,
                    "shots": shots,
                    # LAMP's; what another method was published with is the method's own affair.
                    "preset": self.table.preset if method == "lamp" else None,
                }
            )
            if method != "lamp" or self.config.preset is None:
                base = change(base, self.table.defaults.get(method, {}))
            flags = self._flags_for(method)
            self._bases[key] = parse_flags(flags, base) if flags else base
        return self._bases[key]

    def _flags_for(self, method: str) -> list[str]:
        """The user's flags without those that other methods of the table have and this one has not:
        LAMP's layers go to LAMP's rows."""
        rows = {row.method for row in self.table.rows}
        own, others = (
            {flag_of(each.name) for name in names for each in fields(METHODS[name].Settings)}
            for names in ({method}, rows - {method})
        )
        kept: list[str] = []
        taken = True
        for word in self.flags:
            if word.startswith("--"):
                flag = word.partition("=")[0].replace("--no-", "--", 1)
                taken = flag in own or flag not in others
            kept += [word] if taken else []
        return kept


def _narrow(config: ReproduceConfig) -> tuple[PaperTable, list[str]]:
    """The table with the rows, columns and panels that were asked for, and remarks."""
    if config.table not in TABLES:
        raise InputError(f"{config.table}: expected one of {', '.join(TABLES)}")
    table, remarks = TABLES[config.table], []
    rows = table.rows
    for method in config.methods:
        if method not in METHODS:
            raise InputError(f"--methods {method}: expected some of {', '.join(METHODS)}")
        if method not in table.methods:
            if not table.every_method:
                known = ", ".join(table.methods)
                raise InputError(f"--methods {method}: {table.name} has {known} alone")
            entry = METHODS[method]
            adjusted = table.logit_adjusted and not entry.own_loss
            title = entry.title or method
            rows += (
                Row(f"{title}+LA" if adjusted else title, method, ADJUSTED if adjusted else {}),
            )
    if further := tuple(row.title for row in rows[len(table.rows) :]):
        remarks.append(f"Not in the published table: {', '.join(further)}.")
    if config.methods:
        rows = tuple(row for row in rows if row.method in config.methods)
    if absent := tuple(dict.fromkeys(row.title for row in rows if row.method not in METHODS)):
        remarks.append(f"Not implemented, so left out: {', '.join(absent)}.")
        rows = tuple(row for row in rows if row.method in METHODS)
    panels, ratios = table.panels, table.ratios
    data = tuple(map(_known, config.data)) or table.data
    if ratios and config.imb:
        if not any(map(is_drawn, data)):
            raise InputError(
                f"--imb {config.imb[0]:g}: {', '.join(data)} are long-tailed as they are, expected"
                " --data whose long tail is drawn"
            )
        ratios = tuple(dict.fromkeys(map(float, config.imb)))
    if table.remark is not None:
        remarks.append(table.remark)
    for flag, values, name, build in (
        ("--imb", () if ratios else config.imb, "data.imb", imbalance_panels),
        ("--shots", config.shots, "data.shots", shot_panels),
    ):
        if values and name not in panels[0].settings:
            raise InputError(f"{flag} {values[0]}: {table.name} has no such parts")
        panels = build(*values) if values else panels
    if config.source is not None and table.source is None:
        raise InputError(f"--source {config.source}: expected table3 or table4")
    return (
        replace(
            table,
            rows=rows,
            panels=panels,
            data=data,
            ratios=ratios,
            source=_known(config.source) if config.source else table.source,
            preset=config.preset or table.preset,
        ),
        remarks,
    )


def _known(data: str) -> str:
    """The catalog's spelling of a data set's name, which the paper's figures go by."""
    return find(data) or data
