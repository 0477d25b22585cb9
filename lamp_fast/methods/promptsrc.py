"""PromptSRC (Khattak et al., ICCV 2023): deep prompts of both towers, held to zero-shot CLIP."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.prompts import ClassPrompts
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.data.templates import PROMPTSRC_60
from lamp_fast.methods.base import Criterion, Step, frozen_image_features
from lamp_fast.methods.deep_prompts import DeepPrompts
from lamp_fast.methods.settings.promptsrc import PROMPTSRC, PromptSrcSettings
from lamp_fast.methods.surroundings import Surroundings
from lamp_fast.methods.text import plain_text_features
from lamp_fast.methods.training_set import TrainingSet


@dataclass(frozen=True, eq=False)
class PromptSrcClasses:
    """Class prompts, and what zero-shot CLIP makes of the classes.

    Attributes:
        prompts: of the learned words.
        plain: gives the text features [C, Ds] to stay close to, computed when training first asks.
    """

    prompts: ClassPrompts
    plain: Callable[[], Tensor]


def gaussian_shares(epochs: int, mean: float, std: float) -> list[float]:
    """exp(-((e - mean) / std)^2 / 2) of e = 1..epochs, scaled so that their sum is 1.

    Only differences of exponents count, so that no epoch's being near ``mean`` is no 0 / 0.
    """
    exponents = [-0.5 * ((epoch - mean) / std) ** 2 for epoch in range(1, epochs + 1)]
    largest = max(exponents)
    weights = [math.exp(each - largest) for each in exponents]
    total = math.fsum(weights)
    return [each / total for each in weights]


class PromptSrc(DeepPrompts):
    """Deep prompts, each drawn and learned alone, V_i from N(0, 0.02^2).

    Loss: cross-entropy + 25 mean|w - w0| + 10 mean|f - f0| + KL(p0 || p) / (B C), where w, f are
    normalised features, p the probabilities, f0 zero-shot CLIP's of the same augmented pictures,
    w0 the normalised mean over 60 templates of its text features (not normalised), and p0 of f0
    and w0.

    The weights of a finished run are sum_e g_e theta_e, theta_e those behind epoch e and g a
    Gaussian over epochs: ``average`` holds what of it is added up so far, ``epoch`` the epochs
    begun.

    With prompts in the first layer nothing above the patch embedding is the same with and without
    them: f0 costs one whole forward pass a step.

    Args:
        clip: the frozen CLIP.
        settings, trimming: as in :class:`DeepPrompts`.
        epochs: of the run.

    Raises:
        InputError: see :class:`DeepPrompts`.
    """

    entry = PROMPTSRC

    def __init__(
        self, clip: FrozenClip, settings: PromptSrcSettings, trimming: Trimming, epochs: int
    ) -> None:
        super().__init__(clip, settings, trimming)
        self.shares = gaussian_shares(epochs, settings.gpa_mean, settings.gpa_std)
        size = settings.n_ctx, clip.vision.width
        dtype = self.words[0].dtype
        self.rows = nn.ParameterList(
            0.02 * torch.randn(size, dtype=dtype) for _ in range(self.depth)
        )
        learned = sum(each.numel() for each in self.parameters())
        self.register_buffer("average", torch.zeros(learned, dtype=dtype))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        self.match_clip()

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: PromptSrcSettings, surroundings: Surroundings
    ) -> "PromptSrc":
        return cls(clip, settings, surroundings.trimming, surroundings.epochs)

    def image_prompts_of(self, layer: int) -> Tensor:
        return self.rows[layer - 1]

    def templates(self, template: str, origin: Origin = NOWHERE) -> tuple[str, ...]:
        """Of the learned words, then those whose mean training stays close to."""
        own = super().templates(template, origin)
        return own if origin.target else own + PROMPTSRC_60

    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> PromptSrcClasses:
        """As :meth:`DeepPrompts.prepare`; of what only training needs nothing is computed yet."""
        plain = functools.partial(mean_plain_text_features, self.clip, tuple(names))
        return PromptSrcClasses(super().prepare(names, template, origin), functools.cache(plain))

    def text_features(self, classes: PromptSrcClasses) -> Tensor:
        return super().text_features(classes.prompts)

    def step(
        self, images: Tensor, labels: Tensor, classes: PromptSrcClasses, criterion: Criterion
    ) -> Step:
        text, features = self.text_features(classes), self.image_features(images)
        logits = self._scores(features, text)
        plain_text = classes.plain()
        plain_features = frozen_image_features(self.clip, images)
        plain_logits = self._scores(plain_features, plain_text)
        divergence = F.kl_div(
            logits.log_softmax(-1), plain_logits.log_softmax(-1), reduction="sum", log_target=True
        )
        terms = {
            "cross_entropy": criterion(logits, labels),
            "text_distance": self.settings.text_weight * (text - plain_text).abs().mean(),
            "image_distance": self.settings.image_weight * (features - plain_features).abs().mean(),
            "divergence": divergence / logits.numel(),
        }
        loss = sum(terms.values())
        return Step(loss, logits, {name: each.detach() for name, each in terms.items()})

    def start_epoch(self) -> None:
        self._add_to_average()
        self.epoch += 1

    @torch.no_grad()
    def settle(self, training: TrainingSet) -> None:
        """Put the average over epochs in the place of the last epoch's weights."""
        if not int(self.epoch):
            return
        self._add_to_average()
        weights = list(self.parameters())
        parts = self.average.split([each.numel() for each in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.copy_(part.view_as(weight))

    @torch.no_grad()
    def _add_to_average(self) -> None:
        """The weights as the epoch that was begun last has left them, times its share."""
        epoch = int(self.epoch)
        if epoch:
            weights = torch.cat([each.flatten() for each in self.parameters()])
            self.average += self.shares[epoch - 1] * weights


def mean_plain_text_features(clip: FrozenClip, names: Sequence[str]) -> Tensor:
    """Zero-shot text features [C, Ds] of class names: the mean over the 60 templates of features
    that are not normalised, then normalised."""
    total = sum(plain_text_features(clip, names, template) for template in PROMPTSRC_60)
    return F.normalize(total / len(PROMPTSRC_60), dim=-1)
