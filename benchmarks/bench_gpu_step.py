"""Whole steps on a GPU against the floor computed in the run.

``pytest benchmarks/bench_gpu_step.py --benchmark-only``: ViT-B/16 with random weights in bfloat16,
K=2, S=2, layers 3..12. A training step is forward, loss, backward, optimiser and load balancing,
captured as one CUDA graph and replayed; GPU time lies between events, wall time between
synchronisations. The floor is that of :mod:`benchmarks.step_kernels` at the rates that
:func:`benchmarks.measure.measure_ceilings` finds on the same device. Without a GPU the cells say
so.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from benchmarks.bench_input import draw_pictures
from benchmarks.classes import CALTECH101
from benchmarks.measure import Ceilings, measure_ceilings
from benchmarks.step_kernels import floor_seconds, step_kernels
from lamp_fast.clip import FrozenClip
from lamp_fast.config import (
    ClipConfig,
    DataConfig,
    LampConfig,
    OptimConfig,
    TrainConfig,
    Trimming,
    apply_preset,
)
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.experiment import assemble
from lamp_fast.graph import CapturedStep, CudaRecorder, Recorder
from lamp_fast.methods import Lamp
from lamp_fast.train import Trainer, build_optimiser

TEMPLATE = "a photo of a {}."
NO_GPU = "no GPU"
HAS_GPU = torch.cuda.is_available()
REPLAYS = 20


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        what: in words.
        images, classes, text_query: its size.
        train: a training step; else an evaluation.
        at_most: times the floor.
    """

    what: str
    images: int
    classes: int
    text_query: str
    train: bool
    at_most: float


LINES = [
    Line("step, B=128, C=50, text per class", 128, 50, "class", True, 1.4),
    Line("step, B=128, C=50, per (image, class), routes distinct", 128, 50, "image", True, 1.45),
    Line("step, B=4, C=50, per (image, class), graph", 4, 50, "image", True, 2.5),
    Line("evaluation, 100 images x 1,000 classes", 100, 1000, "image", False, 1.6),
]
EPOCH = "a whole epoch at B=128 from the cache, over its steps"
EPOCH_AT_MOST = 1.1


@dataclass(frozen=True)
class Cell:
    """A step that is ready to be taken.

    Attributes:
        run: takes it.
        floor: seconds, from given ceilings.
    """

    run: Callable[[], object]
    floor: Callable[[Ceilings], float]


def build_cell(clip: FrozenClip, line: Line, recorder: Recorder | None) -> Cell:
    """The step of a line; a training step is captured where there is a recorder."""
    device, dtype = next(clip.parameters()).device, clip.dtype
    names = (*CALTECH101, *open_clip.IMAGENET_CLASSNAMES)[: line.classes]
    if line.classes > len(CALTECH101):
        names = open_clip.IMAGENET_CLASSNAMES[: line.classes]
    config = LampConfig(
        text_query=line.text_query, layers=tuple(range(min(3, clip.depth), clip.depth + 1))
    )
    lamp = Lamp(clip, config, trimming=Trimming(share_routes=False, block=None))
    classes = lamp.prepare(names, TEMPLATE)
    size, generator = clip.preprocessing.size, torch.Generator().manual_seed(0)
    images = torch.randn(line.images, 3, size, size, generator=generator).to(device, dtype)
    labels = (torch.arange(line.images) % line.classes).to(device)

    def floor(ceilings: Ceilings) -> float:
        kernels = step_kernels(clip, line.images, classes, config, train=line.train)
        return floor_seconds(kernels, ceilings)

    if not line.train:
        return Cell(lambda: lamp.logits(images, classes), floor)
    parameters = list(lamp.parameters())
    optimiser = build_optimiser(OptimConfig(), parameters, device)
    elapsed = torch.zeros((), dtype=torch.float64, device=device)

    def step(images, labels):
        optimiser.zero_grad(set_to_none=True)
        taken = lamp.step(images, labels, classes, F.cross_entropy)
        taken.loss.backward()
        optimiser.step()
        lamp.after_step([taken.observations], elapsed)
        return {"loss": taken.loss.detach()}

    def state():
        slots = [each for state in optimiser.state.values() for each in state.values()]
        return [*parameters, *lamp.buffers(), *slots]

    captured = step if recorder is None else CapturedStep(step, state, recorder)
    return Cell(lambda: captured(images, labels), floor)


def times(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of GPU and of wall time, medians over replays; on a CPU both are the clock's."""
    run()
    on_gpu, on_wall = [], []
    for _ in range(REPLAYS if device.type == "cuda" else 2):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            first.record()
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            last.record()
            torch.cuda.synchronize()
            on_gpu.append(first.elapsed_time(last) / 1e3)
        on_wall.append(time.perf_counter() - started)
    return statistics.median(on_gpu or on_wall), statistics.median(on_wall)


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
    return times(lambda: trainer._take_step(images, labels, rows), device)[1]


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16-quickgelu")
    return FrozenClip(model, Preprocessing(size=224)).to("cuda", torch.bfloat16)


@pytest.fixture(scope="module")
def ceilings():
    return measure_ceilings(torch.device("cuda"))


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.what)
def bench_gpu_step(benchmark, request, tables, line):
    if not HAS_GPU:
        tables["steps"].append([line.what, *[NO_GPU] * 4, f"{line.at_most:g}"])
        pytest.skip(NO_GPU)
    clip, ceilings = map(request.getfixturevalue, ("clip", "ceilings"))
    device = torch.device("cuda")
    cell = build_cell(clip, line, CudaRecorder(device))
    gpu, wall = benchmark.pedantic(times, (cell.run, device), rounds=1)
    floor = cell.floor(ceilings)
    shown = [f"{1e3 * each:.2f}" for each in (floor, gpu, wall)]
    tables["steps"].append([line.what, *shown, f"{gpu / floor:.2f}", f"{line.at_most:g}"])
    benchmark.extra_info.update({"floor": floor, "gpu": gpu, "wall": wall} | ceilings.record())


def bench_epoch(benchmark, tables, tmp_path, monkeypatch):
    if not HAS_GPU:
        tables["steps"].append([EPOCH, *[NO_GPU] * 4, f"{EPOCH_AT_MOST:g}"])
        pytest.skip(NO_GPU)
    monkeypatch.setenv("LAMP_FAST_CACHE", str(tmp_path / "cache"))
    config = epoch_config(tmp_path, count=12_800, batch=128, workers=12)
    config = replace(config, clip=ClipConfig("ViT-B-16-quickgelu", "random"))
    ratio = benchmark.pedantic(epoch_over_steps, (config, one_step), rounds=1)
    tables["steps"].append([EPOCH, "", "", "", f"{ratio:.2f}", f"{EPOCH_AT_MOST:g}"])
