"""retrieve on the CPU: the native code beside the eager reference, medians of both in turn.

``pytest benchmarks/bench_retrieve.py --benchmark-only``; ``OMP_NUM_THREADS`` sets the threads.
"""

import pytest
import torch

from benchmarks.side_by_side import medians, row
from lamp_fast import ops

POOL_SIZE = 20  # the paper's
CASES = [(batch, width, k) for width in (128, 768) for batch in (4, 32, 128) for k in (2, 6)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize(("batch", "width", "k"), CASES)
def bench_retrieve(benchmark, tables, batch, width, k, backward):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, width, generator=generator, requires_grad=backward)
    keys = torch.randn(POOL_SIZE, width, generator=generator, requires_grad=backward)
    bias = torch.zeros(POOL_SIZE)

    def run(impl):
        similarity = ops.retrieve(query, keys, bias, k, impl=impl)[1]
        if backward:
            torch.autograd.grad(similarity.sum(), (query, keys))

    # A benchmark of wrong results is worth nothing.
    wanted = ops.retrieve(query, keys, bias, k, impl="reference")[0]
    assert torch.equal(ops.retrieve(query, keys, bias, k, impl="cpp")[0], wanted)
    pieces = {"reference": lambda: run("reference"), "cpp": lambda: run("cpp")}
    middle = medians(benchmark, pieces, rounds=101)
    direction = "forward + backward" if backward else "forward"
    tables["ops"].append(row(f"retrieve B={batch} Dv={width} K={k} {direction}", middle))
