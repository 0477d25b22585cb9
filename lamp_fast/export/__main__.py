"""The command; see :mod:`lamp_fast.export.exporting`."""

import sys

from lamp_fast import cli
from lamp_fast.export.settings import CHECKED_BATCHES, CLASS_FEATURES, FILES, ExportConfig


def main(config: ExportConfig) -> int:
    """Export, check, and say how well the two agree."""
    from lamp_fast.export.exporting import export

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
