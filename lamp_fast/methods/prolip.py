"""ProLIP (Fahes et al., 2024): CLIP's own visual projection, trained and held to where it was."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamp_fast.clip.towers import FrozenClip, at_least_float32
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.data.feature_batches import FeatureBatches
from lamp_fast.methods.base import Criterion, Method, Step
from lamp_fast.methods.settings.prolip import PROLIP, ProLipSettings
from lamp_fast.methods.text import imagenet_or, mean_text_features
from lamp_fast.methods.training_set import TrainingSet


class ProLip(Method):
    """criterion(s norm(x P) t^T) + lambda |P - P_0|_F^2 over all training pictures at once.

    x [V] is what stands before CLIP's projection P_0 [V, Ds], from which P starts, t the normalised
    zero-shot text feature; the text tower is left as it is, so new classes and other data sets have
    scores like trained ones. Step e shows view e of every picture. Published with lambda = 1/shots;
    lambda here is C / N, C classes with N pictures, which is that where every class has its shots.

    On ImageNet and its variants a class's text is the mean of its normalised features in seven
    templates, normalised again.

    Args:
        clip: the frozen CLIP.
        config: views, lambda, and what is trained.
    """

    entry = PROLIP
    reads_features = True

    def __init__(self, clip: FrozenClip, config: ProLipSettings) -> None:
        super().__init__(clip)
        self.config = config
        self.strength = config.prolip_lambda or 0.0  # of a run that trains, see read_training_set
        self.weight = nn.Parameter(self.start().clone())
        self.match_clip()

    def start(self) -> Tensor:
        """What the weight starts from: P_0 [V, Ds], or the identity [Ds, Ds]; at least float32."""
        projection = at_least_float32(self.clip.vision.visual.proj.detach())
        if self.config.prolip_map == "projection":
            return projection
        return torch.eye(projection.shape[1]).to(projection)

    def read_training_set(self, training: TrainingSet) -> "ViewsInTurn":
        """Take lambda from the class sizes; pictures are encoded when a step asks for them."""
        if self.config.prolip_lambda is None:
            self.strength = len(training.counts) / float(training.counts.sum())
        views = self.config.prolip_views if training.random is not None else 1
        return ViewsInTurn(training, views)

    def templates(self, template: str, origin: Origin = NOWHERE) -> tuple[str, ...]:
        """ImageNet's seven, or the one."""
        return imagenet_or(template, origin)

    def prepare(self, names: Sequence[str], template: str, origin: Origin = NOWHERE) -> Tensor:
        """Normalised text features [C, Ds]."""
        return mean_text_features(self.clip, names, self.templates(template, origin), origin.words)

    def step(self, images: Tensor, labels: Tensor, classes: Tensor, criterion: Criterion) -> Step:
        """The loss of a batch; ``images`` are features before the projection [B, V]."""
        logits = self._scores(images, classes)
        loss = criterion(logits, labels)
        constraint = self.strength * (self.weight - self.start()).square().sum()
        terms = {"cross_entropy": loss.detach(), "constraint": constraint.detach()}
        return Step(loss + constraint, logits, terms)

    @torch.no_grad()
    def feature_logits(self, features: Tensor, classes: Tensor, adapted: bool = False) -> Tensor:
        return self._scores(features, classes)

    def _scores(self, features: Tensor, texts: Tensor) -> Tensor:
        if self.config.prolip_map == "residual":
            features = self.clip.vision.project(features)
        mapped = F.normalize(features.to(self.weight.dtype) @ self.weight, dim=-1)
        return self.clip.logit_scale * mapped @ texts.T


class ViewsInTurn:
    """Batches of view e of every picture in epoch e, of which one view is in memory at a time.

    All of them would be 1.7 GB for the two thousand pictures of Caltech101 and 15 GB for sixteen
    shots of ImageNet.

    Args:
        training: the training set.
        views: after these the first comes again.
        rows: of each batch those to give out; all by default.
    """

    def __init__(
        self,
        training: TrainingSet,
        views: int,
        rows: Callable[[int], slice] | None = None,
    ) -> None:
        self.training, self.views, self.rows = training, views, rows
        self._read: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._batches(torch.empty(len(self.training.labels), 1, 0)))

    def part(self, rows: Callable[[int], slice]) -> "ViewsInTurn":
        """The same batches, of each the rows that ``rows`` says of its size, if any."""
        return ViewsInTurn(self.training, self.views, rows)

    def epoch(self, epoch: int) -> Iterator[list[Tensor]]:
        """The batches of an epoch, from 0: [features [b, V], labels int64 [b], index int64 [b]]."""
        number = epoch % self.views
        if self._read is None or self._read[0] != number:
            self._read = number, self.training.view(number)
        yield from self._batches(self._read[1][:, None]).epoch(epoch)

    def _batches(self, features: Tensor) -> FeatureBatches:
        batches = self.training.batches(features)
        return batches if self.rows is None else batches.part(self.rows)
