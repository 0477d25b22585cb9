"""Pictures: data sets, the protocol that draws from them, and batches to compute on."""

from lamp_fast.data.benchmark import (
    Benchmark,
    build_benchmark,
    check_benchmark,
    transfer_benchmark,
)
from lamp_fast.data.loading import evaluation_batches, training_batches
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.sources import DataSource, load_source
from lamp_fast.data.table import Table

__all__ = [
    "Benchmark",
    "DataSource",
    "Pictures",
    "Table",
    "build_benchmark",
    "check_benchmark",
    "evaluation_batches",
    "load_source",
    "training_batches",
    "transfer_benchmark",
]
