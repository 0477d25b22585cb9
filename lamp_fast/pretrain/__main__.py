"""``python -m lamp_fast.pretrain``: see :mod:`lamp_fast.pretrain.train`."""

from lamp_fast import cli
from lamp_fast.pretrain import train

if __name__ == "__main__":
    cli.run(
        train.PretrainConfig,
        train.main,
        prog="python -m lamp_fast.pretrain",
        description=train.__doc__,
    )
