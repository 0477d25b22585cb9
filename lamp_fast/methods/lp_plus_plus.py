"""LP++ (Huang et al., CVPR 2024): a linear probe beside class texts, each class with its mix."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lamp_fast import cli
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.methods.base import Method
from lamp_fast.methods.settings.lp_plus_plus import LP_PLUS_PLUS, LpPlusPlusSettings
from lamp_fast.methods.surroundings import RunClasses, Surroundings
from lamp_fast.methods.text import zero_shot_texts
from lamp_fast.methods.training_set import TrainingSet

MOMENTUM = 0.9
# Times the mean cosine of a picture with its class text: where alpha starts.
ALPHA_SCALE = 250.0
STEPS_BETWEEN_ALPHAS = 10


class Head(NamedTuple):
    """What LP++ learns of C classes.

    Attributes:
        weight: [C, Ds].
        bias: [C].
        alpha: [C], of each class's text.
    """

    weight: Tensor
    bias: Tensor
    alpha: Tensor

    def logits(self, features: Tensor, cosines: Tensor) -> Tensor:
        """Class scores [N, C] of normalised features [N, Ds] and their cosines with the texts."""
        return torch.addcmul(torch.addmm(self.bias, features, self.weight.T), self.alpha, cosines)


class LpClasses(NamedTuple):
    """Class names as LP++ scores them.

    Attributes:
        texts: text features [C, Ds], normalised.
        columns: int64 [C], where each stands among the trained ones.
    """

    texts: Tensor
    columns: Tensor


class LpPlusPlus(Method):
    """Scores are W f + b + alpha_c <f, t_c>, f and t_c normalised, without CLIP's scale.

    :func:`start` and :func:`descend` are the public code's on one random view of every training
    picture (as shown in testing, where random crops would spoil the classes). What is kept is the
    step of best accuracy on the validation pictures, of equals the last.

    Args:
        clip: the frozen CLIP.
        config: how many steps.
        classes: of the run; the trained ones have parameters.
    """

    entry = LP_PLUS_PLUS
    reads_features = True

    weight: Tensor
    bias: Tensor
    alpha: Tensor
    best_step: Tensor

    def __init__(self, clip: FrozenClip, config: LpPlusPlusSettings, classes: RunClasses) -> None:
        super().__init__(clip)
        self.config, self.classes = config, classes
        count = len(classes.base)
        self.register_buffer("weight", torch.zeros(count, clip.vision.visual.proj.shape[1]))
        self.register_buffer("bias", torch.zeros(count))
        self.register_buffer("alpha", torch.zeros(count))
        # From 1; 0 before there was one.
        self.register_buffer("best_step", torch.zeros((), dtype=torch.int64))
        self.match_clip()

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: LpPlusPlusSettings, surroundings: Surroundings
    ) -> "LpPlusPlus":
        return cls(clip, settings, surroundings.classes)

    def logit_slope(self) -> float:
        return float((self.weight.norm(dim=1) + self.alpha.abs()).max())

    def implied_prior(self, counts: np.ndarray) -> np.ndarray:
        """Those of training: it descends plain cross-entropy."""
        return counts

    def trainable_parameters(self) -> int:
        return sum(each.numel() for each in self.head)

    @property
    def head(self) -> Head:
        """What was learned."""
        return Head(self.weight, self.bias, self.alpha)

    @torch.no_grad()
    def read_training_set(self, training: TrainingSet) -> None:
        """Descend, and keep the best step; says which it was."""
        pictures, theirs = training.validation()
        joint = self.clip.vision.joint
        features = joint(training.views(1)[:, 0])
        labels = training.labels.to(features.device)
        benchmark = training.benchmark
        texts = self.prepare(benchmark.base_names, benchmark.template, benchmark.origin).texts
        cosines = features @ texts.T
        held_out = joint(pictures)
        held_out = held_out, held_out @ texts.T

        head = start(features, cosines, labels, training.seed)
        steps, most = self.config.lp_steps, torch.zeros_like(labels[0])
        descent = descend(head, features, cosines, labels, steps)
        bar = tqdm(descent, "LP++ steps", total=steps, leave=False, disable=None)
        for step, head in enumerate(bar, 1):
            right = (head.logits(*held_out).argmax(1) == theirs).sum()
            if right >= most:
                most = right
                self.best_step.fill_(step)
                for kept, now in zip(self.head, head, strict=True):
                    kept.copy_(now)
        cli.say(
            f"lp++    step {int(self.best_step)} of {steps}, by accuracy"
            f" {100 * int(most) / len(theirs):.2f}% on {len(theirs):,} validation pictures"
        )

    @torch.no_grad()
    def prepare(self, names: Sequence[str], template: str, origin: Origin = NOWHERE) -> LpClasses:
        """Texts and parameters of the names.

        Raises:
            InputError: a name that was not trained.
        """
        columns = self.classes.trained_columns(names, self.entry.no_new_names)
        texts = zero_shot_texts(self.clip, names, template, origin.words)
        return LpClasses(texts, torch.tensor(columns, device=texts.device))

    @torch.no_grad()
    def feature_logits(self, features: Tensor, classes: LpClasses, adapted: bool = False) -> Tensor:
        features = self.clip.vision.joint(features)
        head = Head(*(each[classes.columns] for each in self.head))
        return head.logits(features, features @ classes.texts.T)


def start(features: Tensor, cosines: Tensor, labels: Tensor, seed: int) -> Head:
    """Where LP++ begins.

    A row of W is the *sum* of its class's features, so that large classes begin with large rows;
    alpha is the same for all, 250 times the mean over classes of the mean cosine of a class's
    pictures with its text; b is uniform within 1 / sqrt(Ds), as torch draws it for a linear layer.

    Args:
        features: [N, Ds], normalised.
        cosines: [N, C], of the features with the class texts.
        labels: int64 [N], of C classes that have pictures.
        seed: of b.
    """
    count, width = cosines.shape[1], features.shape[1]
    sums = features.new_zeros(count, width).index_add_(0, labels, features)
    own = cosines.gather(1, labels[:, None])[:, 0]
    totals = own.new_zeros(count).index_add_(0, labels, own)
    mean = (totals / labels.bincount(minlength=count)).mean()
    bound = 1 / math.sqrt(width)
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bias = (bound * (2 * drawn - 1)).to(features)
    return Head(sums, bias, (ALPHA_SCALE * mean).expand(count).clone())


def descend(
    head: Head, features: Tensor, cosines: Tensor, labels: Tensor, steps: int
) -> Iterator[Head]:
    """Gradient descent on the mean cross-entropy of all pictures, at rates that follow from them.

    W and b take a step of momentum 0.9 at rate 4 N / (largest eigenvalue of F^T F). Every tenth
    step alpha moves, at rate N / (4 max_c sum_i <f_i, t_c>^2), against the *sum* of its gradients
    at all steps until then: the public code never sets them to zero, and its results are of that.

    Args:
        head: where to begin; it is changed.
        features: F [N, Ds], normalised.
        cosines: [N, C], of the features with the class texts.
        labels: int64 [N].
        steps: how many.

    Yields:
        ``head`` after each step, changed in place.
    """
    count = len(features)
    gram = features.T @ features
    rate = 4 * count / torch.linalg.eigvalsh(gram.double())[-1].to(gram)
    alpha_rate = count / (4 * cosines.square().sum(0).max())
    targets = F.one_hot(labels, cosines.shape[1])
    weight_velocity, bias_velocity = torch.zeros_like(head.weight), torch.zeros_like(head.bias)
    alpha_gradient = torch.zeros_like(head.alpha)
    for step in range(1, steps + 1):
        # Of the loss by the logits.
        slope = (head.logits(features, cosines).softmax(1) - targets) / count
        alpha_gradient += (slope * cosines).sum(0)
        weight_velocity.mul_(MOMENTUM).add_(slope.T @ features)
        bias_velocity.mul_(MOMENTUM).add_(slope.sum(0))
        head.weight.sub_(rate * weight_velocity)
        head.bias.sub_(rate * bias_velocity)
        if step % STEPS_BETWEEN_ALPHAS == 0:
            head.alpha.sub_(alpha_rate * alpha_gradient)
        yield head
