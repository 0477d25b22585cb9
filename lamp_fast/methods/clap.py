"""ZS-LP and CLAP (Silva-Rodríguez et al., CVPR 2024): a linear probe that starts at the text.

CLAP holds each class to its text, the more the better zero-shot CLIP knows the class.
"""

import torch
from torch import Tensor, nn

from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.data.feature_batches import FeatureBatches
from lamp_fast.data.templates import IMAGENET_7
from lamp_fast.methods.base import Criterion, Step
from lamp_fast.methods.prototypes import NamedClasses, Prototypes
from lamp_fast.methods.settings.clap import CLAP, ZS_LP, ClapSettings
from lamp_fast.methods.surroundings import RunClasses, Surroundings
from lamp_fast.methods.text import imagenet_or
from lamp_fast.methods.training_set import TrainingSet

# A class of ImageNet and its variants is the mean of these.
EIGHT_TEMPLATES = (*IMAGENET_7, "a photo of a {}.")


class ZeroShotProbe(Prototypes):
    """w_c learned by the criterion on s cos(f, w_c), from the text feature t_c on.

    t_c is not normalised, so |t_c| decides how far a rate moves w_c. Pictures are encoded once,
    before the first step, in several random crops; an epoch is as many rows as there are pictures,
    drawn from all their crops together.

    Args:
        clip: the frozen CLIP.
        config: how many crops.
        classes: of the run.
    """

    entry = ZS_LP

    def __init__(self, clip: FrozenClip, config: ClapSettings, classes: RunClasses) -> None:
        super().__init__(clip, classes)
        self.config = config
        self.weight = nn.Parameter(self.empty_weight())
        self.match_clip()

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: ClapSettings, surroundings: Surroundings
    ) -> "ZeroShotProbe":
        return cls(clip, settings, surroundings.classes)

    def templates(self, template: str, origin: Origin = NOWHERE) -> tuple[str, ...]:
        """ImageNet's eight, or the one."""
        return imagenet_or(template, origin, EIGHT_TEMPLATES)

    @torch.no_grad()
    def read_training_set(self, training: TrainingSet) -> FeatureBatches:
        """Encode the training set, start every w_c at its text, and train on the features."""
        benchmark = training.benchmark
        views = training.views(self.config.feature_views)  # [N, views, V]
        features = self.clip.vision.joint(views)
        texts = self.prepare(benchmark.base_names, benchmark.template, benchmark.origin).texts
        self.weight.copy_(texts)
        self.look_at(features, training.labels.to(features.device), texts)
        return training.batches(features, views="mixed")

    def look_at(self, features: Tensor, labels: Tensor, texts: Tensor) -> None:
        """Take more of the training set than its batches.

        Args:
            features: [N, views, Ds], normalised.
            labels: int64 [N].
            texts: [C, Ds], not normalised.
        """

    def constraint(self, texts: Tensor) -> Tensor | None:
        """A scalar that is added to the criterion's loss; ``texts`` as in :meth:`look_at`."""
        return None

    def step(
        self, images: Tensor, labels: Tensor, classes: NamedClasses, criterion: Criterion
    ) -> Step:
        """The loss of a batch; ``images`` are normalised features [B, Ds]."""
        logits = self.cosines(images.to(self.weight.dtype), self.weight)
        loss = criterion(logits, labels)
        constraint = self.constraint(classes.texts)
        if constraint is None:
            return Step(loss, logits)
        terms = {"cross_entropy": loss.detach(), "constraint": constraint.detach()}
        return Step(loss + constraint, logits, terms)


class Clap(ZeroShotProbe):
    """The same with mean_c lambda_c |w_c - t_c|^2 added to the loss.

    lambda_c is the mean probability that zero-shot CLIP gives class c on the crops of its own
    training pictures. It is fixed before the first step: what the public code calls "adaptative",
    which moves it from epoch to epoch, is not what its commands run.
    """

    entry = CLAP

    strength: Tensor
    """lambda [C_base]."""

    def __init__(self, clip: FrozenClip, config: ClapSettings, classes: RunClasses) -> None:
        super().__init__(clip, config, classes)
        self.register_buffer("strength", torch.zeros(len(classes.base)))
        self.match_clip()

    def look_at(self, features: Tensor, labels: Tensor, texts: Tensor) -> None:
        total = torch.zeros_like(self.strength)
        for view in features.unbind(1):  # all at once would be N times views times C numbers
            probabilities = self.cosines(view, texts).softmax(-1)
            total.index_add_(0, labels, probabilities.gather(1, labels[:, None])[:, 0])
        counts = labels.bincount(minlength=len(total)).to(total)
        self.strength.copy_(total / (counts * features.shape[1]))

    def constraint(self, texts: Tensor) -> Tensor:
        return (self.strength * (self.weight - texts).square().sum(-1)).mean()
