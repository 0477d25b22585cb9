"""prefix_attention on the CPU: the native code beside concatenate + torch's SDPA, the reference.

``pytest benchmarks/bench_prefix_attention.py --benchmark-only``: medians over rounds in which both
run in turn, forward without gradient and forward with backward, in float32, and in bfloat16 on a
CPU that multiplies it. The default grid has what a step calls; ``--all`` adds longer and shorter
rows, and image towers in float32.
"""

import pytest
import torch

from benchmarks.measuring import kernels
from benchmarks.measuring.kernels import short_case, tree_case, vision_case
from benchmarks.measuring.timing import CPU
from lamp_fast.ops import dispatch

STEP = {
    "N64-L5": (short_case, {"groups": 4, "share": 16, "rows": 5, "prefix": 9}),
    "N1600-L12": (short_case, {"groups": 32, "share": 50, "rows": 12, "prefix": 8}),
    "tree-N4": (tree_case, {"images": 4, "prefix": 5}),
    "tree-N32": (tree_case, {"images": 32, "prefix": 5}),
    "last-N4": (tree_case, {"images": 4, "prefix": 5, "last": True}),
}
TINY = {"heads": 2, "width": 32}
WHOLE_GRID = {
    **{
        f"N{groups * share}-L{rows}": (
            short_case,
            {"groups": groups, "share": share, "rows": rows, "prefix": prefix},
        )
        for groups, share in ((4, 16), (4, 100), (32, 50), (128, 50))
        for rows, prefix in ((3, 9), (5, 9), (12, 8))
    },
    "N64-L32": (short_case, {"groups": 4, "share": 16, "rows": 32, "prefix": 8}),
    "tiny-text": (short_case, {"groups": 32, "share": 5, "rows": 12, "prefix": 4, **TINY}),
    "tree-N4-C10": (tree_case, {"images": 4, "prefix": 5, "classes": 10}),
    "last-N32": (tree_case, {"images": 32, "prefix": 5, "last": True}),
    "vision-N4": (vision_case, {"batch": 4, "prefix": 4}),
    "tiny-vision": (vision_case, {"batch": 32, "heads": 4, "rows": 17, "prefix": 4, "width": 32}),
}
BF16 = [
    pytest.param(*WHOLE_GRID["vision-N4"], id="vision-N4"),
    pytest.param(*STEP["tree-N4"], id="tree-N4"),
    pytest.param(*WHOLE_GRID["tiny-vision"], id="tiny-vision"),
]
SHAPES = [pytest.param(*shape, id=name) for name, shape in STEP.items()]
SHAPES += [
    pytest.param(*shape, id=name, marks=pytest.mark.whole_grid)
    for name, shape in WHOLE_GRID.items()
    if name not in STEP
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize(("build", "sizes"), SHAPES)
def bench_prefix_attention(benchmark, closing, ceilings, build, sizes, backward):
    case = build(CPU, torch.float32, backward, **sizes).on_cpu()
    kernels.measure_into(closing, benchmark, case, CPU, ceilings, rounds=9)


@pytest.mark.skipif(not dispatch.cpu_has("avx512_bf16"), reason="a CPU without AVX512_BF16")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize(("build", "sizes"), BF16)
def bench_prefix_attention_in_bfloat16(benchmark, closing, bf16_ceilings, build, sizes, backward):
    case = build(CPU, torch.bfloat16, backward, **sizes).on_cpu()
    kernels.measure_into(closing, benchmark, case, CPU, bf16_ceilings, rounds=9)
