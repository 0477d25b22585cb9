"""Class scores of pictures, batch after batch, by one process or several."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from lamp_fast.data.loading import Batches, evaluation_batches
from lamp_fast.data.pictures import Pictures
from lamp_fast.errors import InputError
from lamp_fast.methods.base import Method
from lamp_fast.runs.experiment import Experiment
from lamp_fast.runs.ranks import ALONE, Ranks, batch_sizes


def own_pictures(pictures: Pictures, batch: int, ranks: Ranks) -> Pictures:
    """The whole batches of some pictures that are this rank's."""
    mine = ranks.rows(len(batch_sizes(len(pictures), batch)))
    first, end = (min(edge * batch, len(pictures)) for edge in (mine.start, mine.stop))
    return pictures.select(range(first, end))


class Scorer:
    """Class scores of some pictures over some names, as often as they are asked for.

    Ranks share whole batches, so that each is computed as one process alone would. Where features
    are all that the method reads, they are held from the first call on, else what loads pictures.

    Args:
        experiment: whose views, batches and prior these are.
        method: that scores.
        names: of the classes.
        pictures: N of them.
        ranks: the processes that share the pictures.
    """

    def __init__(
        self,
        experiment: Experiment,
        method: Method,
        names: Sequence[str],
        pictures: Pictures,
        ranks: Ranks = ALONE,
    ) -> None:
        self.experiment, self.method, self.ranks = experiment, method, ranks
        self.pictures = own_pictures(pictures, experiment.config.machine.test_batch, ranks)
        benchmark, prior = experiment.benchmark, experiment.prior
        self.classes = method.prepare(names, benchmark.template, benchmark.origin)
        self.shift = None if prior is None else prior.shift(method, names)
        self._features: torch.Tensor | None = None
        self._batches: Batches | None = None

    def logits(self, adapted: bool = False) -> Iterator[torch.Tensor]:
        """[B, C] of each batch of this rank's pictures, in order.

        Args:
            adapted: as :meth:`Method.logits` takes it.

        Raises:
            InputError: see :func:`class_scores`.
        """
        for images in self._inputs():
            logits = class_scores(self.method, images, self.classes, adapted)
            yield logits if self.shift is None else logits + self.shift.to(logits)

    def _inputs(self) -> Iterator[torch.Tensor]:
        """Batches as :func:`class_scores` takes them: features, from the cache, where these
        suffice."""
        experiment, machine = self.experiment, self.experiment.config.machine
        if self.method.reads_features:
            if not len(self.pictures):
                return
            if self._features is None:
                features = experiment.reader.read(self.pictures, experiment.test_transform)
                self._features = features.to(experiment.device)
            yield from self._features.split(machine.test_batch)
            return
        if self._batches is None:  # whose workers wait for the next call
            self._batches = evaluation_batches(
                self.pictures,
                experiment.test_transform,
                machine.test_batch,
                workers=machine.workers,
            )
        quiet = None if self.ranks.first else True
        bar = tqdm(self._batches, desc="evaluating", leave=False, disable=quiet)
        yield from (images for images, _, _ in experiment.move_batches(bar))


@torch.no_grad()
def class_scores(
    method: Method, images: torch.Tensor, classes: Any, adapted: bool = False
) -> torch.Tensor:
    """The logits [B, C] of pictures, of which the largest is the answer.

    Args:
        method: any.
        images: [B, 3, S, S], or views [B, 5, 3, S, S], whose logits' mean is taken; one view of
            every picture is encoded at once, so memory is that of one. Or features before the
            projection, [B, V] or [B, 5, V], of a method that reads these.
        classes, adapted: as :meth:`Method.logits` takes them.

    Raises:
        InputError: any is NaN or infinite: they would say nothing, and yet have a largest one.
    """
    are_features = images.ndim < 4
    score = method.feature_logits if are_features else method.logits
    several = images.ndim == (3 if are_features else 5)
    views = images.unbind(1) if several else (images,)
    logits = sum(score(view, classes, adapted) for view in views) / len(views)
    if not bool(torch.isfinite(logits).all()):
        raise InputError(
            "the method's class scores are not finite: its weights or settings are beyond what"
            " it can be computed with"
        )
    return logits
