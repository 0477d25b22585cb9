"""The kernel table's cases: every contender computes the same, floors count what they say."""

import pytest
import torch

from benchmarks.measuring import kernels
from benchmarks.measuring.timing import Ceilings, Time, rotations

CPU = torch.device("cpu")
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
    (line,) = kernels.table([row])
    assert "wrong" in line[4]


def test_the_error_of_a_coarse_contender_is_shown_beside_its_time():
    case = kernels.product_case(CPU, torch.float32, rows=64, inner=128, outer=32)
    del case.contenders["fp8, converted by torch.compile"]
    row = kernels.measure(case, CPU, RATES)
    # A random factor of three mantissa bits is off by 2% or so; half of that would be four bits.
    assert 0.01 < row.errors["fp8 product alone"] < kernels.MOST_FP8_ERROR
    (line,) = kernels.table([row])
    assert f"(error {row.errors['fp8 product alone']:.1e})" in line[4]
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
