"""retrieve on the CPU: the native code beside the eager reference, both in turn.

``pytest benchmarks/bench_retrieve.py --benchmark-only``; ``OMP_NUM_THREADS`` sets the threads, and
``--all`` has the small width.
"""

import pytest

from benchmarks.measuring import kernels
from benchmarks.measuring.timing import CPU

SMALL_WIDTH = pytest.param(128, marks=pytest.mark.whole_grid)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("k", [2, 6])
@pytest.mark.parametrize("batch", [4, 32, 128])
@pytest.mark.parametrize("width", [768, SMALL_WIDTH])
def bench_retrieve(benchmark, closing, ceilings, batch, width, k, backward):
    case = kernels.retrieve_case(CPU, backward, batch=batch, width=width, k=k).on_cpu()
    kernels.measure_into(closing, benchmark, case, CPU, ceilings, rounds=101)
