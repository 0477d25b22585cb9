"""Which table or figure is made, of what, and where."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lamp_fast.clip.settings import USUAL
from lamp_fast.reproduce.tables import SEEDS


@dataclass(frozen=True)
class ReproduceConfig:
    """One table or figure of the paper. Flags of lamp_fast.train after a lone -- go to every run
    whose method has them, after the preset and before what the table itself varies."""

    table: Annotated[str, tyro.conf.Positional]
    """table1 to table7, table9 to table11, figure3a to figure3d, or lt (the long-tail field's)."""
    methods: tuple[str, ...] = ()
    """Rows of these methods alone; by default all of the table."""
    data: tuple[str, ...] = ()
    """Columns; by default the paper's data sets."""
    source: str | None = None
    """Trained on, for tables 3 and 4; by default imagenet."""
    root: Path | None = None
    """The folder that holds the data sets' folders."""
    seeds: tuple[int, ...] = SEEDS
    imb: tuple[float, ...] = ()
    """Imbalance ratios, a part of the table each (for lt a column of each data set whose long tail
    is drawn); by default the paper's, or 100, 50 and 10."""
    shots: tuple[int, ...] = ()
    """For table2: pictures a class, a part of the table each; by default 16."""
    preset: str | None = None
    """LAMP's settings; by default what is written for the table."""
    epochs: int | None = None
    """Of every trained method, in place of its own (LFA counts iterations)."""
    clip: str = USUAL
    """As in lamp_fast.train."""
    pretrained: str | None = None
    """As in lamp_fast.train; by default openai, and what --clip tiny, hf-hub: and local-dir: bring
    with them."""
    weights_of: str | None = None
    """As in lamp_fast.train."""
    out: Path = Path("runs/reproduce")
    """The queue's folder, which several workers, tables and machines may share."""
    workers: int = 1
    """Jobs at a time on this machine; GPUs are dealt out in turn."""
    engine: Literal["here", "submitit"] = "here"
    """submitit: the workers are jobs of a cluster (needs the cluster extra)."""
    cluster: Literal["slurm", "local"] | None = None
    """For submitit: by default slurm; local starts its workers here."""
    submit: tuple[str, ...] = ()
    """For submitit: its parameters, such as timeout_min=600 slurm_partition=gpu gpus_per_node=1."""
    compare: tuple[str, ...] = ()
    """Titles of two rows to test against each other; by default LAMP against every other."""
    code_of: Path | None = None
    """The JSON file of a table: count runs of the code that made it as runs of today's."""
    plan: bool = False
    """Print the jobs, and do nothing."""
