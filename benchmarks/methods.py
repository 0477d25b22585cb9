"""Every method's step as a thing to measure: over one CLIP, on one batch, with published settings.

Caltech101's first names; random pictures, and random features where a method trains on features
(LFA) or looks at the training set first (Candle).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.classes import CALTECH101, TEMPLATE, numbered
from benchmarks.steps import layers_of
from lamp_fast.clip import FrozenClip, Trimming
from lamp_fast.methods import RunClasses
from lamp_fast.methods.lamp import LampSettings
from lamp_fast.runs.config import default_config
from lamp_fast.runs.experiment import build_method

# LAMP's own slow path is of the equations, not of anybody's code; the others have nothing to trim.
AS_PUBLISHED = ("coop", "cocoop", "maple", "tcp", "mma")


class MethodCell:
    """A method over a CLIP and a batch.

    Args:
        clip: the frozen CLIP, wherever it lives and whatever it computes in.
        name: of the method.
        batch, classes: B and C.
        trim: its switches, ``as_published`` among them; the defaults otherwise.
        text_query, path: LAMP's.
    """

    def __init__(
        self,
        clip: FrozenClip,
        name: str,
        batch: int,
        classes: int,
        trim: Trimming | None = None,
        text_query: str = "image",
        path: str = "exact",
    ) -> None:
        device, dtype, size = next(clip.parameters()).device, clip.dtype, clip.preprocessing.size
        generator = torch.Generator().manual_seed(0)
        config = default_config({"method": name, "data": "caltech101", "clip": clip.identity.name})
        if name == "lamp":
            own = LampSettings(text_query=text_query, layers=layers_of(clip))
            config = replace(config, own=own)
        config = replace(
            config,
            trim=trim or config.trim,
            machine=replace(config.machine, path=path),
        )
        names = numbered(CALTECH101, 2 * classes)
        names, new = names[:classes], names[classes:]
        torch.manual_seed(0)
        self.method = build_method(clip, config, RunClasses(names, new))
        images = torch.randn(batch, 3, size, size, generator=generator)
        self.labels = torch.randint(classes, (batch,), generator=generator).to(device)
        self.inputs = self.images = images.to(device, dtype)
        if name == "lfa":
            features = torch.randn(batch, clip.vision.visual.proj.shape[1], generator=generator)
            self.inputs = F.normalize(features, dim=-1).to(device)
        if name == "candle":
            with torch.no_grad():
                for each in (self.method.visual, self.method.virtual):
                    each.copy_(torch.randn(each.shape, generator=generator))
        self.classes = self.method.prepare(names, TEMPLATE)

    def step(self):
        """Forward and loss."""
        return self.method.step(self.inputs, self.labels, self.classes, F.cross_entropy)

    def train(self) -> None:
        """A training step without its optimiser; nothing for a method without parameters."""
        if self.method.trainable_parameters():
            self.method.zero_grad(set_to_none=True)
            self.step().loss.backward()

    def evaluate(self) -> None:
        """Scores of the batch."""
        self.method.logits(self.images, self.classes)

    @torch.no_grad()
    def image_forward(self) -> None:
        """open_clip's own image forward of the batch: the unit."""
        self.method.clip.model.encode_image(self.images)
