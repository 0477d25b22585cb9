"""The one interface that training, evaluation and prediction know of a method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lamp_fast.clip import FrozenClip, through

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """What one forward pass of a batch gives to training.

    Attributes:
        loss: scalar to differentiate, a mean over the batch's rows.
        logits: [B, C], for the training accuracy.
        terms: named scalars for the log, detached.
        observations: what the method wants back in :meth:`Method.after_step`, if anything.
    """

    loss: Tensor
    logits: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    observations: Any = None

    def detached(self) -> "Step":
        """The same numbers without the graph that made them."""
        return replace(self, loss=self.loss.detach(), logits=self.logits.detach())


class Method(nn.Module):
    """A way to classify pictures by class names with a frozen CLIP.

    The frozen CLIP is held outside the module tree, so ``state_dict`` and ``parameters`` are the
    method's own. ``classes`` below is whatever :meth:`prepare` returned for a list of names.
    """

    def __init__(self, clip: FrozenClip) -> None:
        super().__init__()
        object.__setattr__(self, "clip", clip)

    clip: FrozenClip

    capturable: bool = False
    """Whether a step, and what follows it, neither waits for a value on the device nor, while
    :attr:`fixed_shapes` is set, has shapes that depend on one: then it can be a CUDA graph."""

    fixed_shapes: bool = False
    """Set while a step is captured."""

    sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    """Adds a tensor up, in place, over the processes that train together; None in one alone."""

    def prepare(self, names: Sequence[str], template: str) -> Any:
        """Tokenise class names and compute, once, what of them never changes."""
        raise NotImplementedError

    def step(self, images: Tensor, labels: Tensor, classes: Any, criterion: Criterion) -> Step:
        """Loss of a training batch: images [B, 3, S, S], labels int64 [B]."""
        raise NotImplementedError

    def accumulate(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Any,
        criterion: Criterion,
        pieces: int,
        scale: Callable[[Tensor], Tensor],
    ) -> list[Step]:
        """Gradients of a whole batch's mean loss, worked through in ``pieces``.

        ``scale`` is the loss scaler's. The returned steps hold no graph.
        """
        steps = []
        for some, their in zip(images.chunk(pieces), labels.chunk(pieces), strict=True):
            step = self.step(some, their, classes, criterion)
            scale(step.loss * (len(their) / len(labels))).backward()
            steps.append(step.detached())
        return steps

    def logits(self, images: Tensor, classes: Any) -> Tensor:
        """Class scores [B, C] without gradient bookkeeping; memory bounded whatever C is."""
        raise NotImplementedError

    def start_epoch(self) -> None:
        """Called before each epoch's first batch."""

    def after_step(self, observations: Sequence[Any], progress: Tensor) -> None:
        """Called once after each applied optimiser step.

        Args:
            observations: ``Step.observations`` of every piece of this rank's part of the batch;
                empty where it has no row. Every rank is called.
            progress: steps applied before this one / planned total, in [0, 1); a float64 scalar on
                the device.
        """

    def epoch_log(self) -> dict[str, Any]:
        """JSON values about the epoch that just ended."""
        return {}

    def adapt(self, batches: Sequence[Any], classes: Any) -> dict[str, Any] | None:
        """Adapt to unlabelled pictures of new classes; None where the method has no such step.

        ``batches`` yields images and can be iterated over again, once a pass. With several ranks it
        yields this one's part of every batch, which may have no row.
        """
        return None

    def trainable_parameters(self) -> int:
        """How many numbers training changes."""
        return sum(each.numel() for each in self.parameters() if each.requires_grad)


@torch.no_grad()
def plain_text_features(clip: FrozenClip, token_ids: Tensor, eot: Tensor) -> Tensor:
    """CLIP's own text features [C, Ds], not normalised, of ids [C, L] cut or not after eot."""
    x = through(clip.text.blocks, clip.text.embed(token_ids), causal=True)
    return clip.text.readout(x[torch.arange(len(x), device=x.device), eot])


@torch.no_grad()
def plain_image_features(clip: FrozenClip, images: Tensor) -> Tensor:
    """CLIP's own image features [B, Ds], not normalised."""
    x = through(clip.vision.blocks, clip.vision.embed(images))
    return clip.vision.readout(x[:, 0])
