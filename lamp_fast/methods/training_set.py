"""What a method may look at before its first step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lamp_fast.clip.features import FeatureReader
from lamp_fast.data.benchmark import Benchmark
from lamp_fast.data.feature_batches import FeatureBatches, Views
from lamp_fast.data.loading import Transform
from lamp_fast.data.settings import Sampling
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.errors import InputError


@dataclass(frozen=True)
class TrainingSet:
    """What a method may look at before the first step: training and validation data alone.

    Attributes:
        benchmark: of which only ``train``, ``val``, counts and class names may be used here.
        reader: of features, over the frozen CLIP.
        centre: the one deterministic view of a picture.
        random: the views of training pictures; None where these, too, are the one.
        batch: rows of a training batch, over all pieces and ranks.
        seed: the run's.
        sampler: which pictures an epoch holds.
    """

    benchmark: Benchmark
    reader: FeatureReader
    centre: Transform
    random: Transform | None
    batch: int
    seed: int
    sampler: Sampling = "shuffle"

    @property
    def labels(self) -> Tensor:
        """int64 [N], of every training picture."""
        return torch.from_numpy(self.benchmark.train.labels.copy())

    @property
    def counts(self) -> Tensor:
        """int64 [C_base], training pictures a class."""
        return torch.from_numpy(self.benchmark.counts)

    @property
    def preprocessing(self) -> Preprocessing:
        """Of the CLIP, with the run's filter."""
        return self.centre.preprocessing

    def features(self, transform: Transform | None = None) -> Tensor:
        """Features before the projection of every training picture, in order.

        Args:
            transform: by default to the one deterministic view.

        Returns:
            [N, V] or [N, crops, V], on the CLIP's device.
        """
        return self._placed(self.reader.read(self.benchmark.train, transform or self.centre))

    def views(self, count: int) -> Tensor:
        """The same of ``count`` random views of each; of the deterministic one where none is drawn.

        Returns:
            [N, views, V], on the CLIP's device.
        """
        if self.random is None:
            return self.features()[:, None]
        pictures = self.benchmark.train
        return self._placed(self.reader.read_views(pictures, self.random, self.seed, count))

    def view(self, number: int) -> Tensor:
        """One of :meth:`views`, from 0, for whoever needs one at a time: [N, V], likewise."""
        if self.random is None:
            return self.features()
        pictures = self.benchmark.train
        return self._placed(self.reader.read_view(pictures, self.random, self.seed, number))

    def validation(self) -> tuple[Tensor, Tensor]:
        """Features [M, V] of the validation pictures, of one view, and labels int64 [M].

        For methods that say so by :attr:`MethodSettings.uses_validation`.

        Raises:
            InputError: there is none.
        """
        pictures = self.benchmark.val
        if not len(pictures):
            raise InputError(
                f"--data {self.benchmark.name}: has no validation picture to choose settings on"
            )
        features = self._placed(self.reader.read(pictures, self.centre))
        return features, torch.from_numpy(pictures.labels.copy()).to(features.device)

    def batches(self, features: Tensor, views: Views = "in turn") -> FeatureBatches:
        """Training batches of features [N, views, ...]."""
        return FeatureBatches(
            features, self.labels, self.batch, seed=self.seed, sampler=self.sampler, views=views
        )

    def _placed(self, features: Tensor) -> Tensor:
        return features.to(next(self.reader.clip.parameters()).device)
