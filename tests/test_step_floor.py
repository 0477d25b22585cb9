"""The floor of a step, and that the GPU benchmark's code runs: on a CPU, at small sizes."""

from dataclasses import replace

import pytest
import torch

from benchmarks import bench_gpu_step
from benchmarks.fake_memory import PeakMemory
from benchmarks.floor import step_floor
from benchmarks.measure import Ceilings
from benchmarks.step_kernels import Kernel, floor_seconds, step_kernels
from lamp_fast.config import LampConfig
from lamp_fast.methods import Lamp

NAMES = ["dog", "old dog", "cat", "sea horse"]


def products(kernels) -> float:
    """Arithmetic of what :func:`step_floor` counts: no prompts, no optimiser."""
    return sum(each.flops for each in kernels if "prompts" not in each.name and each.name != "phi")


def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic():
    ceilings = Ceilings(flops=100.0, bytes=10.0, dtype="bfloat16")
    kernels = [Kernel("a", 200, 10), Kernel("b", 0, 50)]
    assert floor_seconds(iter(kernels), ceilings) == 2 + 5


def test_arithmetic_agrees_with_the_flop_floor(small_clip):
    """Against benchmarks/floor.py, written apart: the ratio of a step to CLIP's image forward.

    That one leaves out the prompts' own keys in attention and text attention, and counts the first
    layer with prompts as if its gradient went on to the layer below; so the two bracket each other.
    """
    clip, images = small_clip(), 16
    config = LampConfig(k=1, s=1, d=8, m=4, layers=(2, 3, 4))
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
def test_a_line_of_the_table_runs(small_clip, text_query, train):
    line = bench_gpu_step.Line("", 4, 3, text_query, train, 1.0)
    cell = bench_gpu_step.build_cell(small_clip(), line, None)
    given = Ceilings(flops=650e12, bytes=2.7e12, dtype="bfloat16")
    assert 0 < cell.floor(given) < cell.floor(replace(given, bytes=1e12)) < 1e-3
    assert min(bench_gpu_step.times(cell.run, torch.device("cpu"))) > 0


def test_a_line_of_an_epoch_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMP_FAST_CACHE", str(tmp_path / "cache"))
    config = bench_gpu_step.epoch_config(tmp_path, count=12, batch=4, workers=0)
    config = replace(config, lamp=replace(config.lamp, layers=(5, 6)))
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
