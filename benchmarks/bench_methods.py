"""Every method's step beside LAMP's, in units of open_clip's image forward.

``pytest benchmarks/bench_methods.py --benchmark-only``: a training step and an evaluation batch,
medians over rounds in which the image forward (no_grad, same batch) runs before and after each;
trainable parameters; and what a step keeps for backward. ``--all`` adds the methods whose step
costs as one of these or, over features, next to nothing, and the peers with ``--as-published`` (77
tokens, text anew for every evaluation batch where their code does so).
ViT-B-16-quickgelu with random weights, float32, B=4, C=10: Caltech101's first names. Methods that
look at the training set look at random features; a step of one that trains on features is over a
batch of them. A closed form has no step.
"""

import pytest

from benchmarks.measuring.memory import kept_for_backward
from benchmarks.measuring.steps import AS_PUBLISHED, DISTINCT, Cell
from benchmarks.measuring.timing import interleave
from lamp_fast.clip.settings import Trimming
from lamp_fast.methods import METHODS

BATCH, CLASSES, ROUNDS = 4, 10, 2
PUBLISHED = Trimming(as_published=True)
# Each learns in the towers in a way of its own; what others cost is seen from these.
DEFAULT = ("lamp", "coop", "cocoop", "maple", "tcp", "mma", "lift")
WAYS = [
    pytest.param(name, DISTINCT, id=name, marks=[pytest.mark.whole_grid] * (name not in DEFAULT))
    for name in METHODS
]
WAYS += [
    pytest.param(name, PUBLISHED, id=f"{name}-as-published", marks=pytest.mark.whole_grid)
    for name in AS_PUBLISHED
]


@pytest.mark.parametrize(("name", "trim"), WAYS)
def bench_method(benchmark, clip, closing, name, trim):
    # Two of them: a step would make the evaluation compute again what it keeps of the text.
    trained, evaluated = (Cell(clip, BATCH, CLASSES, name, trim=trim) for _ in range(2))
    pieces, facts = {"evaluate": evaluated.evaluate}, {}
    if list(trained.method.parameters()):
        parameters = trained.method.trainable_parameters()
        pieces = {"train": trained.train, **pieces}
        kept = kept_for_backward(trained)
        facts["train"] = f"{parameters:,} parameters, {kept / 2**20:.0f} MiB kept for backward"
        benchmark.extra_info.update({"parameters": parameters, "kept_bytes": kept})
    options = {"unit": evaluated.image_forward}
    times = benchmark.pedantic(interleave, (pieces, ROUNDS), options, rounds=1)
    title = trained.method.entry.title + (", as published" if trim.as_published else "")
    for piece, time in times.items():
        what = f"{title} B={BATCH} C={CLASSES}: {piece}"
        closing.add(what, time.ratio, "image forwards", beside=facts.get(piece, ""))
        benchmark.extra_info[f"ratio_{piece}"] = time.ratio
