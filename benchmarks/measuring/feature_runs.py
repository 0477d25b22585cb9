"""Runs of methods over features, from what a run has in the cache to what it has learned.

Of Caltech101 where its folder is given, else of features that are drawn at its size: a centre a
class, and noise, as wide as the CLIP's.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring.names import CALTECH101, TEMPLATE
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import Benchmark
from lamp_fast.data.loading import Transform
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.protocol import long_tail_targets
from lamp_fast.data.settings import DataConfig
from lamp_fast.data.transforms import FiveCrops
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs.building import build_clip, build_method
from lamp_fast.runs.config import TrainConfig, default_config
from lamp_fast.runs.experiment import Checked, Experiment, assemble, check_data
from lamp_fast.runs.machine import resolve_machine
from lamp_fast.runs.trainer import Trainer

CLOSED = ("tip", "ss-text", "ss-text+")
TRAINED = ("linear-probe", "lp++", "tip-f", "clip-adapter", "zs-lp", "clap", "prolip", "lfa")
"""Methods that are a closed form of features, and those that learn from features alone."""
# Look at frozen features and train in the text tower, or nothing.
NOT_LISTED = ("zeroshot", "coop", "tcp", "candle")
MAX_PICTURES, IMBALANCE, VALIDATION = 100, 10.0, 4
"""A class: of the largest, over the smallest, to choose settings on."""
# Of the noise, over the distance of a centre from their mean: a probe is right on most, not on all.
NOISE = 1.5
# Seeds of views that are not a run's random ones.
CENTRE, FIVE = 10**6, 10**6 + 1


@dataclass(frozen=True)
class Size:
    """Of features that are drawn.

    Attributes:
        classes: C.
        most: pictures of the largest class.
    """

    classes: int = 50
    most: int = MAX_PICTURES


class DrawnFeatures:
    """A feature reader that draws: of a picture always the same, another in every view."""

    def __init__(self, clip: FrozenClip, classes: int) -> None:
        self.clip = clip
        width = clip.vision.visual.proj.shape[0]
        generator = torch.Generator().manual_seed(0)
        self.centres = torch.randn(classes, width, generator=generator)

    def read(self, pictures: Pictures, transform: Transform) -> Tensor:
        """[N, V], or [N, 5, V] of five crops."""
        if isinstance(transform.views, FiveCrops):
            return self.read_views(pictures, transform, FIVE, 5)
        return self.read_view(pictures, transform, CENTRE, 0)

    def read_views(self, pictures: Pictures, transform: Transform, seed: int, views: int) -> Tensor:
        """[N, views, V]."""
        every = [self.read_view(pictures, transform, seed, view) for view in range(views)]
        return torch.stack(every, dim=1)

    def read_view(self, pictures: Pictures, transform: Transform, seed: int, view: int) -> Tensor:
        """[N, V]."""
        centres = self.centres[torch.from_numpy(pictures.labels)]
        generator = torch.Generator().manual_seed(1000 * seed + view)
        return centres + NOISE * torch.randn(centres.shape, generator=generator)


def run_config(method: str, root: Path | None) -> TrainConfig:
    """A method's published settings on Caltech101 under the carried CLIP, on a CPU."""
    clip = ClipConfig("tiny")
    config = default_config({"method": method, "data": "caltech101", "clip": clip.clip})
    data = replace(config.data, root=root, imb=IMBALANCE, cap=MAX_PICTURES)
    machine = replace(config.machine, device="cpu", precision="fp32")
    return replace(config, clip=clip, data=data, machine=machine)


class FeatureRuns:
    """Experiments of many methods over one set of features.

    Args:
        root: the folder that holds Caltech101; None draws.
        size: of what is drawn.
    """

    def __init__(self, root: Path | None, size: Size | None = None) -> None:
        self.root, self.size = root, size or Size()
        # One that looks at validation pictures, so that they are there for all.
        config = run_config("linear-probe", root)
        self.checked: Checked | None = None if root is None else check_data(config)
        machine, _ = resolve_machine(config.machine)
        self.clip = build_clip(replace(config, machine=machine))
        self.reader = DrawnFeatures(self.clip, self.size.classes)

    def experiment(self, method: str) -> Experiment:
        """A fresh one."""
        config = run_config(method, self.root)
        if self.checked is not None:
            return assemble(config, self.checked)
        machine, device = resolve_machine(config.machine)
        config = replace(config, machine=machine, data=DataConfig())
        benchmark = drawn_benchmark(self.size)
        torch.manual_seed(config.seed)
        classes = RunClasses(
            benchmark.base_names, benchmark.new_names, tuple(benchmark.counts.tolist())
        )
        built = build_method(self.clip, config, classes)
        return Experiment(config, device, self.clip, benchmark, built, "", (), self.reader)

    def pictures(self) -> int:
        """Of the training set."""
        benchmark = drawn_benchmark(self.size) if self.checked is None else self.checked[0]
        return len(benchmark.train)


def shortened(experiment: Experiment, epochs: int) -> Experiment:
    """The same with fewer epochs."""
    optim = replace(experiment.config.optim, epochs=epochs)
    return replace(experiment, config=replace(experiment.config, optim=optim))


def train(experiment: Experiment) -> float:
    """Seconds from a fresh experiment to what a run evaluates."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        trainer = Trainer(experiment, Path(folder))
        if trainer.parameters:
            trainer.run()
        experiment.method.settle(trainer.training)
        return time.perf_counter() - started


def drawn_benchmark(size: Size) -> Benchmark:
    """Labels without a picture: a long tail to train on, few to choose on, none to test on."""
    whole = [size.most] * size.classes
    counts = long_tail_targets(whole, IMBALANCE)
    train = _labelled(np.repeat(np.arange(size.classes), counts))
    return Benchmark(
        name="drawn",
        base_names=CALTECH101[: size.classes],
        new_names=CALTECH101[size.classes : 2 * size.classes],
        template=TEMPLATE,
        train=train,
        adapt=_labelled([]),
        test_base=_labelled([]),
        test_new=_labelled([]),
        imb=IMBALANCE,
        cap=None,
        shots=None,
        augment=True,
        val=_labelled(np.repeat(np.arange(size.classes), VALIDATION)),
    )


def _labelled(labels) -> Pictures:
    count = len(labels)
    names = tuple(str(index) for index in range(count))
    return Pictures(names, labels, arrays=np.zeros((count, 1, 1, 3), dtype=np.uint8))
