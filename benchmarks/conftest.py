"""The closing table of ratios."""

import pytest
import torch
from tabulate import tabulate

from benchmarks import kernels


class RatioTable:
    """Rows that the session's end prints, each line starting with ``ratio``."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []

    def add(self, what, ratio, target=None, floor=None, prototype=None, peers=None) -> None:
        """One measured ratio beside what it is held against."""
        numbers = (ratio, target, floor, prototype)
        peer_text = "" if peers is None else " ".join(f"{each:g}" for each in peers)
        shown = ["" if each is None else f"{each:.2f}" for each in numbers]
        self.rows.append(["ratio", what, *shown, peer_text])


def pytest_configure(config):
    config.stash[_KEY] = RatioTable()
    config.stash[_MEMORY] = []
    config.stash[_KERNELS] = []
    config.stash[_IMAGENET] = []
    config.stash[_INPUT] = []
    config.stash[_STEPS] = []
    config.stash[_OPS] = []


@pytest.fixture
def ratio_table(request) -> RatioTable:
    """The session's table."""
    return request.config.stash[_KEY]


@pytest.fixture
def memory_table(request) -> list[list]:
    """Rows of the memory table."""
    return request.config.stash[_MEMORY]


@pytest.fixture
def kernel_table(request) -> list[list[str]]:
    """Rows of the kernel table."""
    return request.config.stash[_KERNELS]


@pytest.fixture
def imagenet_memory_table(request) -> list[list]:
    """Rows of the memory table of ImageNet's classes."""
    return request.config.stash[_IMAGENET]


@pytest.fixture
def input_table(request) -> list[list[str]]:
    """Rows of the input table."""
    return request.config.stash[_INPUT]


@pytest.fixture
def step_table(request) -> list[list[str]]:
    """Rows of the table of whole steps on a GPU."""
    return request.config.stash[_STEPS]


@pytest.fixture
def op_table(request) -> list[list]:
    """Rows of the table of ops on the CPU."""
    return request.config.stash[_OPS]


def pytest_terminal_summary(terminalreporter, config):
    def show(title, header, rows):
        if rows:
            terminalreporter.write_sep("=", title)
            text = tabulate(rows, header, tablefmt="plain", disable_numparse=True)
            for line in text.splitlines():
                terminalreporter.write_line(line.rstrip())

    show(
        "LAMP's step",
        ["", "x image forward", "ours", "target", "floor", "prototype", "MaPLe MMA CoOp"],
        config.stash[_KEY].rows,
    )
    show("kernels on a GPU", kernels.HEADER, config.stash[_KERNELS])
    show(
        "peak memory of a step, batch 32, text per (image, class)",
        [
            "classes",
            "small CLIP in blocks, MiB",
            "in one, MiB",
            "ViT-B/16 in blocks, GiB (computed)",
            "in one, GiB (computed)",
        ],
        config.stash[_MEMORY],
    )
    show(
        "peak memory with ImageNet's classes, ViT-B/16 in bfloat16, GiB",
        ["", "classes", "block", "computed", "measured", "at most"],
        config.stash[_IMAGENET],
    )
    show(
        "steps on a GPU, milliseconds",
        ["", "floor", "GPU time", "wall time", "GPU time / floor", "at most"],
        config.stash[_STEPS],
    )
    show(
        "pictures a second of CPU time, one process",
        ["", "from files", "from the cache", "cache / files"],
        config.stash[_INPUT],
    )
    show(
        f"ops on the CPU, float32, {torch.get_num_threads()} threads (medians)",
        ["", "reference ms", "cpp ms", "cpp is faster by", "floor ms"],
        config.stash[_OPS],
    )


_KEY = pytest.StashKey[RatioTable]()
_MEMORY = pytest.StashKey[list]()
_KERNELS = pytest.StashKey[list]()
_IMAGENET = pytest.StashKey[list]()
_INPUT = pytest.StashKey[list]()
_STEPS = pytest.StashKey[list]()
_OPS = pytest.StashKey[list]()
