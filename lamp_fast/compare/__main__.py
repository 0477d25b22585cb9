"""``python -m lamp_fast.compare --data folder --root DIR``: which method for one's own pictures.

Tries zero-shot CLIP and the methods of the field as far as --budget reaches, chooses one by its
macro-F1 on the validation pictures alone, and tests each method once. --out then holds table.md,
comparison.json and .csv, comparison.html, and the chosen run in chosen/, ready for predict, export
and report.
"""

import sys

from lamp_fast import cli
from lamp_fast.compare.settings import CompareConfig
from lamp_fast.fields import validate


def main(config: CompareConfig) -> int:
    """Compare, and leave the table, the page and the chosen run."""
    validate(config)
    from lamp_fast.compare.comparing import compare

    return compare(config)


if __name__ == "__main__":
    cli.run(
        CompareConfig,
        main,
        sys.argv[1:],
        prog="python -m lamp_fast.compare",
        description=__doc__,
    )
