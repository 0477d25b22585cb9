"""What each table and figure of the paper is: rows, columns and settings, and nothing else.

A table is panels x rows x columns x seeds. Every combination is one job, see :mod:`.jobs`; a cell
is a metric of the jobs of its row and column over the seeds. The presets and the grids of the
ablations are written here; the paper gives neither grid, only plots.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from lamp_fast.fields import format_layers
from lamp_fast.reproduce.layout import (
    ADJUSTED,
    MARK,
    METHOD,
    TRANSDUCTIVE,
    ZEROSHOT,
    Metric,
    PaperTable,
    Plot,
    Row,
    imbalance_panels,
    shot_panels,
)
from lamp_fast.reproduce.long_tail import LONG_TAIL

ELEVEN = (
    "caltech101", "oxford_pets", "stanford_cars", "flowers102", "food101", "fgvc_aircraft",
    "sun397", "dtd", "eurosat", "ucf101", "imagenet",
)  # fmt: skip
SEEDS = (1, 2, 3, 4, 5)

HM_A, HM_M = Metric("hm_a", "HM-A"), Metric("hm_m", "HM-M")
HM_MEAN = Metric("hm_mean", "Avg.", sources=("hm_a", "hm_m"))
FEW_SHOT = (Metric("acc_base", "Base"), Metric("acc_new", "New"), Metric("hm_a", "HM"))
TRANSFER = (
    Metric("acc", "Acc.", sources=("acc_base",)),
    Metric("f1", "Mac.", sources=("f1_base",)),
)
EFFICIENCY = (
    Metric("training_seconds", "Training epoch", unit="s", lowest=True),
    Metric("inference_seconds", "Inference epoch", unit="s", timed=True, lowest=True),
    Metric("parameters", "Tun. params", unit="", lowest=True),
    Metric("training_bytes", "Training memory", unit="MiB", lowest=True),
    Metric("inference_bytes", "Inference memory", unit="MiB", timed=True, lowest=True),
    HM_A,
    HM_M,
)


def _lamp(title: str, paper: str | None = None, **changes: Any) -> tuple[Row, ...]:
    """LAMP with b_base for both halves, and marked, with b_new on the new half (as the paper)."""
    settings = {name.replace("__", "."): value for name, value in changes.items()}
    base = Row(title, settings=settings, paper=paper)
    if settings.get("lamp.lbo") is False or settings.get("lamp.mpp") is False:
        return (base,)
    return base, Row(f"{title}, {MARK}", settings=settings, reading=TRANSDUCTIVE, paper=paper)


CLIP_ROW = Row("CLIP", ZEROSHOT)
# The paper adds logit adjustment to these; LFA and Candle come with a loss of their own.
LONG_TAILED_PEERS = (
    Row("CoOp+LA", "coop", ADJUSTED, paper="CoOp+LA"),
    Row("CoCoOp+LA", "cocoop", ADJUSTED, paper="CoCoOp+LA"),
    Row("LFA", "lfa", paper="LFA"),
    Row("MaPLe+LA", "maple", ADJUSTED, paper="MaPLe+LA"),
    Row("TCP+LA", "tcp", ADJUSTED, paper="TCP+LA"),
    Row("MMA+LA", "mma", ADJUSTED, paper="MMA+LA"),
    Row("Candle", "candle", paper="Candle"),
)
FEW_SHOT_PEERS = tuple(
    Row(title, method, paper=title)
    for title, method in (
        ("CoOp", "coop"),
        ("CoCoOp", "cocoop"),
        ("MaPLe", "maple"),
        ("TCP", "tcp"),
        ("MMA", "mma"),
        ("Candle", "candle"),
    )
)
LAMP_ROWS = _lamp("LAMP", "LAMP") + _lamp("LAMP+LA", optim__logit_adjustment=True)


def _peers(*methods: str) -> tuple[Row, ...]:
    return tuple(row for row in LONG_TAILED_PEERS if row.method in methods)


def _grid(**axes: Sequence[Any]) -> tuple[Row, ...]:
    """A row of LAMP for every combination of values."""
    fields = [name.rpartition("__")[2] for name in axes]
    # The paper's symbols: K, S, D and M, but beta and gamma.
    symbols = [name.upper() if len(name) == 1 else name for name in fields]
    rows: list[Row] = []
    for values in product(*axes.values()):
        shown = (format_layers(each) if isinstance(each, tuple) else f"{each:g}" for each in values)
        title = " ".join(f"{name} = {each}" for name, each in zip(symbols, shown, strict=True))
        rows += _lamp(title, **dict(zip(axes, values, strict=True)))
    return tuple(rows)


def _of_paper(rows: Sequence[Row], form: str) -> tuple[Row, ...]:
    """The same rows, each beside the paper's row that is named by its only setting."""
    return tuple(replace(row, paper=form.format(*row.settings.values())) for row in rows)


_LONG_TAILED = {
    "rows": (CLIP_ROW, *LONG_TAILED_PEERS, *LAMP_ROWS),
    "data": ELEVEN,
    "every_method": True,
    "logit_adjusted": True,
    "average": True,
}
_SEVERE = {
    **_LONG_TAILED,
    "preset": "table16-imb",
    "rows": (CLIP_ROW, *_peers("maple", "tcp", "mma", "candle"), *LAMP_ROWS),
    "data": ELEVEN[:-1],
    "metrics": (HM_A,),
}
_TRANSFER = {
    "preset": "table16-cross",
    "panels": imbalance_panels(100),
    # The bias of the source's classes is used throughout: nothing is adapted to a target.
    "rows": (
        CLIP_ROW,
        *(row for row in LONG_TAILED_PEERS if row.method != "lfa"),
        *(row for row in LAMP_ROWS if row.reading == METHOD),
    ),
    "metrics": TRANSFER,
    "source": "imagenet",
    "split": "all",
    "every_method": True,
    "logit_adjusted": True,
}
_ABLATION = {"preset": "ablation-best", "panels": imbalance_panels(10), "data": ("imagenet",)}

