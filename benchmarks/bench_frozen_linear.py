"""Products of frozen weights on the CPU: packed, beside torch's own, both in turn.

``pytest benchmarks/bench_frozen_linear.py --benchmark-only``: products of ViT-B/16 for four
pictures and ten classes, forward without gradient and forward with backward, in float32, and in
bfloat16 on a CPU that multiplies it. The default grid has the two largest; ``--all`` has all.
"""

import pytest
import torch

from benchmarks.measuring import kernels
from benchmarks.measuring.timing import CPU
from lamp_fast.ops import dispatch

SIZES = {
    "widen": {"rows": 788, "inputs": 768, "outputs": 3072},
    "narrow": {"rows": 788, "inputs": 3072, "outputs": 768},
    "qkv": {"rows": 788, "inputs": 768, "outputs": 2304},
    "text": {"rows": 136, "inputs": 512, "outputs": 2048},
    "prompts": {"rows": 22, "inputs": 768, "outputs": 1536},
}
GRID = [
    pytest.param(
        sizes, id=name, marks=[] if name in ("widen", "narrow") else pytest.mark.whole_grid
    )
    for name, sizes in SIZES.items()
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("sizes", GRID)
def bench_frozen_linear(benchmark, closing, ceilings, sizes, backward):
    case = kernels.frozen_linear_case(torch.float32, backward, **sizes)
    kernels.measure_into(closing, benchmark, case, CPU, ceilings, rounds=9)


@pytest.mark.skipif(not dispatch.cpu_bfloat16(), reason="a CPU without products of bfloat16")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("sizes", GRID)
def bench_frozen_linear_in_bfloat16(benchmark, closing, bf16_ceilings, sizes, backward):
    case = kernels.frozen_linear_case(torch.bfloat16, backward, **sizes)
    kernels.measure_into(closing, benchmark, case, CPU, bf16_ceilings, rounds=9)
