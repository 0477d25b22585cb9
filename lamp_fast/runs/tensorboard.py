"""The log of a run as TensorBoard event files, where it is asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamp_fast.extras import need

FOLDER = "tensorboard"


def need_tensorboard() -> None:
    """Refuse, before anything is written, what the optional library could not serve.

    Raises:
        InputError: it is not installed.
    """
    need("--tensorboard", "tensorboard", "tensorboard")


class EventWriter:
    """Writes finished epochs to ``run/tensorboard``.

    Args:
        run: the run folder.
        epochs: how many are finished already; what a killed run wrote beyond them is hidden.
    """

    def __init__(self, run: Path, epochs: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run / FOLDER, purge_step=epochs + 1)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add one line of ``metrics.jsonl``: every number of the epoch, and those of each layer."""
        epoch = line["epoch"]
        for name, value in line.items():
            if name != "epoch" and isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, epoch)
        for name in ("load_std", "key_cosine", "text_load_std"):
            for layer, value in zip(line.get("layers", ()), line.get(name, ()), strict=False):
                self.writer.add_scalar(f"{name}/layer {layer}", value, epoch)
        self.writer.flush()
