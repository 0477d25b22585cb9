"""Batches of features that lie in memory, in the order in which pictures would be drawn."""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lamp_fast.data.loading import epoch_order
from lamp_fast.data.settings import Sampling

Views = Literal["in turn", "drawn", "mixed"]


class FeatureBatches:
    """Batches [features [b, ...], labels int64 [b], index int64 [b]], as often as asked for.

    As of pictures, a last batch that is not full is dropped, unless it is the only one.

    Args:
        features: [N, views, ...], where batches are to lie.
        labels: int64 [N].
        batch_size: rows a batch.
        seed: of order and views.
        sampler: which rows an epoch holds.
        views: "in turn" shows view e of every picture in epoch e, and begins again; "drawn" shows
            one of them, drawn anew for every epoch; "mixed" takes the N rows of an epoch from all
            N times views together.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int,
        sampler: Sampling = "shuffle",
        views: Views = "in turn",
        rows: Callable[[int], slice] = lambda size: slice(0, size),
    ) -> None:
        self.features, self.labels = features, labels.to(features.device)
        self.batch_size = min(batch_size, len(labels))
        self.seed, self.sampler, self.views, self.rows = seed, sampler, views, rows

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[list[Tensor]]:
        return self.epoch(0)

    def part(self, rows: Callable[[int], slice]) -> "FeatureBatches":
        """The same batches, of each the rows that ``rows`` says of its size, if any."""
        return FeatureBatches(
            self.features,
            self.labels,
            self.batch_size,
            seed=self.seed,
            sampler=self.sampler,
            views=self.views,
            rows=rows,
        )

    def epoch(self, epoch: int) -> Iterator[list[Tensor]]:
        """The batches of an epoch, from 0."""
        index, view = self._draw(epoch)
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            own = self.rows(self.batch_size)
            rows = slice(first + own.start, first + own.stop)
            if own.start == own.stop:
                continue
            some = index[rows]
            yield [self.features[some, view[rows]], self.labels[some], some]

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Which picture, and which view of it, stands in each row of an epoch: int64 [N] twice."""
        count, views = self.features.shape[:2]
        labels = self.labels.cpu().numpy()
        if self.views == "mixed":
            # Shuffled as a whole: of N rows each is one of N times views.
            every = epoch_order(np.repeat(labels, views), self.sampler, self.seed, epoch)[:count]
            index, view = every // views, every % views
        else:
            index = epoch_order(labels, self.sampler, self.seed, epoch)
            chosen = epoch % views
            if self.views == "drawn":
                draw = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
                chosen = int(draw[0] % views)
            view = np.full(count, chosen)
        device = self.features.device
        return torch.from_numpy(index).to(device), torch.from_numpy(view).to(device)
