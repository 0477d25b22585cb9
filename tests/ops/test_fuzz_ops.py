"""Random shapes and options of every op, by seed: a few here, 2,000 an op on a GPU."""

import calls
import pytest
import torch
import under_test

from lamp_fast.ops import dispatch

GPU = torch.cuda.is_available()
SEEDS = 12
MANY = 2000


def every_implementation():
    for op in calls.OPS:
        for impl in dispatch.IMPLEMENTATIONS[op]:
            if impl != "reference":
                yield pytest.param(op, impl, marks=under_test.skipped(op, impl), id=f"{op}-{impl}")


def check(op, impl, seed, *, large):
    dtypes = [
        each
        for each in (torch.float32, torch.float16, torch.bfloat16)
        if under_test.serves(op, impl, each)
    ]
    dtype = dtypes[seed % len(dtypes)]
    try:
        calls.assert_accurate(calls.draw(op, seed, large=large), impl, dtype)
    except Exception as error:
        raise AssertionError(f"{op}, {impl}, {dtype}, seed {seed}") from error


@pytest.mark.parametrize(("op", "impl"), [*every_implementation()])
def test_random_calls(op, impl):
    for seed in range(SEEDS):
        check(op, impl, seed, large=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not GPU, reason="needs a GPU: the interpreter would take hours")
@pytest.mark.parametrize(("op", "impl"), [*every_implementation()])
def test_many_large_random_calls(op, impl):
    for seed in range(MANY):
        check(op, impl, seed, large=True)
