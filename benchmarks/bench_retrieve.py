"""retrieve: implementations side by side, forward and forward with backward (medians).

Run with ``pytest benchmarks/bench_retrieve.py --benchmark-only``. ``OMP_NUM_THREADS`` sets the
threads.
"""

import pytest
import torch

from lamp_fast import ops

POOL_SIZE, K = 20, 2  # the paper's
CASES = [(batch, width) for width in (128, 768) for batch in (4, 32, 128)]


def available():
    reasons = ops.implementations("retrieve")
    return [
        pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
        for name, reason in reasons.items()
    ]


@pytest.mark.parametrize("impl", available())
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize(("batch", "width"), CASES)
def bench_retrieve(benchmark, batch, width, backward, impl):
    benchmark.group = f"retrieve {'forward-backward' if backward else 'forward'} {batch}x{width}"
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, width, generator=generator, requires_grad=backward)
    keys = torch.randn(POOL_SIZE, width, generator=generator, requires_grad=backward)
    bias = torch.zeros(POOL_SIZE)

    def run():
        similarity = ops.retrieve(query, keys, bias, K, impl=impl)[1]
        if backward:
            torch.autograd.grad(similarity.sum(), (query, keys))

    # A benchmark of wrong results is worth nothing.
    wanted = ops.retrieve(query, keys, bias, K, impl="reference")[0]
    assert torch.equal(ops.retrieve(query, keys, bias, K, impl=impl)[0], wanted)
    benchmark(run)
