"""The floor of a step, and that the GPU benchmark's code runs: on a CPU, at small sizes."""

from dataclasses import replace

import pytest
import torch

from benchmarks import bench_gpu_step, methods_growth, step_parts
from benchmarks.conftest import HEADER, ClosingTable
from benchmarks.measuring import memory, timing
from benchmarks.measuring.floors import (
    NORMS,
    PRODUCTS,
    Ceilings,
    Kernel,
    floor_by_part,
    floor_in_image_forwards,
    floor_seconds,
    image_forward_kernels,
    step_kernels,
)
from benchmarks.measuring.names import CALTECH101, base_and_new, numbered
from benchmarks.measuring.steps import SMALL, Cell, Line, random_clip
from benchmarks.measuring.timing import CPU, interleave, time_steps
from lamp_fast import ops
from lamp_fast.clip.settings import ClipConfig, Trimming
from lamp_fast.methods.lamp.model import Lamp
from lamp_fast.methods.settings.lamp import LampSettings

NAMES = ["dog", "old dog", "cat", "sea horse"]


def step_floor(
    clip, images: int, text_rows: int, eot_rows: int, first_layer: int
) -> tuple[float, float]:
    """Multiply-adds of matrix products of a step, and of an evaluation, over the image forward's.

    Counted by hand, apart from :mod:`benchmarks.measuring.floors`: without the prompts' own keys,
    text attention, and as if the gradient of the first layer with prompts went on below it.
    """
    vision, text = clip.vision, clip.text
    tokens = vision.visual.positional_embedding.shape[0]
    patches = (tokens - 1) * images
    embed = patches * vision.visual.conv1.weight[0].numel() * vision.width
    depth = len(vision.blocks)
    full = embed + depth * _layer(vision.width, tokens * images, tokens)
    last = _last_layer(vision.width, tokens * images, images, tokens)
    forward = embed + (depth - 1) * _layer(vision.width, tokens * images, tokens) + last
    backward = (depth - first_layer) * _layer(vision.width, tokens * images, tokens) + last
    # A class row meets some ten keys; its attention is left out.
    text_layers = len(text.blocks) - first_layer
    text_forward = text_layers * _layer(text.width, text_rows, 0)
    text_forward += _last_layer(text.width, text_rows, eot_rows, 0)
    return (forward + backward + 2 * text_forward) / full, (forward + text_forward) / full


def _layer(width: int, rows: int, keys: int) -> int:
    return rows * (12 * width * width + 2 * keys * width)


def _last_layer(width: int, rows: int, read: int, keys: int) -> int:
    """Keys and values of every row; query, output and MLP of the rows that are read."""
    return rows * 2 * width * width + read * (10 * width * width + 2 * keys * width)


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
    """Against :func:`step_floor`, which leaves out what this has and has what this leaves out, so
    that the two bracket each other."""
    clip, images = small_clip(), 16
    config = LampSettings(k=1, s=1, d=8, m=4, layers=(2, 3, 4))
    classes = Lamp(clip, config).prepare(NAMES, "a photo of a {}.")
    rows = images * sum(map(len, classes.forests))
    train, evaluation = step_floor(clip, images, rows, images * len(NAMES), first_layer=2)
    full = sum(each.flops for each in image_forward_kernels(clip, images))
    got = products(step_kernels(clip, images, classes, config, train=False)) / full
    # 2 prompts beside 5 tokens, and attention over some ten text keys: a few percent.
    assert evaluation < got < 1.12 * evaluation
    got = products(step_kernels(clip, images, classes, config, train=True)) / full
    # Forward + backward less the first layer's input projection of both towers (3 of 12 widths).
    assert 0.9 * train < got < 1.12 * train
    # With the prompts' own projections it can only be more.
    kernels = [*step_kernels(clip, images, classes, config, train=True)]
    ceilings = Ceilings(flops=64.0, bytes=1.0, dtype="float32")
    floor = floor_in_image_forwards(kernels, ceilings, full / 64)
    assert floor > got
    # A unit that took twice as long as its arithmetic must halves it: exact in binary.
    assert floor_in_image_forwards(kernels, ceilings, full / 32) == floor / 2


