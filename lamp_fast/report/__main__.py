"""``python -m lamp_fast.report RUN``: one self-contained HTML page about a run."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lamp_fast import cli
from lamp_fast.files import refuse_output, write_bytes

DEFAULT = "report.html"


@dataclass(frozen=True)
class ReportConfig:
    """Write one self-contained HTML page about a finished run."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    out: Path | None = None
    """The page; by default report.html in the run folder."""


def main(config: ReportConfig) -> int:
    """Build the page and write it."""
    out = config.out or config.run / DEFAULT
    run_files = (each for each in config.run.glob("*") if each.name != DEFAULT)
    refuse_output("--out", out, run_files)
    from lamp_fast.report.page import build_page

    write_bytes(out, build_page(config.run).encode())
    cli.say(str(out))
    return 0


if __name__ == "__main__":
    cli.run(ReportConfig, main, sys.argv[1:], prog="python -m lamp_fast.report")
