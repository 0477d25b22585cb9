"""What torchrun says of this process, and the part of the pictures that falls to it."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch_id() -> str | None:
    """What tells one torchrun from another, the same after a restart; None without torchrun."""
    return os.environ["TORCHELASTIC_RUN_ID"] if launched() else None


def restarted() -> bool:
    """Whether torchrun started this process again after a rank had died (``--max-restarts``)."""
    return launched() and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0


def restarts() -> bool:
    """Whether torchrun would start the processes again."""
    return launched() and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0


@dataclass(frozen=True)
class Part:
    """Which pictures are this process's: of ``count`` processes, number ``index`` from 0.

    They take batches in turn, so that every picture is classified beside those that it would be
    beside in one process.
    """

    index: int = 0
    count: int = 1

    def of(self, pictures: Iterable[Item], batch: int) -> Iterator[Item]:
        """The own ones of all pictures."""
        for number, each in enumerate(pictures):
            if number // batch % self.count == self.index:
                yield each

    def size(self, total: int, batch: int) -> int:
        """How many of ``total`` pictures are its own."""
        rounds, rest = divmod(total, batch * self.count)
        return rounds * batch + min(max(rest - self.index * batch, 0), batch)
