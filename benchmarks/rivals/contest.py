"""A rival's training step and evaluation on one batch."""

from collections.abc import Sequence

import torch

from benchmarks.measuring.names import base_and_new
from benchmarks.rivals.lift import LiftRival
from benchmarks.rivals.maple import MapleRival
from benchmarks.rivals.mmrl import MmrlRival
from benchmarks.rivals.towers import Rival
from lamp_fast.clip.towers import FrozenClip

RIVALS: dict[str, type[Rival]] = {"maple": MapleRival, "mmrl": MmrlRival, "lift": LiftRival}


class Contest:
    """A rival over a CLIP and a batch of random pictures.

    Args:
        clip: the frozen CLIP, wherever it lives and whatever it computes in.
        batch, classes: B and C.
        rival: its name.
        compiled: forward and backward go through torch.compile; the first call takes minutes.
        names: of the classes; by default real ones of data sets.
    """

    def __init__(
        self,
        clip: FrozenClip,
        batch: int,
        classes: int,
        rival: str,
        *,
        compiled: bool = False,
        names: Sequence[str] | None = None,
    ) -> None:
        device, size = next(clip.parameters()).device, clip.preprocessing.size
        names = base_and_new(classes)[0] if names is None else tuple(names)
        torch.manual_seed(0)
        self.clip, self.rival = clip, RIVALS[rival](clip, names)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, size, size, generator=generator)
        self.images = images.to(device, clip.dtype)
        self.labels = torch.randint(classes, (batch,), generator=generator).to(device)
        self.optimiser = self.rival.optimiser(fused=True)
        self.loss, self.scores = self.rival.loss, self.rival.scores
        if compiled:
            mode = "max-autotune" if device.type == "cuda" else "default"
            self.loss = torch.compile(self.loss, mode=mode, fullgraph=True, dynamic=False)
            self.scores = torch.compile(self.scores, mode=mode, fullgraph=True, dynamic=False)
        with torch.no_grad():
            self.text = self.rival.text()

    def train(self) -> None:
        """A training step."""
        if self.images.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        self.optimiser.zero_grad(set_to_none=True)
        self.loss(self.images, self.labels).backward()
        self.optimiser.step()

    @torch.no_grad()
    def evaluate(self) -> None:
        """Scores of the batch; text features are kept."""
        if self.images.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        self.scores(self.images, self.text)

    @torch.no_grad()
    def image_forward(self) -> None:
        """open_clip's own image forward of the batch: the unit."""
        self.clip.model.encode_image(self.images)
