"""``python -m lamp_fast.reproduce TABLE``: a table or figure of the paper, from one command."""

import functools
import sys
from collections.abc import Sequence

from lamp_fast import cli
from lamp_fast.errors import InputError
from lamp_fast.reproduce.settings import ReproduceConfig


def main(config: ReproduceConfig, flags: Sequence[str]) -> int:
    """Do the jobs that are not done, then write the table."""
    if config.root is not None and not config.root.is_dir():
        raise InputError(f"--root {config.root}: does not exist, expected the data sets' folder")
    if config.workers < 1:
        raise InputError(f"--workers {config.workers}: expected at least 1")
    from lamp_fast.reproduce.reproducing import reproduce

    return reproduce(config, flags)


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and those after a lone ``--``, which are for every run."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:cut]), list(arguments[cut + 1 :])


if __name__ == "__main__":
    own, flags = split_flags(sys.argv[1:])
    cli.run(
        ReproduceConfig,
        functools.partial(main, flags=flags),
        own,
        prog="python -m lamp_fast.reproduce",
    )
