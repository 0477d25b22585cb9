"""The step that is measured, of every method: over one random CLIP, on one batch.

A training step is forward, loss, backward, optimiser and what the method moves itself, such as
LAMP's load balancing. Random pictures, and random features where a method trains on features (LFA)
or looks at the training set first (Candle); settings as published, LAMP's prompts in layers 3..12.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring.floors import Kernel, step_kernels
from benchmarks.measuring.names import TEMPLATE, base_and_new
from lamp_fast.clip.features import up_to_layer
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.methods.base import Step
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import default_config
from lamp_fast.runs.graph import CapturedStep, Recorder
from lamp_fast.runs.optimisation import build_optimiser

# LAMP's own slow path is of the equations, not of anybody's code; the others have nothing to trim.
AS_PUBLISHED = ("coop", "cocoop", "maple", "tcp", "mma", "promptsrc", "mmrl", "mmrl++")
# Sharing pays by how many pictures retrieved alike, which random ones cannot tell.
DISTINCT = Trimming(share_routes=False)
SMALL = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "layers": 6,
        "width": 128,
        "head_width": 32,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "layers": 6, "width": 128, "heads": 4},
    "quick_gelu": True,
}


def random_clip(
    device: torch.device, dtype: torch.dtype | None = None, sizes: dict[str, Any] | None = None
) -> FrozenClip:
    """A CLIP with random weights.

    Args:
        device: where.
        dtype: bfloat16 on a GPU and float32 on a CPU by default.
        sizes: arguments of ``open_clip.CLIP``; ViT-B/16 by default.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if sizes is None:
            model = open_clip.create_model("ViT-B-16-quickgelu")
        else:
            model = open_clip.CLIP(**sizes)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    clip = FrozenClip(model, Preprocessing(size=model.visual.image_size[0]))
    return clip.to(device, dtype)


# Their steps take features in place of pictures.
ON_FEATURES = ("lfa", "tip-f", "clip-adapter", "zs-lp", "clap")
# Training pictures a class, where a method keeps something of each.
SHOTS = 16


