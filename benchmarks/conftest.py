"""``pytest benchmarks/ --benchmark-only``: what it does as it goes, and one closing table.

Minutes on two cores; ``--all`` has the whole grid, for half an hour of an idle machine.
"""

import time
from pathlib import Path

import pytest
import torch
from tabulate import tabulate

from benchmarks.measuring.floors import measure_ceilings
from benchmarks.measuring.steps import random_clip
from benchmarks.measuring.timing import CPU, machine_facts, measured_with, this_device

HEADER = [
    "",
    "ours",
    "floor",
    "ours / floor",
    "beside it (x: as long as ours)",
    "aim",
    "measured with",
]


class ClosingTable:
    """The session's figures.

    Attributes:
        rows: one a figure, under :data:`HEADER`.
        shown: how many were printed when they were found.
    """

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.shown = 0

    def add(
        self,
        what: str,
        ours: float,
        unit: str,
        *,
        floor: float | None = None,
        beside: str = "",
        aim: str = "",
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """One figure.

        Args:
            what: was measured.
            ours: in ``unit``, as is the ``floor`` that no program goes below.
            beside: what else does the same, in words.
            aim: what it is held against, in words.
            device, dtype: it computed on, and in.
        """
        numbers = [_number(ours, unit)]
        numbers += ["", ""] if floor is None else [_number(floor, unit), f"{ours / floor:.2f}"]
        self.rows.append([what, *numbers, beside, aim, measured_with(device, dtype)])


def _number(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.2f} {unit}"


_TABLE = pytest.StashKey[ClosingTable]()


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="benchmarks: the whole grid")


def pytest_configure(config):
    config.addinivalue_line("markers", "whole_grid: a benchmark that only --all runs")
    config.stash[_TABLE] = ClosingTable()


def pytest_collection_modifyitems(config, items):
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in own:
        # A figure takes what it takes; a limit would lose those before it.
        item.add_marker(pytest.mark.timeout(0))
    if not config.getoption("--all"):
        left_out = [item for item in own if item.get_closest_marker("whole_grid")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def closing(request) -> ClosingTable:
    """The session's table."""
    return request.config.stash[_TABLE]


@pytest.fixture(scope="session")
def clip():
    """ViT-B/16 on the CPU, in float32."""
    return random_clip(CPU)


@pytest.fixture(scope="session")
def bf16_clip():
    """The same in bfloat16."""
    return random_clip(CPU, torch.bfloat16)


@pytest.fixture(scope="session")
def device_clip():
    """ViT-B/16 on a GPU where there is one, in bfloat16 everywhere."""
    return random_clip(this_device(), torch.bfloat16)


@pytest.fixture(scope="session")
def ceilings():
    """The rates of the CPU."""
    return measure_ceilings(CPU)


@pytest.fixture(scope="session")
def bf16_ceilings():
    """The rates of the CPU, products in bfloat16."""
    return measure_ceilings(CPU, torch.bfloat16)


@pytest.fixture(scope="session")
def device_ceilings():
    """The rates of a GPU where there is one."""
    return measure_ceilings(this_device())


class _Progress:
    """Says which benchmark begins, and each figure as soon as it is known."""

    def __init__(self, session) -> None:
        self.session, self.begun, self.started = session, 0, time.monotonic()
        self.reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        self.reporter.showfspath = False  # its own line says more

    def _write(self, line: str) -> None:
        self.reporter.ensure_newline()
        self.reporter.write_line(line)

    def pytest_runtest_logstart(self, nodeid):
        self.begun += 1
        minutes, seconds = divmod(round(time.monotonic() - self.started), 60)
        at = f"{self.begun}/{self.session.testscollected}, {minutes}:{seconds:02}"
        self._write(f"[{at}] {nodeid}")

    def pytest_report_teststatus(self, report):
        if report.skipped or (report.when == "call" and report.passed):
            return report.outcome, "", ""
        return None

    def pytest_runtest_logreport(self, report):
        table = self.session.config.stash[_TABLE]
        for what, ours, floor, *_ in table.rows[table.shown :]:
            self._write(f"    {what}: {ours}" + (f" (floor {floor})" if floor else ""))
        table.shown = len(table.rows)


def pytest_sessionstart(session):
    config = session.config
    measuring = config.getoption("--benchmark-only", False) and not config.option.collectonly
    if measuring and config.pluginmanager.has_plugin("terminalreporter"):
        config.pluginmanager.register(_Progress(session))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_group_stats():
    """The closing table stands for pytest-benchmark's own, whose times are of whole benchmarks."""
    return []


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_TABLE].rows
    if not rows:
        return
    facts = ", ".join(f"{name} {value}" for name, value in machine_facts().items())
    terminalreporter.write_sep("=", "benchmarks")
    terminalreporter.write_line(f"medians; {facts}")
    text = tabulate(rows, HEADER, tablefmt="plain", disable_numparse=True)
    for line in text.splitlines():
        terminalreporter.write_line(line.rstrip())
