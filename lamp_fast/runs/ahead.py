"""Look-ahead: the image tower's frozen layers, for the next training batches at once.

Which pictures an epoch shows, and each one's crop, is known before its first step
(:mod:`lamp_fast.data.loading`), and layers that no step changes make of a picture what they make of
it in any batch. So everything below a method's first change of the image tower
(:attr:`Method.first_changed_layer`) runs once for several batches, in products large enough for the
device, and a step begins with what enters that layer. It is the same arithmetic in the same order
for every row; whether the same bits come out is up to the matrix products, which may add up in
another order for another number of rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lamp_fast.clip.features import up_to_layer
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.methods.base import Method
from lamp_fast.runs.config import TrainConfig

# What --ahead none spends on a GPU: 169 pictures of ViT-B/16 in bfloat16, where products are
# expected to be as fast as they get. An estimate until benchmarks/gpu_report.py has run on a GPU.
GPU_BYTES = 1 << 30


@dataclass(frozen=True)
class LookAhead:
    """The batches of a run, the frozen part of the image tower run ahead where it can be.

    Attributes:
        clip: the frozen CLIP.
        layer: the first one that is not run ahead, from 1.
        pictures: how many go through the layers below at once, at most.
        why_not: why every batch goes through them alone; None where they do not.
    """

    clip: FrozenClip
    layer: int
    pictures: int
    why_not: str | None

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        method: Method,
        device: torch.device,
        rows: int,
        *,
        on_features: bool = False,
    ) -> "LookAhead":
        """What a run does.

        Args:
            config: its settings.
            method: its method.
            device: it computes on.
            rows: of a batch, in this process.
            on_features: batches are of features already.
        """
        clip, layer = method.clip, method.first_changed_layer
        pictures = config.machine.ahead
        if pictures is None:
            pictures = GPU_BYTES // bytes_a_picture(clip) if device.type == "cuda" else 1
        why_not = None
        if on_features:
            why_not = "the method trains on features"
        elif layer == 1:
            why_not = "the method changes the image tower from its first layer on"
        elif config.trim.as_published:
            why_not = "--as-published"
        elif config.machine.path == "literal":
            why_not = "--path literal"
        elif pictures < 2 * rows:
            why_not = f"two batches are {2 * rows} pictures, more than {pictures} at once"
        return cls(clip, layer, pictures, why_not)

    def describe(self) -> str:
        """For the first lines of a run."""
        if self.why_not is not None:
            return f"none: {self.why_not}"
        depth = len(self.clip.vision.blocks)
        what = f"layers 1..{self.layer - 1} of" if self.layer <= depth else "all of"
        return f"{what} the image tower for up to {self.pictures} pictures at once"

    def __call__(self, batches: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
        """Batches with what enters :attr:`layer` in place of pictures.

        The first batch goes alone, so that no step waits for more than its own pictures. From then
        on two are fetched for each that is given out, and what was fetched goes together when what
        was computed is used up: groups double until they are as large as they may be, and the
        loader's processes are never asked for many batches in a row. So there are at most
        :attr:`pictures` of the next group, and what became of as many in this one.

        Args:
            batches: [images, labels, index], of pictures on the device; none of them larger than
                the first, some perhaps without a row.
        """
        if self.why_not is not None:
            yield from batches
            return
        batches = iter(batches)
        fetched = list(islice(batches, 1))
        most = self.pictures // max([1, *(len(images) for images, *_ in fetched)])
        while fetched:
            group, fetched = self._run(fetched), []
            for batch in group:
                yield batch
                fetched += islice(batches, min(2, most - len(fetched)))

    def _run(self, batches: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        whole = [images for images, *_ in batches if len(images)]
        if not whole:  # of several ranks one without a row
            return list(batches)
        states = up_to_layer(self.clip, torch.cat(whole), self.layer).split([*map(len, whole)])
        each = iter(states)
        return [[next(each) if len(images) else images, *rest] for images, *rest in batches]


def bytes_a_picture(clip: FrozenClip) -> int:
    """What look-ahead holds of a picture at its peak, in bytes.

    That is in a block's MLP: the picture twice, as it came and in the group; in the residual
    stream's size what became of one of the group before (or, where that is a feature, what entered
    the first block), the stream before and behind the attention, both norms, what attention and the
    block before add, q, k, v and what was attended; and the hidden rows before and behind their
    activation.
    """
    size, (tokens, width) = clip.preprocessing.size, clip.vision.visual.positional_embedding.shape
    hidden = len(clip.vision.blocks[0].widen.weight)
    stream = tokens * (11 * width + 2 * hidden)
    return clip.dtype.itemsize * (2 * 3 * size**2 + stream + width)
