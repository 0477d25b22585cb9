"""Named rivals in one process: MaPLe, MMRL and LIFT as fast as plain torch makes them, and LAMP.

``pytest benchmarks/bench_rivals.py --benchmark-only``: a training step and an evaluation batch of
ViT-B/16 with random weights in units of open_clip's image forward of the same batch, which runs
before and after each; medians. What the rivals compute with is said in :mod:`benchmarks.rivals`;
text features that depend on the class alone are kept in evaluation, by theirs and by ours. The
default grid is the rivals alone at B=4, C=10 without torch.compile (LAMP and our own MaPLe and LIFT
have their lines from bench_step and bench_methods); ``--all`` adds these, and B = 4 and 32 by
C = 10, 50, 200 and 1,000 with the rivals compiled, for hours of two cores.
``python -m benchmarks.rivals_growth`` draws that.
"""

import pytest

from benchmarks.measuring.timing import device_seconds, interleave, this_device
from benchmarks.rivals.lines import GRID, LINES

FIRST = (4, 10, False)
POINTS = [
    pytest.param(
        line,
        batch,
        classes,
        compiled,
        id=f"{line.id}-B{batch}-C{classes}{'-compiled' * compiled}",
        marks=[pytest.mark.whole_grid] * (not line.rival or (batch, classes, compiled) != FIRST),
    )
    for line in LINES
    for batch, classes, compiled in (FIRST, *((*size, line.rival) for size in GRID))
    if line.rival or (batch, classes, compiled) != FIRST
]
ROUNDS = 2
DEVICE = this_device()


@pytest.mark.parametrize(("line", "batch", "classes", "compiled"), POINTS)
def bench_rival(benchmark, closing, rival_clip, line, batch, classes, compiled):
    pieces, unit = line.pieces(rival_clip, batch, classes, compiled=compiled)
    options = {"clock": device_seconds(DEVICE), "unit": unit}
    times = benchmark.pedantic(interleave, (pieces, ROUNDS), options, rounds=1)
    for piece, time in times.items():
        what = f"{line.title}{', compiled' * compiled} B={batch} C={classes:,}: {piece}"
        where = {"device": DEVICE, "dtype": rival_clip.dtype}
        closing.add(what, time.ratio, "image forwards", **where)
        benchmark.extra_info[f"ratio_{piece}"] = time.ratio


@pytest.fixture(scope="module")
def rival_clip(request):
    """In bfloat16 on a GPU, in float32 on a CPU."""
    return request.getfixturevalue("device_clip" if DEVICE.type == "cuda" else "clip")
