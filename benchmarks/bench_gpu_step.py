"""Whole steps on a GPU against the floor computed in the run.

``pytest benchmarks/bench_gpu_step.py --benchmark-only``: ViT-B/16 with random weights in bfloat16,
K=2, S=2, layers 3..12. A training step is forward, loss, backward, optimiser and load balancing,
captured as one CUDA graph and replayed; GPU time lies between events, wall time between
synchronisations. The floor is that of :mod:`benchmarks.step_kernels` at the rates that
:func:`benchmarks.measure.measure_ceilings` finds on the same device. Without a GPU the cells say
so.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.bench_input import draw_pictures
from benchmarks.measure import measure_ceilings, time_steps
from benchmarks.step_kernels import floor_seconds
from benchmarks.steps import Line, build_cell, random_clip
from lamp_fast.clip import ClipConfig
from lamp_fast.data import DataConfig
from lamp_fast.runs.config import TrainConfig, apply_preset
from lamp_fast.runs.experiment import assemble
from lamp_fast.runs.graph import CudaRecorder
from lamp_fast.runs.trainer import Trainer

NO_GPU = "no GPU"
HAS_GPU = torch.cuda.is_available()

LINES = [
    Line("step, B=128, C=50, text per class", 128, 50, "class", True, 1.4),
    Line("step, B=128, C=50, per (image, class), routes distinct", 128, 50, "image", True, 1.45),
    Line("step, B=4, C=50, per (image, class), graph", 4, 50, "image", True, 2.5),
    Line("evaluation, 100 images x 1,000 classes", 100, 1000, "image", False, 1.6),
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


@pytest.fixture(scope="module")
def clip():
    return random_clip(torch.device("cuda"))


@pytest.fixture(scope="module")
def ceilings():
    return measure_ceilings(torch.device("cuda"))


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.what)
def bench_gpu_step(benchmark, request, tables, line):
    if not HAS_GPU:
        tables["steps"].append([line.what, *[NO_GPU] * 4, f"{line.at_most:g}", ""])
        pytest.skip(NO_GPU)
    clip, ceilings = map(request.getfixturevalue, ("clip", "ceilings"))
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    cell = build_cell(clip, line, CudaRecorder(device))
    gpu, wall = benchmark.pedantic(time_steps, (cell.run, device), rounds=1)
    floor, peak = floor_seconds(cell.kernels, ceilings), torch.cuda.max_memory_allocated()
    shown = [f"{1e3 * each:.2f}" for each in (floor, gpu, wall)]
    shown += [f"{gpu / floor:.2f}", f"{line.at_most:g}", f"{peak / 2**30:.2f}"]
    tables["steps"].append([line.what, *shown])
    benchmark.extra_info.update(
        {"floor": floor, "gpu": gpu, "wall": wall, "peak_bytes": peak} | ceilings.record()
    )


def bench_epoch(benchmark, tables, tmp_path, monkeypatch):
    if not HAS_GPU:
        tables["steps"].append([EPOCH, *[NO_GPU] * 4, f"{EPOCH_AT_MOST:g}", ""])
        pytest.skip(NO_GPU)
    monkeypatch.setenv("LAMP_FAST_CACHE", str(tmp_path / "cache"))
    config = epoch_config(tmp_path, count=2_560, batch=128, workers=12)
    config = replace(config, clip=ClipConfig("ViT-B-16-quickgelu", "random"))
    ratio = benchmark.pedantic(epoch_over_steps, (config, one_step), rounds=1)
    tables["steps"].append([EPOCH, "", "", "", f"{ratio:.2f}", f"{EPOCH_AT_MOST:g}", ""])
    benchmark.extra_info["epoch_over_steps"] = ratio
