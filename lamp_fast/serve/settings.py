"""What a server is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lamp_fast.data.settings import Tte
from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds

MEBIBYTE = 2**20


@dataclass(frozen=True)
class ServeConfig:
    """Answer over HTTP what a trained run says of pictures."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder, or a folder that save_pretrained wrote."""
    host: str = "127.0.0.1"
    """Where to listen: by default this machine alone can ask. There is neither a password nor
    encryption; for others put a proxy that has them before it."""
    port: Annotated[int, Bounds(0, 65_535)] = 8000
    """0 takes a free one, which is printed."""
    classes: str = "trained"
    """As of predict: trained, all, or NAME,NAME,..."""
    add: str | None = None
    """NAME,NAME,...: classes besides those of --classes."""
    hierarchy: Path | None = None
    """As in training: the levels of a run that was trained without, or others."""
    batch: Annotated[int | None, Bounds(1, 100_000)] = None
    """Pictures that are computed together at most; by default the run's --test-batch."""
    wait: Annotated[float, Bounds(0, 60_000)] = 2.0
    """Milliseconds that a picture waits for others to be computed with."""
    queue: Annotated[int, Bounds(1, 1_000_000)] = 256
    """Pictures that may wait; a request that would make it more is answered with 503."""
    pictures: Annotated[int, Bounds(1, 1_000_000)] = 64
    """Pictures a request."""
    body: Annotated[float, Bounds(above=0, high=2048)] = 32.0
    """MiB a request."""
    memory: Annotated[float, Bounds(above=0, high=1_000_000)] = 256.0
    """MiB of all requests that are read or wait at once; one that would make it more is answered
    with 503."""
    timeout: Annotated[float, Bounds(above=0, high=3600)] = 30.0
    """Seconds that a request may take to arrive, and that the last ones have when the server is
    told to end."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    pretrained: Path | None = None
    """The file with the CLIP's weights, where it is not where the run found it."""
    tte: Tte = "as-trained"
    """on: the mean of the logits of five crops answers; off: one view's; by default as the run
    tests."""

    def check_together(self) -> None:
        """Refuse limits that would refuse every request.

        Raises:
            InputError: naming the smaller one.
        """
        if self.queue < self.pictures:
            raise InputError(
                f"--queue {self.queue}: expected at least the {self.pictures} of --pictures"
            )
        if self.memory < self.body:
            raise InputError(f"--memory {self.memory}: expected at least the {self.body} of --body")

    @property
    def body_bytes(self) -> int:
        """Of one request."""
        return int(self.body * MEBIBYTE)

    @property
    def memory_bytes(self) -> int:
        """Of all requests."""
        return int(self.memory * MEBIBYTE)