TABLES = {
    table.name: table
    for table in (
        PaperTable(
            name="table1",
            caption="Long-tailed base-to-new generalisation",
            preset="ablation-best",
            panels=imbalance_panels(10, 20, 50),
            metrics=(HM_A, HM_M),
            **_LONG_TAILED,
        ),
        PaperTable(
            name="table2",
            caption="Few-shot base-to-new generalisation (Tables 12 to 15 with --shots 1 2 4 8)",
            preset="table16-fewshot",
            panels=shot_panels(16),
            rows=(CLIP_ROW, *FEW_SHOT_PEERS, *_lamp("LAMP", "LAMP")),
            data=ELEVEN,
            metrics=FEW_SHOT,
            every_method=True,
            average=True,
        ),
        PaperTable(
            name="table3",
            caption="Long-tailed cross-dataset transfer",
            data=ELEVEN[:-1],
            average=True,
            **_TRANSFER,
        ),
        PaperTable(
            name="table4",
            caption="Long-tailed domain generalisation",
            data=("imagenet_a", "imagenetv2", "imagenet_sketch", "imagenet_r"),
            **_TRANSFER,
        ),
        PaperTable(
            name="table5",
            caption="Efficiency",
            # Its D = 32 gives 456,960 parameters (435,840 with --phi linear), and 469,760 with the
            # printed bias in both modalities: the paper's 470K.
            preset="table16-imb",
            panels=imbalance_panels(10),
            rows=(
                CLIP_ROW,
                Row("MaPLe+LA", "maple", ADJUSTED, paper="MaPLe"),
                Row("MMA+LA", "mma", ADJUSTED, paper="MMA"),
                *_lamp("LAMP", "LAMP"),
            ),
            data=("eurosat",),
            metrics=EFFICIENCY,
            every_method=True,
            logit_adjusted=True,
        ),
        PaperTable(
            name="table6",
            caption="Contribution of each component",
            preset="ablation-best",
            panels=imbalance_panels(10),
            rows=(
                Row("CLIP", ZEROSHOT, paper="CLIP"),
                *_lamp("MPP", "MPP", lamp__msp=False, lamp__lbo=False),
                *_lamp("MSP", "MSP", lamp__mpp=False, lamp__lbo=False),
                *_lamp("MPP+MSP", "MPP+MSP", lamp__lbo=False),
                *_lamp("MPP+LBO", "MPP+LBO", lamp__msp=False),
                *_lamp("MPP+MSP+LBO", "MPP+MSP+LBO"),
            ),
            data=("imagenet", "food101"),
            metrics=(HM_A, HM_M),
        ),
        PaperTable(
            name="table7",
            caption="Weight of the similarity loss",
            rows=_of_paper(_grid(lamp__beta=(0.0, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)), "{:.2f}"),
            metrics=(HM_A, HM_M, HM_MEAN),
            **_ABLATION,
        ),
        PaperTable(
            name="table9",
            caption="Long-tailed base-to-new generalisation, imbalance ratio 100",
            panels=imbalance_panels(100),
            **_SEVERE,
        ),
        PaperTable(
            name="table10",
            caption="Long-tailed base-to-new generalisation, imbalance ratio 200",
            panels=imbalance_panels(200),
            **_SEVERE,
        ),
        PaperTable(
            name="table11",
            caption="Size of the prompt pool",
            rows=_of_paper(_grid(lamp__m=(10, 12, 15, 20, 25, 30)), "{}"),
            metrics=(HM_A, HM_M),
            **_ABLATION,
        ),
        PaperTable(
            name="figure3a",
            caption="Retrieved prompts K and shared prompts S",
            rows=_grid(lamp__k=(1, 2, 4, 6, 8), lamp__s=(1, 2, 4, 6, 8)),
            metrics=(HM_MEAN,),
            plot=Plot("K", "lamp.k", "lamp.s", "S"),
            **_ABLATION,
        ),
        PaperTable(
            name="figure3b",
            caption="Width D of the prompts",
            rows=_grid(lamp__d=(16, 32, 64, 128)),
            metrics=(HM_A, HM_M),
            plot=Plot("D", "lamp.d"),
            **_ABLATION,
        ),
        PaperTable(
            name="figure3c",
            caption="Layers with prompts",
            rows=_grid(
                lamp__layers=tuple(
                    tuple(range(first, last + 1))
                    for first, last in ((1, 6), (1, 9), (3, 12), (6, 12), (9, 12))
                )
            ),
            metrics=(HM_A, HM_M),
            plot=Plot("layers", "lamp.layers"),
            **_ABLATION,
        ),
        PaperTable(
            name="figure3d",
            caption="First step gamma of the load-balancing bias",
            rows=_grid(lamp__gamma=(1e-4, 5e-4, 1e-3, 5e-3, 1e-2)),
            metrics=(HM_A, HM_M),
            plot=Plot("gamma", "lamp.gamma"),
            **_ABLATION,
        ),
        LONG_TAIL,
    )
}
