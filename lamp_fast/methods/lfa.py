"""LFA (Ouali et al., ICCV 2023): one linear map that aligns image features with class texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.data.feature_batches import FeatureBatches
from lamp_fast.data.templates import IMAGENET_7
from lamp_fast.data.transforms import five_crop_transform
from lamp_fast.methods.base import Criterion, Method, Step, frozen_image_features
from lamp_fast.methods.fixed import Sides
from lamp_fast.methods.settings.lfa import LFA, LfaSettings
from lamp_fast.methods.surroundings import RunClasses, Surroundings
from lamp_fast.methods.text import imagenet_or, mean_text_features
from lamp_fast.methods.training_set import TrainingSet

# A class of ImageNet and its variants is the mean of these.
EIGHT_TEMPLATES = ("a photo of a {}.", *IMAGENET_7)
# Of the margin in the re-ranking loss.
MARGIN_SCALE = 4.0
# Cross-validation of beta: values between 0 and 1, splits of each, share that is fitted.
BETAS, SPLITS, FITTED = 25, 3, 0.8


@dataclass(frozen=True)
class LfaClasses:
    """Classes as LFA scores them.

    Attributes:
        texts: zero-shot text features [C, Ds], normalised.
        trained: all were trained, and on the data set that they are of.
    """

    texts: Tensor
    trained: bool


class Lfa(Method):
    """Scores are cosines of f W with zero-shot text features, W [Ds, Ds].

    W starts in closed form from the training set's five-crop features (orthogonal Procrustes, drawn
    to the identity; from the centre crops alone where beta is cross-validated on them) and is
    refined on all of them by :func:`reranking_loss`, one step over the whole set
    an iteration; ``--epochs`` counts the iterations. Pictures are encoded once, before the first.
    Class lists with a name that was not trained, and every class list of another data set, are
    scored with a moving average of W that started at the identity.

    On ImageNet and its variants a class's text is the mean of its normalised features in eight
    templates, normalised again.

    Several ranks draw noise of their own.

    Args:
        clip: the frozen CLIP.
        config: of start, loss and noise.
        classes: of the run.
        iterations: n, that the average's momentum is a function of.
    """

    entry = LFA
    no_class_matrix = None
    reads_features = True

    ema: Tensor

    def __init__(
        self, clip: FrozenClip, config: LfaSettings, classes: RunClasses, iterations: int
    ) -> None:
        super().__init__(clip)
        self.config, self.trained, self.iterations = config, set(classes.base), iterations
        width = clip.vision.visual.proj.shape[1]
        self.weight = nn.Parameter(torch.eye(width))
        self.register_buffer("ema", torch.eye(width))
        self.match_clip()

    @classmethod
    def build(cls, clip: FrozenClip, settings: LfaSettings, surroundings: Surroundings) -> "Lfa":
        return cls(clip, settings, surroundings.classes, surroundings.epochs)

    @torch.no_grad()
    def read_training_set(self, training: TrainingSet) -> FeatureBatches:
        """Encode the training set, start W, and train on the features."""
        benchmark = training.benchmark
        five = five_crop_transform(training.preprocessing)
        crops = self.clip.vision.joint(training.features(five))  # [N, 5, Ds]
        labels = training.labels.to(crops.device)
        texts = self.prepare(benchmark.base_names, benchmark.template, benchmark.origin).texts
        beta, fitted = self.config.procrustes_beta, crops
        if beta is None:
            fitted = crops[:, -1:]  # the centre
            beta = cross_validated_beta(fitted[:, 0], texts, labels, training.seed)
        targets = texts[labels][:, None].expand_as(fitted)
        self.weight.copy_(procrustes(fitted.flatten(0, 1), targets.flatten(0, 1), beta))
        return training.batches(crops, views="drawn")

    def templates(self, template: str, origin: Origin = NOWHERE) -> tuple[str, ...]:
        """ImageNet's eight, or the one."""
        return imagenet_or(template, origin, EIGHT_TEMPLATES)

    @torch.no_grad()
    def prepare(self, names: Sequence[str], template: str, origin: Origin = NOWHERE) -> LfaClasses:
        texts = mean_text_features(self.clip, names, self.templates(template, origin), origin.words)
        return LfaClasses(texts, not origin.target and self.trained.issuperset(names))

    def step(
        self, images: Tensor, labels: Tensor, classes: LfaClasses, criterion: Criterion
    ) -> Step:
        """One iteration; ``images`` are features [B, Ds], ``criterion`` has no part in it."""
        features, texts = images.to(self.weight.dtype), classes.texts
        noisy, dropped = (torch.rand(2) > 0.5).tolist()
        if noisy:
            features = features + self.config.feature_noise * torch.randn_like(features)
        if dropped:
            features = F.dropout(features, self.config.feature_dropout)
        mapped = F.normalize(features @ self.weight, dim=-1)
        loss = reranking_loss(mapped, texts, labels, self.config.neighbours)
        return Step(loss, (self.clip.logit_scale * mapped @ texts.T).detach())

    def after_step(self, observations, progress: Tensor, sum_over_ranks=None) -> None:
        """Move the average: momentum 0.9 + 0.1 (1 - exp(-5 min(i, h) / h)), h = n // 2."""
        half = self.iterations // 2
        share = min(round(float(progress) * self.iterations) / half, 1.0) if half else None
        rampup = 1.0 if share is None else -torch.expm1(torch.tensor(-5.0 * share)).item()
        momentum = 0.9 + 0.1 * rampup
        self.ema.mul_(momentum).add_(self.weight.detach(), alpha=1 - momentum)

    @torch.no_grad()
    def feature_logits(
        self, features: Tensor, classes: LfaClasses, adapted: bool = False
    ) -> Tensor:
        weight = self.weight if classes.trained else self.ema
        features = self.clip.vision.joint(features)
        return self.clip.logit_scale * F.normalize(features @ weight, dim=-1) @ classes.texts.T

    @torch.no_grad()
    def fixed_sides(self, clip: FrozenClip, classes: LfaClasses, adapted: bool = False) -> Sides:
        """Pictures under both maps, side by side; classes stand in one half, with zeros in the
        other, so that one graph serves class lists of either kind."""
        trained, average = self.weight.detach(), self.ema.clone()

        def pictures(images: Tensor) -> Tensor:
            features = frozen_image_features(clip, images)
            halves = (F.normalize(features @ weight, dim=-1) for weight in (trained, average))
            return torch.cat(tuple(halves), dim=-1)

        half = torch.zeros_like(classes.texts)
        texts = (classes.texts, half) if classes.trained else (half, classes.texts)
        return Sides(pictures, torch.cat(texts, dim=-1))


