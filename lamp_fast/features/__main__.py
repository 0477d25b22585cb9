"""``python -m lamp_fast.features FILE|FOLDER|CSV ... --out DIR``: CLIP's features of pictures.

Or of a data set that training takes, with its parts and labels: --data NAME --root DIR. What a run
or this command has computed before is taken from the cache.

DIR then holds features.safetensors (projected [N, D] and unprojected [N, V], neither normalised, or
[N, crops, ...] with --crops), pictures.csv (a line a row) and features.json (which CLIP, what it
was shown). The exit code is 1 where pictures could not be read: they are reported and left out.
"""

import sys

from lamp_fast import cli
from lamp_fast.errors import InputError
from lamp_fast.features.settings import FeaturesConfig
from lamp_fast.fields import validate
from lamp_fast.runs.folder import is_filled


def main(config: FeaturesConfig) -> int:
    """Compute what is not kept yet, then write everything."""
    validate(config)
    if is_filled(config.out):
        raise InputError(f"--out {config.out}: is there already, expected a new folder")
    from lamp_fast.features.computing import compute_features

    return compute_features(config)


if __name__ == "__main__":
    cli.run(
        FeaturesConfig,
        main,
        sys.argv[1:],
        prog="python -m lamp_fast.features",
        description=__doc__,
    )
