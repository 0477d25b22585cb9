"""Pictures: data sets, the protocol that draws from them, and batches to compute on."""

from lamp_fast.data.benchmark import (
    NOWHERE,
    Benchmark,
    Origin,
    build_benchmark,
    check_benchmark,
    decode_through,
    transfer_benchmark,
)
from lamp_fast.data.decoded import DecodedCache
from lamp_fast.data.loading import evaluation_batches, move_batches, training_batches
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.settings import DataConfig
from lamp_fast.data.sources import DataSource, load_source
from lamp_fast.data.sources.lists import PictureLists
from lamp_fast.data.sources.table import PictureTable

__all__ = [
    "NOWHERE",
    "Benchmark",
    "DataConfig",
    "DataSource",
    "DecodedCache",
    "Origin",
    "PictureLists",
    "PictureTable",
    "Pictures",
    "build_benchmark",
    "check_benchmark",
    "decode_through",
    "evaluation_batches",
    "load_source",
    "move_batches",
    "training_batches",
    "transfer_benchmark",
]