def procrustes(features: Tensor, targets: Tensor, beta: float) -> Tensor:
    """W = (1 - beta) R + beta I, R the orthogonal matrix nearest to mapping features on targets.

    With fewer classes than Ds R is free where no target lies, and is what the SVD makes of it, as
    in the public code; scores of the targets' own classes do not depend on that.

    Args:
        features, targets: [N, Ds].
        beta: how far W is drawn to the identity.
    """
    left, _, right = torch.linalg.svd(features.T @ targets)
    rotation = left @ right
    return rotation - beta * (rotation - torch.eye(len(rotation)).to(rotation))


def cross_validated_beta(features: Tensor, texts: Tensor, labels: Tensor, seed: int) -> float:
    """The beta of best accuracy on held-out fifths of the training set; the smallest of equals.

    Args:
        features: [N, Ds], normalised, of the centre crops.
        texts: [C, Ds], normalised.
        labels: int64 [N].
        seed: of the splits.
    """
    generator = torch.Generator().manual_seed(seed)
    fitted = int(FITTED * len(features))
    best, best_score = 0.0, -1.0
    for beta in torch.linspace(0, 1, BETAS).tolist():
        score = 0.0
        for _ in range(SPLITS):
            order = torch.randperm(len(features), generator=generator).to(features.device)
            train, held_out = order[:fitted], order[fitted:]
            weight = procrustes(features[train], texts[labels[train]], beta)
            predicted = (F.normalize(features[held_out] @ weight, dim=-1) @ texts.T).argmax(1)
            score += (predicted == labels[held_out]).double().mean().nan_to_num().item()
        if score > best_score:
            best, best_score = beta, score
    return best


def reranking_loss(features: Tensor, texts: Tensor, labels: Tensor, neighbours: int) -> Tensor:
    """mean over images and their k nearest classes j of
    relu(|f - y| + (1 - y . y_j) / 4 - |f - y_j|), y the text of the image's own class.

    Args:
        features: [B, Ds], normalised.
        texts: [C, Ds], normalised.
        labels: int64 [B].
        neighbours: k, at most all classes.
    """
    distances = torch.cdist(features, texts, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.topk(min(neighbours, len(texts)), largest=False)
    own = texts[labels]
    margins = (1 - torch.einsum("bkd,bd->bk", texts[nearest.indices], own)) / MARGIN_SCALE
    anchor = (features - own).norm(dim=-1, keepdim=True)
    return F.relu(anchor + margins - nearest.values).mean()
