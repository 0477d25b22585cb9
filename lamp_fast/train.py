"""``python -m lamp_fast.train``: adapt a frozen CLIP to long-tailed pictures, then score it.

Without arguments: handwritten digits and the tiny CLIP that the package carries.
"""

from collections.abc import Sequence

from lamp_fast import cli
from lamp_fast.fields import validate
from lamp_fast.runs.config import TrainConfig, choosing_flags, parse_flags
from lamp_fast.runs.folder import resumed_defaults
from lamp_fast.runs.launch import launched


def read_flags(argv: Sequence[str]) -> TrainConfig:
    """The settings that a command line means.

    Raises:
        InputError: see :func:`resumed_defaults` and :func:`parse_flags`.
    """
    default = resumed_defaults(choosing_flags(argv))
    return parse_flags(argv, default, prog="python -m lamp_fast.train", description=__doc__)


def main(config: TrainConfig) -> int:
    """Train, adapt, score, and leave everything in the run folder."""
    if not launched():  # else the ranks refuse it together, and one of them says so
        validate(config)
    from lamp_fast.runs.training import train

    return train(config)


if __name__ == "__main__":
    cli.run_read(read_flags, main)
