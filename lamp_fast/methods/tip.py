"""Tip-Adapter (Zhang et al., ECCV 2022): training features as a cache beside the class texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.data.feature_batches import FeatureBatches
from lamp_fast.methods.base import Criterion, Method, Step
from lamp_fast.methods.settings.tip import TIP, TIP_F, TipFSettings, TipSettings
from lamp_fast.methods.surroundings import RunClasses, Surroundings
from lamp_fast.methods.text import imagenet_or, mean_text_features
from lamp_fast.methods.training_set import TrainingSet

# The grid of the search, from the least value up to, but without, a data set's most.
BETAS, ALPHAS, LEAST = 200, 20, 0.1
# Numbers that the search holds at once.
_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Published:
    """What the public code sets by data set.

    Attributes:
        alpha: the first value, that Tip-Adapter-F trains with.
        most_beta, most_alpha: where the search ends.
        beta: the first value, the same everywhere.
    """

    alpha: float
    most_beta: float
    most_alpha: float
    beta: float = 1.0


PUBLISHED = {
    "caltech101": Published(3, 12, 5),
    "dtd": Published(2, 13, 13),
    "eurosat": Published(2, 12, 10),
    "fgvc_aircraft": Published(5, 30, 30),
    "flowers102": Published(10, 50, 50),
    "food101": Published(1.17, 10, 10),
    "imagenet": Published(1.17, 7, 3),
    "oxford_pets": Published(1.17, 7, 3),
    "stanford_cars": Published(3, 20, 10),
    "sun397": Published(1.17, 12, 10),
    "ucf101": Published(3, 7, 3),
}
# Other data sets take ImageNet's.
OTHERWISE = "imagenet"


@dataclass(frozen=True)
class TipClasses:
    """Classes as Tip-Adapter scores them.

    Attributes:
        texts: text features [C, Ds], normalised.
        columns: int64 [C], which trained class each is; the number of trained classes where none.
    """

    texts: Tensor
    columns: Tensor


class Tip(Method):
    """Logits s f t_c + alpha sum_i Y_ic exp(-beta (1 - f k_i)), s CLIP's scale.

    The key k_i of a training picture is the normalised mean of its features over random crops, Y_ic
    is 1 where c is its class, with ``tip_balanced`` N / (C n_c). A name that was not trained has no
    key, so its logit is zero-shot CLIP's; trained names have their keys in any list, also of
    another data set.

    Alpha and beta are the pair of a grid with the best accuracy on the validation pictures, the
    first of equals, beta moving slowest. On ImageNet and its variants a class's text is the mean of
    its normalised features in seven templates, normalised again.

    Args:
        clip: the frozen CLIP.
        config: alpha, beta and the keys' passes.
        classes: of the run; their counts are the number of keys.
    """

    entry = TIP
    reads_features = True

    keys: Tensor
    labels: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, clip: FrozenClip, config: TipSettings, classes: RunClasses) -> None:
        super().__init__(clip)
        self.config, self.classes = config, classes
        pictures = sum(classes.counts)
        self.hold_keys(torch.zeros(pictures, clip.vision.visual.proj.shape[1]))
        self.register_buffer("labels", torch.zeros(pictures, dtype=torch.int64))
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float64))
        self.register_buffer("beta", torch.zeros((), dtype=torch.float64))
        self.match_clip()

    @classmethod
    def build(cls, clip: FrozenClip, settings: TipSettings, surroundings: Surroundings) -> "Tip":
        return cls(clip, settings, surroundings.classes)

    def hold_keys(self, keys: Tensor) -> None:
        """Keep keys [N, Ds] as what they are: not learned."""
        self.register_buffer("keys", keys)

    @torch.no_grad()
    def read_training_set(self, training: TrainingSet) -> FeatureBatches | None:
        """Make the cache, and choose alpha and beta."""
        self.fill(training.views(self.config.tip_passes), training)
        self.choose(training)
        return None

    def fill(self, views: Tensor, training: TrainingSet) -> None:
        """Make the cache of features before the projection [N, views, V]; alpha and beta are the
        given or the published first ones."""
        precision = self.keys.dtype
        mean = self.clip.vision.project(views[:, : self.config.tip_passes]).mean(1)
        self.hold_keys(F.normalize(mean, dim=-1).to(precision))
        self.labels = training.labels.to(self.keys.device)
        known = PUBLISHED.get(training.benchmark.name, PUBLISHED[OTHERWISE])
        alpha, beta = self.config.tip_alpha, self.config.tip_beta
        self.alpha.fill_(known.alpha if alpha is None else alpha)
        self.beta.fill_(known.beta if beta is None else beta)

    @torch.no_grad()
    def choose(self, training: TrainingSet) -> None:
        """Search alpha and beta on the validation pictures, where they are not given."""
        if not self.config.uses_validation:
            return
        benchmark = training.benchmark
        known = PUBLISHED.get(benchmark.name, PUBLISHED[OTHERWISE])
        features, labels = training.validation()
        classes = self.prepare(benchmark.base_names, benchmark.template, benchmark.origin)
        betas = grid(known.most_beta, BETAS, self.config.tip_beta)
        alphas = grid(known.most_alpha, ALPHAS, self.config.tip_alpha)
        beta, alpha = self.search(self._read(features), labels, classes, betas, alphas)
        self.beta.fill_(beta)
        self.alpha.fill_(alpha)

    def search(
        self,
        features: Tensor,
        labels: Tensor,
        classes: TipClasses,
        betas: Sequence[float],
        alphas: Sequence[float],
    ) -> tuple[float, float]:
        """The beta and alpha that are right most often; the first of equals, beta moving slowest.

        Args:
            features: [M, Ds], normalised.
            labels: int64 [M], places among ``classes``.
            classes: of :meth:`prepare`.
            betas, alphas: to choose from.
        """
        right = torch.zeros(len(betas), len(alphas), dtype=torch.int64, device=features.device)
        weights = torch.tensor(alphas, dtype=torch.float64, device=features.device)
        weights = weights.to(self.keys.dtype)[:, None, None]
        most = max(len(self.keys), len(alphas) * len(classes.texts), 1)
        rows = max(1, _AT_ONCE // most)
        for some, their in zip(features.split(rows), labels.split(rows), strict=True):
            text = self.clip.logit_scale * some @ classes.texts.T
            closeness = self.keys @ some.T - 1
            affinities = torch.empty_like(closeness)
            for place, beta in enumerate(betas):
                torch.mul(closeness, beta, out=affinities).exp_()
                scores = weights * self._by_class(affinities, classes) + text  # [alphas, B, C]
                right[place] += (scores.max(-1).indices == their).sum(-1)
        # numpy's is the first of equals.
        best = int(right.cpu().numpy().argmax())
        return betas[best // len(alphas)], alphas[best % len(alphas)]

    def templates(self, template: str, origin: Origin = NOWHERE) -> tuple[str, ...]:
        """ImageNet's seven, or the one."""
        return imagenet_or(template, origin)

    @torch.no_grad()
    def prepare(self, names: Sequence[str], template: str, origin: Origin = NOWHERE) -> TipClasses:
        texts = mean_text_features(self.clip, names, self.templates(template, origin), origin.words)
        none = len(self.classes.base)
        columns = [none if each is None else each for each in self.classes.columns(names)]
        return TipClasses(texts, torch.tensor(columns, device=texts.device))

    @torch.no_grad()
    def feature_logits(
        self, features: Tensor, classes: TipClasses, adapted: bool = False
    ) -> Tensor:
        return self.scores(self._read(features), classes)

    def scores(self, features: Tensor, classes: TipClasses) -> Tensor:
        """Logits [B, C] of normalised features [B, Ds]."""
        affinities = (self.keys @ (self.beta * features).T - self.beta).exp()  # [N, B]
        text = self.clip.logit_scale * features @ classes.texts.T
        return text + self.alpha * self._by_class(affinities, classes)

    def _read(self, features: Tensor) -> Tensor:
        return self.clip.vision.joint(features).to(self.keys.dtype)

    def _by_class(self, affinities: Tensor, classes: TipClasses) -> Tensor:
        """Sums [B, C] of affinities [N, B] over the keys of each class."""
        trained = len(self.classes.base)
        sums = sums_by_class(affinities, self.labels, trained)
        if self.config.tip_balanced:
            sizes = self.labels.bincount(minlength=trained).to(sums.dtype)
            sums = sums * (sizes.mean() / sizes)[:, None]
        return F.pad(sums, (0, 0, 0, 1))[classes.columns].T