class Cell:
    """A method over a CLIP and a batch.

    Args:
        clip: the frozen CLIP, wherever it lives and whatever it computes in.
        batch, classes: B and C.
        method: its name.
        trim: its switches.
        path: LAMP's.
        names: of the classes; by default real ones of data sets.
        lamp: LAMP's settings that are not the defaults.
    """

    def __init__(
        self,
        clip: FrozenClip,
        batch: int,
        classes: int,
        method: str = "lamp",
        *,
        trim: Trimming = DISTINCT,
        path: str = "exact",
        names: Sequence[str] | None = None,
        **lamp: Any,
    ) -> None:
        self.clip, self.batch = clip, batch
        device, size = next(clip.parameters()).device, clip.preprocessing.size
        generator = torch.Generator().manual_seed(0)
        config = default_config({"method": method, "data": "caltech101", "clip": "ViT-B-16"})
        if method == "lamp":
            layers = tuple(range(min(3, clip.depth), clip.depth + 1))
            config = replace(config, own=replace(config.own, **{"layers": layers, **lamp}))
        config = replace(config, trim=trim, machine=replace(config.machine, path=path))
        base, new = base_and_new(classes)
        base = base if names is None else tuple(names)
        torch.manual_seed(0)
        counts = (SHOTS,) * classes
        self.method = build_method(clip, config, RunClasses(base, new, counts))
        images = torch.randn(batch, 3, size, size, generator=generator)
        self.labels = torch.randint(classes, (batch,), generator=generator).to(device)
        self.inputs = self.images = images.to(device, clip.dtype)
        if method in ON_FEATURES:
            features = torch.randn(batch, clip.vision.visual.proj.shape[1], generator=generator)
            self.inputs = F.normalize(features, dim=-1).to(device)
        if method in ("lift", "lift+"):
            torch.nn.init.normal_(self.method.head)
        if method in ("tip", "tip-f"):
            keys = torch.randn(self.method.keys.shape, generator=generator)
            self.method.hold_keys(F.normalize(keys, dim=-1).to(device))
            self.method.labels.copy_(torch.arange(classes).repeat_interleave(SHOTS))
            self.method.alpha.fill_(1)
            self.method.beta.fill_(1)
        if method == "prolip":
            width = clip.vision.visual.proj.shape[0]
            self.inputs = torch.randn(batch, width, generator=generator).to(device, clip.dtype)
        if method in ("zs-lp", "clap"):
            torch.nn.init.normal_(self.method.weight)
        if method == "candle":
            with torch.no_grad():
                for each in (self.method.visual, self.method.virtual):
                    each.copy_(torch.randn(each.shape, generator=generator))
        self.classes = self.method.prepare(base, TEMPLATE)
        self.optimiser = build_optimiser(config.optim, list(self.method.parameters()), device)
        self.elapsed = torch.zeros((), dtype=torch.float64, device=device)

    def forward(self) -> Step:
        """Forward and loss."""
        return self.method.step(self.inputs, self.labels, self.classes, F.cross_entropy)

    def gradients(self) -> None:
        """Forward, loss and backward alone, so that nothing is left that a next call would keep."""
        self.forward().loss.backward()
        self.method.zero_grad(set_to_none=True)

    def train(self) -> None:
        """A training step."""
        self._train(self.inputs, self.labels)

    @functools.cached_property
    def states(self) -> Tensor:
        """What of the batch enters the first layer that the method changes."""
        return up_to_layer(self.clip, self.images, self.method.first_changed_layer)

    def train_from_states(self) -> None:
        """A training step whose frozen layers were run ahead."""
        self._train(self.states, self.labels)

    def frozen_layers(self, batches: int) -> Callable[[], object]:
        """The layers that such a step leaves out, of so many batches at once."""
        images, layer = self.images.repeat(batches, 1, 1, 1), self.method.first_changed_layer
        return lambda: up_to_layer(self.clip, images, layer)

    def captured(self, recorder: Recorder, *, ahead: bool = False) -> Callable[[], object]:
        """A training step as one graph; with ``ahead`` one whose frozen layers were run ahead."""
        step = CapturedStep(self._train, self._state, recorder)
        inputs = self.states if ahead else self.inputs
        return lambda: step(inputs, self.labels)

    def evaluate(self) -> None:
        """Scores of the batch; text features that depend on the class alone are kept."""
        self.method.logits(self.images, self.classes)

    def evaluate_anew(self) -> None:
        """Scores of the batch with all text that they need."""
        self.method.forget_text()
        self.evaluate()

    @torch.no_grad()
    def image_forward(self) -> None:
        """open_clip's own image forward of the batch: the unit."""
        self.clip.model.encode_image(self.images)

    def kernels(self, train: bool) -> tuple[Kernel, ...]:
        """What LAMP's training step, or its evaluation anew, needs at least."""
        config = self.method.config
        return tuple(step_kernels(self.clip, self.batch, self.classes, config, train=train))

    def _train(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.optimiser.zero_grad(set_to_none=True)
        taken = self.method.step(images, labels, self.classes, F.cross_entropy)
        taken.loss.backward()
        self.optimiser.step()
        self.method.after_step([taken.observations], self.elapsed)
        return {"loss": taken.loss.detach()}

    def _state(self) -> list[Tensor]:
        slots = [each for state in self.optimiser.state.values() for each in state.values()]
        tensors = [each for each in slots if isinstance(each, Tensor)]
        return [*self.method.parameters(), *self.method.buffers(), *tensors]


@dataclass(frozen=True)
class Line:
    """LAMP's step at one size.

    Attributes:
        images, classes, text_query: B, C and who asks for text prompts.
        train: a training step; else an evaluation.
        at_most: times its floor, where there is such an aim.
    """

    images: int
    classes: int
    text_query: str
    train: bool = True
    at_most: float | None = None

    @property
    def what(self) -> str:
        """In words."""
        query = "class" if self.text_query == "class" else "(image, class)"
        return f"B={self.images}, C={self.classes:,}, text per {query}"

    def cell(self, clip: FrozenClip) -> Cell:
        """What takes it."""
        return Cell(clip, self.images, self.classes, text_query=self.text_query)
