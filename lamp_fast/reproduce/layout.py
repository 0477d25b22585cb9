"""What a table is made of: panels, rows, columns and metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lamp_fast.data.settings import DataConfig

TITLES = {
    "caltech101": "Caltech101",
    "oxford_pets": "OxfordPets",
    "stanford_cars": "StanfordCars",
    "flowers102": "Flowers102",
    "food101": "Food101",
    "fgvc_aircraft": "FGVCAircraft",
    "sun397": "SUN397",
    "dtd": "DTD",
    "eurosat": "EuroSAT",
    "ucf101": "UCF101",
    "imagenet": "ImageNet",
    "imagenetv2": "ImageNet-V2",
    "imagenet_sketch": "ImageNet-S",
    "imagenet_a": "ImageNet-A",
    "imagenet_r": "ImageNet-R",
    "imagenet_lt": "ImageNet-LT",
    "places_lt": "Places-LT",
    "inaturalist2018": "iNaturalist 2018",
    "cifar100_lt": "CIFAR-100-LT",
    "digits": "Digits",
}

AVERAGE = "average"
AVERAGE_TITLE = "Average"
ZEROSHOT = "zeroshot"

METHOD, TRANSDUCTIVE = "method", "transductive"
MARK = "b_new on new (transductive)"
ADJUSTED = {"optim.logit_adjustment": True}


@dataclass(frozen=True)
class Metric:
    """A figure of a job's outcome.

    Attributes:
        key: its name in outcomes and in the paper's file.
        title: the column's heading.
        sources: what it is the mean of; by default the key itself.
        unit: "%" of values in 0..1, "s", "MiB" or "" (a count).
        timed: read from a separate pass over the test pictures, which is a job of its own.
        lowest: whether less is better.
    """

    key: str
    title: str
    sources: tuple[str, ...] = ()
    unit: str = "%"
    timed: bool = False
    lowest: bool = False


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        title: as shown.
        method: as ``--method`` names it.
        settings: what the row changes, by dotted name.
        reading: which of a run's rows: METHOD, or TRANSDUCTIVE for the bias adapted on unlabelled
            pictures of the new classes, which only LAMP gets.
        paper: the row of the paper's table beside it.
        tte: scored on five crops, see ``--tte``: the runs of the same row without it, once more.
    """

    title: str
    method: str = "lamp"
    settings: Mapping[str, Any] = field(default_factory=dict)
    reading: str = METHOD
    paper: str | None = None
    tte: bool = False


@dataclass(frozen=True)
class Panel:
    """A part of a table: one imbalance ratio, or one number of shots."""

    title: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A data set, or the same trained run on another one.

    Attributes:
        key: its name in the paper's file.
        data: trained on.
        target: scored on; None for the test pictures of ``data``.
        imb: the imbalance ratio, where not the panel has it.
    """

    key: str
    data: str
    target: str | None = None
    imb: float | None = None

    @property
    def title(self) -> str:
        """As shown."""
        return TITLES.get(self.target, self.target) if self.target else self.trained

    @property
    def trained(self) -> str:
        """What its runs are trained on, as shown."""
        name = TITLES.get(self.data, self.data)
        return name if self.imb is None else f"{name}, imb {self.imb:g}"


@dataclass(frozen=True)
class Plot:
    """How a figure of the paper is drawn.

    Attributes:
        label: of the horizontal axis.
        axis: the setting along it.
        vertical: the second setting of a grid; none draws lines.
    """

    label: str
    axis: str
    vertical: str | None = None
    vertical_label: str = ""


@dataclass(frozen=True)
class PaperTable:
    """One table or figure of the paper or its field.

    Attributes:
        name: on the command line.
        caption: above it.
        preset: LAMP's settings; other methods have their own, as published.
        panels: of the paper.
        rows: the paper's, and ours between them.
        data: its columns; for a table of transfer its targets.
        metrics: under each column.
        source: trained on, where the columns are targets.
        split: "base-new" or "all", see ``--split``.
        every_method: whether further methods may be asked for.
        logit_adjusted: further methods are trained with logit adjustment, as the paper's are.
        average: whether the last column averages the others.
        plot: of a figure.
        ratios: imbalance ratios that are columns, not panels: one each of a data set whose long
            tail is drawn. A data set that is long-tailed as it is has one column.
        defaults: by method, what takes the place of its preset's values; flags come after it.
        published: rows of figures that others have published, without runs of ours.
        remark: what every reader of it must know.
    """

    name: str
    caption: str
    preset: str
    panels: tuple[Panel, ...]
    rows: tuple[Row, ...]
    data: tuple[str, ...]
    metrics: tuple[Metric, ...]
    source: str | None = None
    split: str = "base-new"
    every_method: bool = False
    logit_adjusted: bool = False
    average: bool = False
    plot: Plot | None = None
    ratios: tuple[float, ...] = ()
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: tuple[str, ...] = ()
    remark: str | None = None

    @property
    def columns(self) -> tuple[Column, ...]:
        """One a data set, or a ratio of it; the source first where there is one."""
        if self.ratios:
            return tuple(column for data in self.data for column in self._by_ratio(data))
        if self.source is None:
            return tuple(Column(each, each) for each in self.data)
        targets = (Column(each, self.source, each) for each in self.data if each != self.source)
        return (Column(self.source, self.source), *targets)

    def _by_ratio(self, data: str) -> tuple[Column, ...]:
        if not is_drawn(data):
            return (Column(data, data),)
        return tuple(Column(f"{data}, imb {each:g}", data, imb=each) for each in self.ratios)

    @property
    def averaged(self) -> tuple[str, ...]:
        """Keys of the columns that the last one averages, never the source; none without one."""
        keys = tuple(each.key for each in self.columns if each.key != self.source)
        return keys if self.average and len(keys) > 1 else ()

    @property
    def methods(self) -> tuple[str, ...]:
        """Of its rows, each once."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    @property
    def paper_rows(self) -> Mapping[str, str | None]:
        """By title, the row of the paper's file beside each row, those of figures alone last."""
        return {row.title: row.paper for row in self.rows} | {each: each for each in self.published}


def is_drawn(data: str) -> bool:
    """Whether a data set's long tail is drawn, and not its own."""
    return DataConfig(data=data).protocol.imb > 1


def imbalance_panels(*ratios: float) -> tuple[Panel, ...]:
    """One panel an imbalance ratio."""
    return tuple(Panel(f"imb {each:g}", {"data.imb": float(each)}) for each in ratios)


def shot_panels(*numbers: int) -> tuple[Panel, ...]:
    """One panel a number of pictures a class."""
    return tuple(
        Panel(f"{each} shot{'s' if each > 1 else ''}", {"data.shots": each}) for each in numbers
    )
