"""The closing tables, to which benchmarks add rows."""

import pytest
import torch
from tabulate import tabulate

from benchmarks.measuring import kernels


class RatioTable:
    """Rows that the session's end prints, each line starting with ``ratio``."""

    def __init__(self, rows: list[list[str]]) -> None:
        self.rows = rows

    def add(self, what, ratio, target=None, floor=None, prototype=None, peers=None) -> None:
        """One measured ratio beside what it is held against."""
        numbers = (ratio, target, floor, prototype)
        peer_text = "" if peers is None else " ".join(f"{each:g}" for each in peers)
        shown = ["" if each is None else f"{each:.2f}" for each in numbers]
        self.rows.append(["ratio", what, *shown, peer_text])


# By name: a table's title and header.
TABLES: dict[str, tuple[str, list[str]]] = {
    "ratios": (
        "LAMP's step",
        ["", "x image forward", "ours", "target", "floor", "prototype", "MaPLe MMA CoOp"],
    ),
    "kernels": ("kernels on a GPU", kernels.HEADER),
    "memory": (
        "peak memory of a step, batch 32, text per (image, class)",
        [
            "classes",
            "small CLIP in blocks, MiB",
            "in one, MiB",
            "ViT-B/16 in blocks, GiB (computed)",
            "in one, GiB (computed)",
        ],
    ),
    "imagenet memory": (
        "peak memory with ImageNet's classes, ViT-B/16 in bfloat16, GiB",
        ["", "classes", "block", "computed", "measured", "at most"],
    ),
    "steps": (
        "steps on a GPU, milliseconds",
        ["", "floor", "GPU time", "wall time", "GPU time / floor", "at most", "peak GiB"],
    ),
    "input": (
        "pictures a second of CPU time, one process",
        ["", "from files", "from the cache", "cache / files"],
    ),
    "ops": (
        f"ops on the CPU, float32, {torch.get_num_threads()} threads (medians)",
        ["", "reference ms", "cpp ms", "cpp is faster by", "floor ms"],
    ),
}


def pytest_configure(config):
    config.stash[_TABLES] = {name: [] for name in TABLES}


@pytest.fixture
def ratio_table(request) -> RatioTable:
    """The session's table of ratios."""
    return RatioTable(request.config.stash[_TABLES]["ratios"])


@pytest.fixture
def tables(request) -> dict[str, list[list]]:
    """The rows of every table of :data:`TABLES`, by its name."""
    return request.config.stash[_TABLES]


def pytest_terminal_summary(terminalreporter, config):
    for name, (title, header) in TABLES.items():
        rows = config.stash[_TABLES][name]
        if rows:
            terminalreporter.write_sep("=", title)
            text = tabulate(rows, header, tablefmt="plain", disable_numparse=True)
            for line in text.splitlines():
                terminalreporter.write_line(line.rstrip())


_TABLES = pytest.StashKey[dict[str, list[list]]]()
