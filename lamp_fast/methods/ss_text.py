"""SS-Text and SS-Text+ (Silva-Rodríguez et al., MICCAI 2025): class vectors in closed form, for
classes of unequal size and without validation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lamp_fast.clip.towers import FrozenClip
from lamp_fast.methods.prototypes import Prototypes
from lamp_fast.methods.settings import MethodSettings
from lamp_fast.methods.settings.ss_text import SS_TEXT, SS_TEXT_PLUS
from lamp_fast.methods.surroundings import RunClasses, Surroundings
from lamp_fast.methods.training_set import TrainingSet

# No lambda is smaller, so that a class's pictures count as at most a thousand.
LEAST = 1e-3


class SsText(Prototypes):
    """w_c = t_c + s / (N lambda) sum_{i in c} f_i, lambda = max(1 / N, 0.001).

    f_i are the N training pictures' features as in testing, t_c the text feature, both normalised;
    s is CLIP's logit scale. It minimises -1/N sum_i s f_i . w_{y_i} + lambda/2 sum_c |w_c - t_c|^2:
    how well a class scores its own pictures, held to the text.

    Args:
        clip: the frozen CLIP.
        classes: of the run.
    """

    entry = SS_TEXT

    def __init__(self, clip: FrozenClip, classes: RunClasses) -> None:
        super().__init__(clip, classes)
        self.register_buffer("weight", self.empty_weight())
        self.match_clip()

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: MethodSettings, surroundings: Surroundings
    ) -> "SsText":
        return cls(clip, surroundings.classes)

    @torch.no_grad()
    def read_training_set(self, training: TrainingSet) -> None:
        """Encode the training set and compute every w_c."""
        benchmark = training.benchmark
        features = self.clip.vision.joint(training.features())
        labels, counts = training.labels.to(features.device), training.counts.to(features)
        texts = self.prepare(benchmark.base_names, benchmark.template, benchmark.origin).texts
        sums = torch.zeros_like(texts).index_add_(0, labels, features)
        pull = self.clip.logit_scale / (counts.sum() * self.strength(counts))  # [C]
        self.weight.copy_(self.settled(F.normalize(texts, dim=-1) + pull[:, None] * sums))

    def strength(self, counts: Tensor) -> Tensor:
        """lambda [C], how much each text weighs; ``counts`` [C] are training pictures a class."""
        return torch.full_like(counts, max(1 / float(counts.sum()), LEAST))

    def settled(self, weight: Tensor) -> Tensor:
        """What becomes of w [C, Ds] in the end."""
        return weight

    def trainable_parameters(self) -> int:
        return self.weight.numel()


class SsTextPlus(SsText):
    """The same with lambda_c = max(1 / n_c, 0.001), n_c the class's pictures, and repelled:
    w_c <- w_c - d_c / |d_c|, d_c = 2 w_c - mean_c w_c.

    A class's mean picture weighs s n_c^2 / N beside its text (n_c counted up to 1000), so a text
    decides where pictures are few.
    """

    entry = SS_TEXT_PLUS

    def strength(self, counts: Tensor) -> Tensor:
        # Of a class without pictures the sum is 0, whatever it is divided by.
        return counts.clamp(1, 1 / LEAST).reciprocal()

    def settled(self, weight: Tensor) -> Tensor:
        return weight - F.normalize(2 * weight - weight.mean(0), dim=-1)
