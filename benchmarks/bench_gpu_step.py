"""Whole steps on a GPU against the floor computed in the run.

``pytest benchmarks/bench_gpu_step.py --benchmark-only``: ViT-B/16 with random weights in bfloat16,
K=2, S=2, layers 3..12. A training step is forward, loss, backward, optimiser and load balancing,
captured as one CUDA graph and replayed; GPU time lies between events, wall time between
synchronisations. The floor is that of :mod:`benchmarks.measuring.floors` at the rates of the same
device.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.bench_input import draw_pictures
from benchmarks.measuring.floors import floor_seconds
from benchmarks.measuring.steps import Cell, Line
from benchmarks.measuring.timing import this_device, time_steps
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.data.settings import DataConfig
from lamp_fast.runs.ahead import GPU_BYTES, bytes_a_picture
from lamp_fast.runs.config import TrainConfig, apply_preset
from lamp_fast.runs.experiment import assemble
from lamp_fast.runs.graph import CudaRecorder
from lamp_fast.runs.trainer import Trainer

DEVICE = this_device()
WHERE = {"device": DEVICE, "dtype": torch.bfloat16}
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")

LINES = [
    Line(128, 50, "class", at_most=1.4),
    Line(128, 50, "image", at_most=1.45),
    Line(4, 50, "image", at_most=2.5),
    Line(100, 1000, "image", train=False, at_most=1.6),
]
EPOCH = "a whole epoch at B=128 from the cache, over its steps"
EPOCH_AT_MOST = 1.1


def epoch_over_steps(config: TrainConfig, step_seconds: Callable[[Trainer], float]) -> float:
    """A second epoch, its pictures decoded by the first, over its number of steps."""
    trainer = Trainer(assemble(config), config.out)
    for epoch in range(2):
        trainer._epoch(epoch)
    seconds = trainer._epoch(2)["seconds"]
    return seconds / (len(trainer.batch_sizes) * step_seconds(trainer))


def epoch_config(folder: Path, *, count: int, batch: int, workers: int) -> TrainConfig:
    """A run of three epochs over pictures that it draws into ``folder``."""
    for name in ("one", "two"):
        part = folder / "pictures" / name
        part.mkdir(parents=True)
        draw_pictures(part, count // 2)
    config = apply_preset(TrainConfig(out=folder / "run"), "section4.1")
    return replace(
        config,
        data=DataConfig(data="folder", root=folder / "pictures"),
        optim=replace(config.optim, epochs=3, batch=batch),
        machine=replace(config.machine, workers=workers),
        trim=replace(config.trim, share_routes=False),
    )


def one_step(trainer: Trainer) -> float:
    """Wall seconds of the trainer's own step on pictures that are already there."""
    device, clip = trainer.experiment.device, trainer.experiment.clip
    rows = trainer.batch_sizes[0]
    images = torch.zeros(rows, 3, *[clip.preprocessing.size] * 2, device=device, dtype=clip.dtype)
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    return time_steps(lambda: trainer._take_step(images, labels, rows), device)[1]


@needs_gpu
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.what)
def bench_gpu_step(benchmark, closing, device_clip, device_ceilings, line):
    torch.cuda.reset_peak_memory_stats()
    cell = line.cell(device_clip)
    run = cell.captured(CudaRecorder(DEVICE)) if line.train else cell.evaluate
    gpu, wall = benchmark.pedantic(time_steps, (run, DEVICE), rounds=1)
    floor = floor_seconds(cell.kernels(line.train), device_ceilings)
    peak = torch.cuda.max_memory_allocated()
    closing.add(
        f"LAMP {line.what}, {'one graph: train' if line.train else 'evaluate'}",
        1e3 * gpu,
        "ms",
        floor=1e3 * floor,
        beside=f"wall {1e3 * wall:.2f} ms, peak {peak / 2**30:.2f} GiB",
        aim=f"at most {line.at_most:g} floors",
        **WHERE,
    )
    benchmark.extra_info.update(
        {"floor": floor, "gpu": gpu, "wall": wall, "peak_bytes": peak} | device_ceilings.record()
    )


@needs_gpu
@pytest.mark.parametrize("first", [3, 6])
def bench_look_ahead(benchmark, closing, device_clip, first):
    """Steps of B=4 whose frozen layers ran for as many batches at once as a run would take."""
    cell = Cell(device_clip, 4, 50, layers=tuple(range(first, device_clip.depth + 1)))
    batches = GPU_BYTES // bytes_a_picture(device_clip) // cell.batch
    runs = {
        "alone": cell.captured(CudaRecorder(DEVICE)),
        "ahead": cell.captured(CudaRecorder(DEVICE), ahead=True),
        "frozen": cell.frozen_layers(batches),
    }

    def measure():
        return {name: time_steps(run, DEVICE)[1] for name, run in runs.items()}

    wall = benchmark.pedantic(measure, rounds=1)
    both = {"alone": wall["alone"], "looking ahead": wall["ahead"] + wall["frozen"] / batches}
    benchmark.extra_info.update(both)
    for how, seconds in both.items():
        what = f"LAMP B=4, C=50, layers below {first} {how}, one graph: train, wall time"
        closing.add(what, 1e3 * seconds, "ms", **WHERE)


@needs_gpu
def bench_epoch(benchmark, closing, tmp_path, monkeypatch):
    monkeypatch.setenv("LAMP_FAST_CACHE", str(tmp_path / "cache"))
    config = epoch_config(tmp_path, count=2_560, batch=128, workers=12)
    config = replace(config, clip=ClipConfig("ViT-B-16-quickgelu", "random"))
    ratio = benchmark.pedantic(epoch_over_steps, (config, one_step), rounds=1)
    closing.add(EPOCH, ratio, "times its steps", aim=f"at most {EPOCH_AT_MOST:g}", **WHERE)
    benchmark.extra_info["epoch_over_steps"] = ratio
