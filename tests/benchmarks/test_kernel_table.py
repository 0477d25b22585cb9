"""The kernel table's cases: every contender computes the same, floors count what they say."""

import pytest
import torch

from benchmarks.measuring import kernels
from benchmarks.measuring.floors import Ceilings
from benchmarks.measuring.timing import CPU, Time, rotations

CASES = list(kernels.cases(CPU, small=True))
RATES = Ceilings(flops=1e12, bytes=1e9, dtype="float32")


def quick_contenders(case):
    """Without what compiles, and kernels, which an interpreter would run for minutes."""
    slow = ("torch.compile", "FlexAttention", "triton", "cuda")
    return {
        name: call
        for name, call in case.contenders.items()
        if not any(word in name for word in slow)
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_contenders_agree(case):
    inputs = case.draw(0)
    plain = case.contenders.get("eager") or case.contenders["SDPA math"]
    wanted = plain(*inputs)
    ran = []
    for name, contender in quick_contenders(case).items():
        try:
            got = contender(*inputs)
        except RuntimeError as error:
            if "No viable backend" not in str(error):
                raise
            continue  # a GPU's
        # float32 on both sides: some hundred roundings.
        assert kernels.relative_error(got, wanted) < case.coarse.get(name, 1e-5), name
        ran.append(name)
    assert "ours" in ran


def test_wrong_results_are_not_timed():
    case = kernels.norm_case(CPU, torch.float32, False, rows=4, width=8)
    case.contenders["torch.compile"] = lambda x, update: (x, update)
    row = kernels.measure(case, CPU, RATES)
    assert row.times.keys() == {"ours", "eager"}
    assert row.refused["torch.compile"].startswith("wrong: relative error")
    assert "torch.compile: wrong" in row.beside()


def test_the_error_of_a_coarse_contender_is_shown_beside_its_time():
    case = kernels.product_case(CPU, torch.float32, rows=64, inner=128, outer=32)
    del case.contenders["fp8, converted by torch.compile"]
    row = kernels.measure(case, CPU, RATES)
    # A random factor of three mantissa bits is off by 2% or so; half of that would be four bits.
    assert 0.01 < row.errors["fp8 product alone"] < kernels.MAX_FP8_ERROR
    assert f"(error {row.errors['fp8 product alone']:.1e})" in row.beside()
    assert row.record()["errors"] == row.errors


def test_fp8_rows_keep_their_largest_entry():
    x = torch.tensor([[1e-3, 2e-3], [-5e4, 1.0], [0.0, 0.0]])
    small, scale = kernels.to_fp8(x)
    torch.testing.assert_close(small.float().abs().amax(1) * scale[:, 0], x.abs().amax(1))
    assert small.float().isfinite().all()


def test_a_floor_is_the_longer_of_arithmetic_and_traffic():
    assert RATES.floor(1e12, 1) == 1
    assert RATES.floor(1, 1e9) == 1


def test_floors_count_inputs_and_outputs_once():
    norm = kernels.norm_case(CPU, torch.float32, False, rows=10, width=8)
    x, update = norm.draw(0)
    assert norm.moved == 2 * (x.nbytes + update.nbytes)
    both = kernels.norm_case(CPU, torch.float32, True, rows=10, width=8)
    assert both.moved == norm.moved + 4 * x.nbytes
    vision = kernels.vision_case(CPU, torch.float32, False, batch=2)
    tensors = vision.draw(0)
    assert vision.moved == sum(each.numel() * 4 for each in tensors) + tensors[0].numel() * 4
    # Two products of 197 rows with 205 keys of width 64, in 12 heads of 2 pictures.
    assert vision.flops == 2 * 2 * 197 * 205 * 64 * 12 * 2


def test_ratios_are_against_ours():
    row = kernels.Row(CASES[0], 1.0)
    assert row.ratios() == {}
    row.times = {"ours": Time(2, 2, 2), "eager": Time(6, 6, 6)}
    assert row.ratios() == {"eager": 3}


def test_a_gpu_rotates_more_than_its_cache_holds():
    (one,) = rotations(lambda seed: (torch.zeros(4),), CPU)
    assert one[0].shape == (4,)


def test_floors_of_the_last_layer_count_the_rows_that_ask():
    tree = kernels.tree_case(CPU, torch.float32, False, images=2, prefix=5, classes=10, last=True)
    q, k, v, prefix_k, prefix_v = tree.draw(0)
    assert q.shape[2] == 10 < k.shape[2]
    inputs = sum(each.numel() for each in (q, k, v, prefix_k, prefix_v))
    assert tree.moved == 4 * (inputs + q.numel())
    retrieve = kernels.retrieve_case(CPU, True, batch=3, width=8, k=2)
    query, keys, _ = retrieve.draw(0)
    # Read in forward and in backward, and their gradients; indices, similarity and its gradient.
    assert retrieve.moved == 3 * (query.nbytes + keys.nbytes) + 3 * 2 * (8 + 4 + 4)


@pytest.mark.parametrize(
    "case",
    [
        kernels.retrieve_case(CPU, True, batch=3, width=8, k=2),
        kernels.short_case(
            CPU, torch.float32, True, groups=2, share=3, rows=5, prefix=4, heads=2, width=32
        ),
        kernels.tree_case(CPU, torch.float32, True, images=2, prefix=5, classes=10, last=True),
    ],
    ids=lambda case: case.what,
)
def test_native_code_stands_beside_the_reference_alone(case):
    row = kernels.measure(case.on_cpu(), CPU, RATES, rounds=1)
    assert row.refused == {}
    assert row.times.keys() - {"ours"} <= {"reference", "eager"}
    assert len(row.times) == 2