class TipF(Tip):
    """The same with learned keys, which start at Tip-Adapter's.

    An epoch shows each picture in another random crop. Alpha and beta have their first values while
    keys are learned, and are searched after the last epoch.

    Args:
        clip: the frozen CLIP.
        config: alpha, beta and the views.
        classes: of the run; their counts are the number of keys.
        epochs: of the run.
    """

    entry = TIP_F

    def __init__(
        self, clip: FrozenClip, config: TipFSettings, classes: RunClasses, epochs: int
    ) -> None:
        super().__init__(clip, config, classes)
        self.epochs = epochs

    @classmethod
    def build(cls, clip: FrozenClip, settings: TipFSettings, surroundings: Surroundings) -> "TipF":
        return cls(clip, settings, surroundings.classes, surroundings.epochs)

    def hold_keys(self, keys: Tensor) -> None:
        """Keep keys [N, Ds] as what is learned."""
        self.keys = nn.Parameter(keys)

    @torch.no_grad()
    def read_training_set(self, training: TrainingSet) -> FeatureBatches:
        """Make the cache, and train on features of crops."""
        shown = self.config.tip_views or self.epochs
        views = training.views(max(shown, self.config.tip_passes))
        self.fill(views, training)
        return training.batches(self._read(views[:, :shown]), views="in turn")

    def settle(self, training: TrainingSet) -> None:
        """Search alpha and beta again, for the keys that were learned."""
        self.choose(training)

    def step(
        self, images: Tensor, labels: Tensor, classes: TipClasses, criterion: Criterion
    ) -> Step:
        """``images`` are normalised features [B, Ds]."""
        logits = self.scores(images.to(self.keys.dtype), classes)
        return Step(criterion(logits, labels), logits)


def grid(most: float, steps: int, given: float | None = None) -> list[float]:
    """``steps`` values from 0.1 in equal distances, ``most`` being the next; or what is given."""
    if given is not None:
        return [given]
    return [number * (most - LEAST) / steps + LEAST for number in range(steps)]


def sums_by_class(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Sums [C, B] of the rows [N, B] of each class, in an order that is always the same.

    Args:
        rows: of some pictures.
        labels: int64 [N], of the same.
        classes: C.
    """
    if rows.is_cuda:  # where index_add adds in any order
        return F.one_hot(labels, classes).to(rows.dtype).T @ rows
    return rows.new_zeros(classes, rows.shape[1]).index_add(0, labels, rows)
