"""LAMP's whole step as a thing to measure: ViT-B/16 with random weights, K=2, S=2, layers 3..12.

A training step is forward, loss, backward, optimiser and load balancing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import open_clip
import torch
import torch.nn.functional as F

from benchmarks.classes import CALTECH101, TEMPLATE
from benchmarks.step_kernels import Kernel, step_kernels
from lamp_fast.clip import FrozenClip, Trimming
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.methods import Lamp
from lamp_fast.methods.lamp import LampSettings
from lamp_fast.runs.graph import CapturedStep, Recorder
from lamp_fast.runs.optimisation import OptimConfig, build_optimiser


@dataclass(frozen=True)
class Line:
    """A step in words and sizes.

    Attributes:
        what: in words.
        images, classes, text_query: its size.
        train: a training step; else an evaluation.
        at_most: times its floor, where there is such an aim.
    """

    what: str
    images: int
    classes: int
    text_query: str
    train: bool
    at_most: float | None = None


@dataclass(frozen=True)
class Cell:
    """A step that is ready to be taken.

    Attributes:
        run: takes it.
        kernels: that it needs at least.
    """

    run: Callable[[], object]
    kernels: tuple[Kernel, ...]


def random_clip(device: torch.device) -> FrozenClip:
    """ViT-B/16 with random weights: bfloat16 on a GPU, float32 on a CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-B-16-quickgelu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return FrozenClip(model, Preprocessing(size=224)).to(device, dtype)


def layers_of(clip: FrozenClip) -> tuple[int, ...]:
    """3..12 of ViT-B/16; of a shallower CLIP from 3 on as far as it goes."""
    return tuple(range(min(3, clip.depth), clip.depth + 1))


def build_cell(clip: FrozenClip, line: Line, recorder: Recorder | None = None) -> Cell:
    """The step of a line; a training step is captured where there is a recorder."""
    device, dtype = next(clip.parameters()).device, clip.dtype
    known = CALTECH101 if line.classes <= len(CALTECH101) else open_clip.IMAGENET_CLASSNAMES
    names = known[: line.classes]
    config = LampSettings(text_query=line.text_query, layers=layers_of(clip))
    lamp = Lamp(clip, config, trimming=Trimming(share_routes=False, block=None))
    classes = lamp.prepare(names, TEMPLATE)
    size, generator = clip.preprocessing.size, torch.Generator().manual_seed(0)
    images = torch.randn(line.images, 3, size, size, generator=generator).to(device, dtype)
    labels = (torch.arange(line.images) % line.classes).to(device)
    kernels = tuple(step_kernels(clip, line.images, classes, config, train=line.train))
    if not line.train:
        return Cell(lambda: lamp.logits(images, classes), kernels)
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
    return Cell(lambda: captured(images, labels), kernels)
