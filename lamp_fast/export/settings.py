"""What an export is told, and what its files are called."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Format = Literal["onnx", "torch"]
Precision = Literal["fp32", "fp16", "int8"]
TextSide = Literal["inside", "beside", "alone"]

FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
CLASS_FEATURES = "class_features.npy"
# Pictures of the batches that are compared: one is a size of its own to an exporter, the other is
# larger than the one traced with.
CHECKED_BATCHES = (1, 5)


@dataclass(frozen=True)
class ExportConfig:
    """Export a trained run as one graph, or the classes of one as a matrix."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A new folder for the graph and what belongs to it."""
    format: Format = "onnx"
    """onnx (needs the export extra), or torch for a torch.export program."""
    classes: tuple[str, ...] | None = None
    """The class names, trained or not; by default the trained ones."""
    precision: Precision = "fp32"
    """Of the graph: fp16 halves weights and towers, int8 (onnx alone) quantises weights, and
    activations by their range at run time."""
    text_side: TextSide = "inside"
    """Classes as constants inside the graph; beside it as a matrix that the graph takes for its
    second input; or alone, that matrix for other classes without a graph."""
