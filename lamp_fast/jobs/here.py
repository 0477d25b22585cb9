"""Workers on this machine: what each gets of it, and how they are stopped."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

import torch


def local_slots(workers: int) -> list[dict[str, str]]:
    """What each worker's processes get of this machine: a GPU in turn, or a share of the cores."""
    gpus = torch.cuda.device_count()
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": str(each % gpus)} for each in range(workers)]
    if "OMP_NUM_THREADS" in os.environ:
        return [{}] * workers
    cores = len(os.sched_getaffinity(0))
    return [{"OMP_NUM_THREADS": str(max(1, cores // workers))}] * workers


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM stop the work as Ctrl-C does: what was begun is left to be gone on with."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt("stopped; the same command goes on")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block is left. Only the main thread gets them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.signal(each, lambda number, _: held.append(number)) for each in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)
