"""Candle (Shi et al., KDD 2024): prototypes of both kinds, virtual ones for new classes, and
attention between them, under a compensating logit-adjusted loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.errors import InputError
from lamp_fast.methods.base import Criterion, Method, Step, plain_image_features
from lamp_fast.methods.settings.candle import CANDLE, CandleSettings
from lamp_fast.methods.surroundings import RunClasses, Surroundings
from lamp_fast.methods.text import ensemble_texts, plain_text_features
from lamp_fast.methods.training_set import TrainingSet

RATIO = 0.1
"""First value of what the attention's output is multiplied by."""


@dataclass(frozen=True)
class CandleClasses:
    """Prototypes for a list of class names.

    Attributes:
        texts: text features [n, Ds] of every class that the prototypes are of: the run's, base
            before new, then names that the run did not know.
        columns: int64 [C], where each asked class stands among them.
    """

    texts: Tensor
    columns: Tensor


@dataclass(frozen=True)
class _Prototypes:
    """Rows [2n, Ds], visual before text, projected: ``normed`` as keys, ``raw`` and ``fused``."""

    raw: Tensor
    normed: Tensor
    fused: Tensor


class Candle(Method):
    """Frozen features f; visual prototypes v (class means of the training set, then learned virtual
    ones of the new classes, which start at their text features); text prototypes t.

    All are projected (f, v by W_i, t by W_t, from the identity) and put through
    x <- LN(x) + r MHA(LN(x)). Three cross-entropies are added up, each over the batch's images and
    all n visual prototypes (labelled with their own class): before the attention against t, after
    it against t, after it against v. Each adds tau log prior to the logits, with every class one
    larger for its prototype (new ones 0 + 1). The prediction is the sum of the two after the
    attention.

    In the public code all images of a batch and all prototypes attend to each other, so a
    prediction depends on the other images of its batch, and base classes are tested against the
    scores of all. Here an image attends to itself and the prototypes, prototypes to prototypes,
    in training and testing alike, and a test is over the names that it asks for. A name that the
    run did not know has its text feature for a visual prototype.

    Args:
        clip: the frozen CLIP.
        config: scale, heads, dropout.
        classes: of the run; the new ones get parameters.
        tau: of the logit adjustment.

    Raises:
        InputError: a joint width that the heads do not divide.
    """

    entry = CANDLE
    reads_features = True

    visual: Tensor
    counts: Tensor

    def __init__(
        self, clip: FrozenClip, config: CandleSettings, classes: RunClasses, tau: float
    ) -> None:
        super().__init__(clip)
        width = clip.vision.visual.proj.shape[1]
        if width % config.fusion_heads:
            raise InputError(
                f"--fusion-heads {config.fusion_heads}: expected a divisor of the joint width"
                f" {width}"
            )
        self.config, self.tau = config, tau
        self.names = (*classes.base, *classes.new)
        self.image_projection = nn.Parameter(torch.eye(width))
        self.text_projection = nn.Parameter(torch.eye(width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, config.fusion_heads, batch_first=True)
        self.ratio = nn.Parameter(torch.tensor([RATIO]))
        self.virtual = nn.Parameter(torch.zeros(len(classes.new), width))
        self.register_buffer("visual", torch.zeros(len(classes.base), width))
        self.register_buffer("counts", torch.ones(len(self.names), dtype=torch.int64))
        self.batch = 1
        self.match_clip()

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: CandleSettings, surroundings: Surroundings
    ) -> "Candle":
        return cls(clip, settings, surroundings.classes, surroundings.tau)

    @torch.no_grad()
    def read_training_set(self, training: TrainingSet) -> None:
        """Class means of the training set under the test transform, counts, virtual prototypes."""
        benchmark, base = training.benchmark, len(self.visual)
        features = self.clip.vision.project(training.features())
        labels = training.labels.to(features.device)
        sums = torch.zeros_like(self.visual).index_add_(0, labels, features)
        self.visual.copy_(sums / training.counts.to(sums)[:, None])
        # A prototype of each class is in every batch.
        self.counts.fill_(1)[:base] += training.counts.to(self.counts.device)
        texts = self.prepare(benchmark.base_names, benchmark.template, benchmark.origin).texts
        self.virtual.copy_(texts[base:])
        self.batch = training.batch

    @torch.no_grad()
    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> CandleClasses:
        columns, unknown = self._columns(tuple(names))
        every, words = [*self.names, *unknown], origin.words
        if words is None:
            texts = plain_text_features(self.clip, every, template)
        else:
            texts = ensemble_texts(self.clip, every, words, normalised=False)
        return CandleClasses(texts, torch.tensor(columns, device=texts.device))

    def _columns(self, names: tuple[str, ...]) -> tuple[list[int], list[str]]:
        """Where names stand among the run's classes and, behind those, the unknown ones.

        Classes may share a name (ImageNet has two "missile"), so a half of the run is found as a
        whole, and of equal names each is one class.
        """
        base, every = len(self.visual), len(self.names)
        for first, end in ((0, base), (base, every), (0, every)):
            if names == self.names[first:end]:
                return list(range(first, end)), []
        columns, unknown = [], []
        for name, column in zip(names, RunClasses(self.names).columns(names), strict=True):
            if column is None:
                column = every + len(unknown)
                unknown.append(name)
            columns.append(column)
        return columns, unknown

    def step(
        self, images: Tensor, labels: Tensor, classes: CandleClasses, criterion: Criterion
    ) -> Step:
        """The compensating loss in place of ``criterion``.

        Its mean is over batch + n rows. The n prototypes are the same in every piece of a batch,
        so each piece adds its share of them.
        """
        features = self._features(images)
        n = len(classes.texts)
        prototypes = self._prototypes(classes.texts, self.config.fusion_dropout)
        fused = self._fuse(features, prototypes, self.config.fusion_dropout)
        visual, texts = prototypes.fused[:n], prototypes.fused[n:]
        rows = torch.cat([features, prototypes.raw[:n]])
        fused_rows = torch.cat([fused, visual])
        targets = torch.cat([labels, torch.arange(n, device=labels.device)])
        scale = self.clip.logit_scale
        scores = {
            "text_loss": scale * _cosine(rows, prototypes.raw[n:]),
            "fused_text_loss": scale * _cosine(fused_rows, texts),
            "fused_visual_loss": scale * self.config.prototype_scale * _cosine(fused_rows, visual),
        }
        prior = self.counts.to(rows.dtype)
        shift = self.tau * (prior / prior.sum()).log()
        weights = rows.new_full((len(targets),), 1 / (self.batch + n))
        weights[: len(images)] *= self.batch / len(images)
        terms = {
            name: (F.cross_entropy(logits + shift, targets, reduction="none") * weights).sum()
            for name, logits in scores.items()
        }
        prediction = scores["fused_text_loss"] + scores["fused_visual_loss"]
        return Step(
            sum(terms.values()),
            prediction[: len(images)],
            {name: term.detach() for name, term in terms.items()},
        )

    @torch.no_grad()
    def feature_logits(
        self, features: Tensor, classes: CandleClasses, adapted: bool = False
    ) -> Tensor:
        state = (*self.parameters(), *self.buffers())
        prototypes = self._kept.get(classes, state, lambda: self._prototypes(classes.texts, 0.0))
        n = len(classes.texts)
        features = self.clip.vision.project(features) @ self.image_projection
        fused = self._fuse(features, prototypes, 0.0)
        visual, texts = (prototypes.fused[part][classes.columns] for part in _halves(n))
        return self.clip.logit_scale * (
            _cosine(fused, texts) + self.config.prototype_scale * _cosine(fused, visual)
        )

    def logit_slope(self) -> float:
        """A logit is a sum of two cosines."""
        return float(self.clip.logit_scale) * (1 + self.config.prototype_scale)

    def _features(self, images: Tensor) -> Tensor:
        return plain_image_features(self.clip, images) @ self.image_projection

    def _prototypes(self, texts: Tensor, dropout: float) -> _Prototypes:
        unknown = texts[len(self.names) :]
        visual = torch.cat([self.visual, self.virtual, unknown]) @ self.image_projection
        raw = torch.cat([visual, texts @ self.text_projection])
        normed = self.norm(raw)
        q, k, v = self._project(normed)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return _Prototypes(raw, normed, self._residual(normed, attended.transpose(0, 1).flatten(1)))

    def _fuse(self, features: Tensor, prototypes: _Prototypes, dropout: float) -> Tensor:
        """Features [B, Ds] after attention, each over itself and the prototypes [2n, Ds]."""
        normed = self.norm(features)
        q, own_k, own_v = (each.transpose(0, 1)[:, :, None] for each in self._project(normed))
        _, k, v = self._project(prototypes.normed)
        k, v = (
            torch.cat([own, shared.expand(len(features), -1, -1, -1)], dim=2)
            for own, shared in ((own_k, k), (own_v, v))
        )  # [B, H, 1 + 2n, d]
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self._residual(normed, attended.flatten(1))

    def _project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of rows [R, Ds]: each [H, R, d]."""
        attention = self.attention
        qkv = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
        return qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3).unbind(0)

    def _residual(self, normed: Tensor, attended: Tensor) -> Tensor:
        return normed + self.ratio * self.attention.out_proj(attended)


def _halves(n: int) -> tuple[slice, slice]:
    return slice(None, n), slice(n, None)


def _cosine(rows: Tensor, others: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1) @ F.normalize(others, dim=-1).T