def test_an_image_forward_is_counted_by_hand(small_clip):
    clip, images = small_clip(), 16
    tokens, width = clip.vision.visual.positional_embedding.shape
    patch = clip.vision.visual.conv1.weight[0].numel()
    layer = images * tokens * (12 * width**2 + 2 * tokens * width)
    full = 2 * (images * (tokens - 1) * patch * width + 4 * layer)
    assert sum(each.flops for each in image_forward_kernels(clip, images)) == full


@pytest.mark.parametrize("text_query", ["image", "class"])
@pytest.mark.parametrize("train", [True, False])
def test_a_step_that_is_measured_runs(small_clip, text_query, train):
    cell = Line(4, 3, text_query).cell(small_clip())
    given = Ceilings(flops=650e12, bytes=2.7e12, dtype="bfloat16")
    slower = replace(given, bytes=1e12)
    kernels = cell.kernels(train)
    assert 0 < floor_seconds(kernels, given) < floor_seconds(kernels, slower) < 1e-3
    assert min(time_steps(cell.train if train else cell.evaluate_anew, CPU)) > 0


def test_a_training_step_moves_what_it_trains(small_clip):
    cell = Cell(small_clip(), 4, 3)
    before = [each.detach().clone() for each in cell.method.parameters()]
    cell.gradients()
    assert all(each.grad is None for each in cell.method.parameters())
    cell.train()
    moved = [not torch.equal(a, b) for a, b in zip(before, cell.method.parameters(), strict=True)]
    assert any(moved)


def test_an_evaluation_anew_computes_kept_text_again(small_clip, monkeypatch):
    cell, calls = Cell(small_clip(), 4, 3, text_query="class"), []
    compute = cell.method.class_texts
    forget = cell.method.forget_text
    monkeypatch.setattr(cell.method, "forget_text", lambda: (calls.append("forget"), forget()))
    monkeypatch.setattr(
        cell.method, "class_texts", lambda *given: (calls.append("text"), compute(*given))[1]
    )
    cell.evaluate()
    cell.evaluate()
    cell.evaluate_anew()
    assert calls == ["text", "forget", "text"]


def test_traffic_is_that_of_the_clips_own_dtype(small_clip):
    line = Line(4, 3, "image")
    clip = small_clip().float()
    single = line.cell(clip).kernels(train=False)
    double = line.cell(clip.double()).kernels(train=False)
    assert [2 * each.moved for each in single] == [each.moved for each in double]


def test_the_parts_of_a_step_are_told_apart(small_clip):
    cell = Cell(small_clip(), 4, 3)
    floor = floor_by_part(
        cell.kernels(train=True), Ceilings(flops=1e12, bytes=1e10, dtype="float32")
    )
    shares = step_parts.measure("a step", cell.train, floor, CPU, 1)
    assert tuple(shares.seconds) == step_parts.KINDS_OF_WORK
    measured = {part for part, taken in shares.seconds.items() if taken > 0}
    rest = {step_parts.RETRIEVAL, step_parts.OTHER}
    assert measured - {step_parts.WAITS} == set(floor) | rest
    rows = shares.rows()
    assert {row[1] for row in rows} == set(step_parts.KINDS_OF_WORK)
    assert [float(row[-1]) for row in rows] == sorted(float(row[-1]) for row in rows)[::-1]
    (axes,) = step_parts.draw([shares], "a step").axes
    widths = {part: [] for part in step_parts.KINDS_OF_WORK}
    for bars in axes.containers:
        widths[bars.get_label()] = [bar.get_width() / 1e3 for bar in bars]
    for part, drawn in widths.items():
        wanted = [shares.seconds[part], shares.floor.get(part, 0.0)]
        assert (drawn or [0.0, 0.0]) == pytest.approx(wanted)


def test_packed_products_are_products():
    x, linear = torch.randn(64, 512), ops.FrozenLinear(torch.randn(512, 512))
    seconds = step_parts.measure("a product", lambda: linear(x), {}, CPU, 1).seconds
    assert seconds[PRODUCTS] > seconds[step_parts.OTHER]


@pytest.mark.parametrize("path", ["fast", "slow"])
def test_every_line_of_the_growth_runs(small_clip, path):
    clip, results = small_clip(6, 6), {}
    lines = [each for each in methods_growth.contenders(CPU) if each.slow == (path == "slow")]
    for line in lines:
        results[line.title] = {3: methods_growth.measure(clip, line, 3, 1)}
        assert results[line.title][3].ratio > 0
    (axes,) = methods_growth.draw("growth", results, lines).axes
    drawn = {line.get_label(): tuple(line.get_ydata()) for line in axes.lines}
    assert drawn == {name: (points[3].ratio,) for name, points in results.items()}


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
    base, new = base_and_new(120)
    assert len({*base, *new}) == 240


