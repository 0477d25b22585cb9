"""The command; see :mod:`lamp_fast.export`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lamp_fast import cli
from lamp_fast.export import CLASS_FEATURES, Precision, TextSide, export
from lamp_fast.export.bounds import CHECKED_BATCHES
from lamp_fast.export.graphs import FILES, Format


@dataclass(frozen=True)
class ExportConfig:
    """Export a trained run as one graph, or the classes of one as a matrix."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    out: Annotated[Path, tyro.conf.Positional]
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


def main(config: ExportConfig) -> int:
    """Export, check, and say how well the two agree."""
    comparison = export(
        config.run,
        config.out,
        format=config.format,
        classes=config.classes,
        precision=config.precision,
        text_side=config.text_side,
    )
    if comparison is None:
        cli.say(str(config.out / CLASS_FEATURES))
        return 0
    pictures = sum(CHECKED_BATCHES)
    cli.say(
        f"{config.out / FILES[config.format]}: largest difference of logits"
        f" {comparison.difference:.1e} on random pictures, batches of"
        f" {' and '.join(map(str, CHECKED_BATCHES))}; the same class first for"
        f" {round(comparison.agreement * pictures)} of {pictures}"
    )
    return 0


if __name__ == "__main__":
    cli.run(ExportConfig, main, sys.argv[1:], prog="python -m lamp_fast.export")
