"""The floor of a step, and that the GPU benchmark's code runs: on a CPU, at small sizes."""

from dataclasses import replace

import pytest
import torch

from benchmarks import bench_gpu_step, methods_growth, step_parts, steps
from benchmarks.classes import CALTECH101, numbered
from benchmarks.fake_memory import PeakMemory
from benchmarks.floor import step_floor
from benchmarks.measure import Ceilings, time_steps
from benchmarks.step_kernels import (
    NORMS,
    PRODUCTS,
    Kernel,
    floor_by_part,
    floor_seconds,
    step_kernels,
)
from lamp_fast.methods import Lamp
from lamp_fast.methods.lamp import LampSettings

CPU = torch.device("cpu")
NAMES = ["dog", "old dog", "cat", "sea horse"]


def products(kernels) -> float:
    """Arithmetic of what :func:`step_floor` counts: no prompts, no optimiser."""
    return sum(each.flops for each in kernels if "prompts" not in each.name and each.name != "phi")


def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic():
    ceilings = Ceilings(flops=100.0, bytes=10.0, dtype="bfloat16")
    kernels = [
        Kernel(PRODUCTS, "a", 200, 10),
        Kernel(NORMS, "b", 0, 50),
        Kernel(PRODUCTS, "c", 100, 5),
    ]
    assert floor_seconds(iter(kernels), ceilings) == 2 + 5 + 1
    assert floor_by_part(kernels, ceilings) == {PRODUCTS: 3, NORMS: 5}


def test_arithmetic_agrees_with_the_flop_floor(small_clip):
    """Against benchmarks/floor.py, written apart: the ratio of a step to CLIP's image forward.

    That one leaves out the prompts' own keys in attention and text attention, and counts the first
    layer with prompts as if its gradient went on to the layer below; so the two bracket each other.
    """
    clip, images = small_clip(), 16
    config = LampSettings(k=1, s=1, d=8, m=4, layers=(2, 3, 4))
    classes = Lamp(clip, config).prepare(NAMES, "a photo of a {}.")
    rows = images * sum(map(len, classes.forests))
    train, evaluation = step_floor(clip, images, rows, images * len(NAMES), first_layer=2)
    tokens, width = clip.vision.visual.positional_embedding.shape
    patch = clip.vision.visual.conv1.weight[0].numel()
    layer = images * tokens * (12 * width**2 + 2 * tokens * width)
    full = 2 * (images * (tokens - 1) * patch * width + 4 * layer)
    got = products(step_kernels(clip, images, classes, config, train=False)) / full
    # 2 prompts beside 5 tokens, and attention over some ten text keys: a few percent.
    assert evaluation < got < 1.12 * evaluation
    got = products(step_kernels(clip, images, classes, config, train=True)) / full
    # Forward + backward less the first layer's input projection of both towers (3 of 12 widths).
    assert 0.9 * train < got < 1.12 * train


@pytest.mark.parametrize("text_query", ["image", "class"])
@pytest.mark.parametrize("train", [True, False])
def test_a_step_that_is_measured_runs(small_clip, text_query, train):
    cell = steps.build_cell(small_clip(), steps.Line("", 4, 3, text_query, train))
    given = Ceilings(flops=650e12, bytes=2.7e12, dtype="bfloat16")
    slower = replace(given, bytes=1e12)
    assert 0 < floor_seconds(cell.kernels, given) < floor_seconds(cell.kernels, slower) < 1e-3
    assert min(time_steps(cell.run, CPU)) > 0


def test_traffic_is_that_of_the_clips_own_dtype(small_clip):
    line = steps.Line("", 4, 3, "image", False)
    clip = small_clip().float()
    single = steps.build_cell(clip, line).kernels
    double = steps.build_cell(clip.double(), line).kernels
    assert [2 * each.moved for each in single] == [each.moved for each in double]


def test_the_parts_of_a_step_are_told_apart(small_clip, tmp_path):
    cell = steps.build_cell(small_clip(), steps.Line("", 4, 3, "image", True))
    floor = floor_by_part(cell.kernels, Ceilings(flops=1e12, bytes=1e10, dtype="float32"))
    shares = step_parts.measure("a step", cell.run, floor, CPU, 1)
    assert tuple(shares.seconds) == step_parts.PARTS
    measured = {part for part, taken in shares.seconds.items() if taken > 0}
    rest = {step_parts.RETRIEVAL, step_parts.OTHER}
    assert measured - {step_parts.WAITS} == set(floor) | rest
    rows = shares.rows()
    assert {row[1] for row in rows} == set(step_parts.PARTS)
    assert [float(row[-1]) for row in rows] == sorted(float(row[-1]) for row in rows)[::-1]
    step_parts.draw([shares], tmp_path / "parts.png", "a step")
    assert (tmp_path / "parts.png").stat().st_size > 0


@pytest.mark.parametrize("path", ["fast", "slow"])
def test_every_line_of_the_growth_runs(small_clip, tmp_path, path):
    clip, results = small_clip(6, 6), {}
    lines = [each for each in methods_growth.contenders(CPU) if each.slow == (path == "slow")]
    for line in lines:
        results[line.title] = {3: methods_growth.measure(clip, line, 3, 1)}
        assert results[line.title][3].ratio > 0
    methods_growth.draw("growth", results, lines, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 0


def test_what_does_not_fit_is_a_point_that_says_so(small_clip):
    def build(clip, classes):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    line = methods_growth.Contender("greedy", 0, False, build)
    point = methods_growth.measure(small_clip(), line, 3, 1)
    assert point == methods_growth.Point(refused="CUDA out of memory. Tried")


def test_names_go_on_beyond_the_list():
    names = numbered(CALTECH101, 250)
    assert len(set(names)) == 250
    assert names[:100] == CALTECH101


def test_a_line_of_an_epoch_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMP_FAST_CACHE", str(tmp_path / "cache"))
    config = bench_gpu_step.epoch_config(tmp_path, count=12, batch=4, workers=0)
    config = replace(config, own=replace(config.own, layers=(5, 6)))
    assert bench_gpu_step.epoch_over_steps(config, bench_gpu_step.one_step) > 0


def test_peak_memory_counts_what_lives():
    with PeakMemory() as memory:
        one = torch.zeros(1000)
        view = one[:10]
        two = one * 2
        del one, view
        three = two + 1
    assert memory.peak == 2 * 4000  # one and two, then two and three
    assert memory.live == 2 * 4000
    del two, three
    assert memory.live == 0
