"""Pieces of work timed in turn, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable

import torch


def medians(benchmark, pieces: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The median seconds of each piece over rounds in which every one of them runs once."""
    seconds = {name: [] for name in pieces}

    def one_round():
        for name, piece in pieces.items():
            started = time.perf_counter()
            piece()
            seconds[name].append(time.perf_counter() - started)

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=1)
    middle = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    benchmark.extra_info.update(middle)
    return middle


class Copy:
    """Moves memory as fast as torch does: the measure for what an op must read and write."""

    def __init__(self) -> None:
        self.source = torch.zeros(1 << 24)
        self.target = torch.zeros_like(self.source)
        self.bytes = 2 * self.source.nbytes

    def __call__(self) -> None:
        self.target.copy_(self.source)


def row(what: str, middle: dict[str, float], floor: float | None = None) -> list[str]:
    """A line of the table of ops from medians of ``reference`` and ``cpp``; seconds."""
    reference, cpp = middle["reference"], middle["cpp"]
    shown = "" if floor is None else f"{1e3 * floor:.2f}"
    return [what, f"{1e3 * reference:.2f}", f"{1e3 * cpp:.2f}", f"{reference / cpp:.2f}x", shown]
