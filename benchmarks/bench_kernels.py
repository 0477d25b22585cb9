"""The kernel table: every GPU op beside what a user would otherwise call, and its physical floor.

``pytest benchmarks/bench_kernels.py --benchmark-only``; ``python -m benchmarks.gpu_report`` runs
the same and keeps the numbers. Without a GPU there is nothing to measure: the lines are printed
with empty cells.
"""

import pytest

from benchmarks.measuring import kernels
from benchmarks.measuring.timing import measure_ceilings, this_device

DEVICE = this_device()
CASES = list(kernels.cases(DEVICE))


@pytest.fixture(scope="module")
def ceilings():
    return measure_ceilings(DEVICE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def bench_kernel(benchmark, request, tables, case):
    if DEVICE.type != "cuda":
        tables["kernels"].append([case.what, "", "no GPU", "", "", case.target])
        pytest.skip("no GPU")
    ceilings = request.getfixturevalue("ceilings")
    row = benchmark.pedantic(kernels.measure, (case, DEVICE, ceilings), rounds=1)
    tables["kernels"].extend(kernels.table([row]))
    benchmark.extra_info.update(row.record() | {"ceilings": ceilings.record()})