def test_a_line_of_an_epoch_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMP_FAST_CACHE", str(tmp_path / "cache"))
    config = bench_gpu_step.epoch_config(tmp_path, count=12, batch=4, workers=0)
    own = replace(config.own, layers=(5, 6))
    config = replace(config, own=own, clip=ClipConfig("tiny"))
    assert bench_gpu_step.epoch_over_steps(config, bench_gpu_step.one_step) > 0


def test_peak_memory_counts_what_lives():
    with memory.PeakMemory() as counted:
        one = torch.zeros(1000)
        view = one[:10]
        two = one * 2
        del one, view
        three = two + 1
    assert counted.peak == 2 * 4000  # one and two, then two and three
    assert counted.live == 2 * 4000
    del two, three
    assert counted.live == 0


def test_what_backward_keeps_grows_with_the_text(small_clip):
    clip = small_clip()
    few, many = (memory.kept_for_backward(Cell(clip, 2, count)) for count in (2, 20))
    assert 0 < few < many


@pytest.mark.slow
def test_the_system_sees_more_memory_without_blocks():
    (in_blocks, rows), (in_one, same) = (memory.system_peak(100, block) for block in (64, 3200))
    assert rows == same > 100
    # What was freed before the step may hold all of a small block.
    assert 0 <= in_blocks < in_one


def test_pieces_are_timed_in_turn_beside_their_unit():
    order, clock_of = [], {"unit": 2.0, "a": 4.0, "b": 6.0}

    def piece(name):
        return lambda: order.append(name)

    def clock(run):
        run()
        return clock_of[order[-1]]

    times = interleave({"a": piece("a"), "b": piece("b")}, 2, clock=clock, unit=piece("unit"))
    warm_up = ["a", "b", "unit"]
    assert order == [*warm_up, "unit", *["a", "unit", "b", "unit"] * 2]
    assert times["a"] == timing.Time(4.0, 4.0, 4.0, ratio=2.0)
    assert times["b"].ratio == 3.0
    assert interleave({"a": piece("a")}, 1, clock=clock)["a"].ratio is None


def test_threads_are_put_back():
    before = torch.get_num_threads()

    def interrupted():
        with timing.threads(before + 1):
            raise RuntimeError(timing.measured_with(CPU, torch.float32))

    with pytest.raises(RuntimeError, match=f"^CPU, {before + 1} threads, float32$"):
        interrupted()
    assert torch.get_num_threads() == before


def test_the_small_clip_takes_its_own_pictures():
    cell = Cell(random_clip(CPU, sizes=SMALL), 2, 3)
    assert cell.images.shape == (2, 3, 32, 32)
    cell.image_forward()


def test_the_closing_table_says_what_a_figure_was_measured_with():
    table = ClosingTable()
    with timing.threads(1):
        table.add("a step", 3.0, "ms", floor=1.5, beside="eager 2x", aim="2 floors")
    with timing.threads(2):
        table.add("a file", 1234.5, "MiB", dtype=torch.bfloat16)
    first, second = (dict(zip(HEADER, row, strict=True)) for row in table.rows)
    assert (first["ours"], first["floor"], first["ours / floor"]) == ("3.00 ms", "1.50 ms", "2.00")
    assert first["measured with"] == "CPU, 1 thread, float32"
    assert (second["ours"], second["floor"], second["ours / floor"]) == ("1,234 MiB", "", "")
    assert second["measured with"] == "CPU, 2 threads, bfloat16"


@pytest.mark.slow
def test_a_peak_is_of_the_step_however_large_the_one_who_asks():
    """At its peak a step holds at least what it keeps for backward. A child of a process that holds
    twice that much would see none of it by getrusage."""
    cell = Cell(
        random_clip(CPU, sizes=SMALL),
        memory.BATCH,
        40,
        trim=Trimming(block=1 << 30, share_routes=False),
        names=[f"thing number {number}" for number in range(40)],
    )
    kept = memory.kept_for_backward(cell)
    held = torch.ones(kept // 2)  # float32: two times as many bytes
    measured, _ = memory.system_peak(40, 1 << 30)
    assert measured * 2**20 > kept
    assert held.nbytes > kept
