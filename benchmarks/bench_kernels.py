"""The kernels: every GPU op beside what a user would otherwise call, and its physical floor.

``pytest benchmarks/bench_kernels.py --benchmark-only``; ``python -m benchmarks.gpu_report`` runs
the same and keeps the numbers. Without a GPU there is nothing to measure.
"""

import pytest

from benchmarks.measuring import kernels
from benchmarks.measuring.timing import this_device

DEVICE = this_device()
CASES = list(kernels.cases(DEVICE)) if DEVICE.type == "cuda" else []


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def bench_kernel(benchmark, closing, device_ceilings, case):
    kernels.measure_into(closing, benchmark, case, DEVICE, device_ceilings)
