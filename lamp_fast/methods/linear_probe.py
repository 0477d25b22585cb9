"""Logistic regression on frozen image features, by scikit-learn: what one tries first."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from lamp_fast import cli
from lamp_fast.clip.towers import FrozenClip, at_least_float32
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.errors import InputError
from lamp_fast.methods.base import Method
from lamp_fast.methods.settings.linear_probe import LINEAR_PROBE, LinearProbeSettings
from lamp_fast.methods.surroundings import RunClasses, Surroundings
from lamp_fast.methods.training_set import TrainingSet

if TYPE_CHECKING:
    # Imported where it is used: it takes a second, and most commands fit no probe.
    from sklearn.linear_model import LogisticRegression

MAX_ITERATIONS = 1000
# CoOp's search, in log10 C: what it begins with, how far around the best it goes on, in how many
# halvings.
GRID, REACH, HALVINGS = (6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0), 1.0, 8
# Each halving brings one new C, the first two; the middle of the second is the grid's best.
FITS = len(GRID) + HALVINGS
# A product of fewer multiplications is left to one thread: on a busy machine several would wait for
# each other longer than it takes.
THREADED = 10**8


class LinearProbe(Method):
    """Scores are W f + b, with f the features of the test transform as they are.

    W [C, D] and b [C] minimise sum_i w_i CE(W f_i + b, y_i) + |W|^2 / (2 C): scikit-learn's
    ``LogisticRegression`` (lbfgs, at most 1,000 iterations, in float64), with w_i = 1 or
    N / (number of classes * n_c). Of two classes it learns one vector w, their difference: its
    rows here are -w / 2 and w / 2, which give the same probabilities.

    C is chosen as in CoOp's public probe, see :func:`search`, on the run's validation pictures.

    Args:
        clip: the frozen CLIP.
        config: features, class weights, C.
        classes: of the run; the trained ones have a row.

    Raises:
        InputError: a single class.
    """

    entry = LINEAR_PROBE
    reads_features = True

    weight: Tensor
    bias: Tensor
    c: Tensor

    def __init__(self, clip: FrozenClip, config: LinearProbeSettings, classes: RunClasses) -> None:
        super().__init__(clip)
        if len(classes.base) == 1:
            raise InputError(
                f"--method linear-probe: {classes.base[0]!r} is the only trained class, expected"
                " at least 2"
            )
        self.config, self.classes = config, classes
        width, joint = clip.vision.visual.proj.shape
        features = joint if config.probe_features == "projected" else width
        self.register_buffer("weight", torch.zeros(len(classes.base), features))
        self.register_buffer("bias", torch.zeros(len(classes.base)))
        self.match_clip()
        # The C that was used; 0 before.
        self.register_buffer("c", torch.zeros((), dtype=torch.float64, device=self.bias.device))

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: LinearProbeSettings, surroundings: Surroundings
    ) -> "LinearProbe":
        return cls(clip, settings, surroundings.classes)

    def implied_prior(self, counts: np.ndarray) -> np.ndarray:
        """Those of training, unless the fit has weighed classes alike."""
        return counts if self.config.probe_class_weight == "none" else np.ones(len(counts))

    def trainable_parameters(self) -> int:
        """Those of scikit-learn's model, in a row for every class."""
        return self.weight.numel() + self.bias.numel()

    @torch.no_grad()
    def read_training_set(self, training: TrainingSet) -> None:
        """Choose C and fit; says which C it is, and how good on the validation pictures."""
        if self.config.probe_c is None and not len(training.benchmark.val):
            raise InputError(
                f"--probe-c none: --data {training.benchmark.name} has no validation picture to"
                " choose C on, expected a number"
            )
        balanced = self.config.probe_class_weight == "balanced"
        features = self._features(training.features())
        fits = _Fits(_array(features), training.labels.numpy(), balanced)
        held_out = None
        if self.config.probe_c is None:
            pictures, theirs = training.validation()
            held_out = _array(self._features(pictures)), theirs.cpu().numpy()
        large = features.numel() * len(self.bias) >= THREADED
        with threadpool_limits(torch.get_num_threads() if large else 1, "blas"):
            if held_out is not None:
                with tqdm(None, "fitting probes", FITS, leave=False, disable=None) as bar:
                    exponent, best = search(fits.scoring(*held_out, bar))
                c = 10.0**exponent
                by = "mean class accuracy" if balanced else "accuracy"
                how = f", by {by} {100 * best:.2f}% on {len(theirs):,} validation pictures"
            else:
                c, how = self.config.probe_c, ", as given"
            model = fits.made(c)
        cli.say(f"probe   C = {c:.6g}{how}")
        fits.warn()
        weight, bias = (torch.from_numpy(each) for each in (model.coef_, model.intercept_))
        if len(bias) == 1:
            weight, bias = (torch.cat([-each, each]) / 2 for each in (weight, bias))
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.c.fill_(c)

    def prepare(self, names: Sequence[str], template: str, origin: Origin = NOWHERE) -> Tensor:
        """Rows of the names, int64 [C].

        Raises:
            InputError: a name that was not trained.
        """
        columns = self.classes.trained_columns(names, self.entry.no_new_names)
        return torch.tensor(columns, device=self.weight.device)

    @torch.no_grad()
    def feature_logits(self, features: Tensor, classes: Tensor, adapted: bool = False) -> Tensor:
        rows = self._features(features).to(self.weight.dtype)
        return torch.addmm(self.bias[classes], rows, self.weight[classes].T)

    def _features(self, unprojected: Tensor) -> Tensor:
        if self.config.probe_features == "projected":
            return self.clip.vision.project(unprojected)
        return at_least_float32(unprojected)


class _Fits:
    """scikit-learn's fits to one training set, each from zero and made once.

    Float64, as scikit-learn long cast by itself. Starting from the fit of another C would save
    steps and end elsewhere: where C is large, lbfgs stops long before the minimum.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray, balanced: bool) -> None:
        self.features, self.labels, self.balanced = features, labels, balanced
        self.models: dict[float, LogisticRegression] = {}
        self.unfinished: list[float] = []

    def made(self, c: float) -> "LogisticRegression":
        """The one of a C."""
        if c not in self.models:
            self.models[c] = self._fit(c)
        return self.models[c]

    def scoring(
        self, features: np.ndarray, labels: np.ndarray, bar: tqdm
    ) -> Callable[[float], float]:
        """By log10 C the accuracy on held-out pictures; of the classes' accuracies there the mean,
        where classes are balanced."""
        from sklearn.metrics import accuracy_score, recall_score

        score = accuracy_score
        if self.balanced:
            score = functools.partial(recall_score, average="macro", labels=np.unique(labels))

        def scored(exponent: float) -> float:
            predicted = self.made(10.0**exponent).predict(features)
            bar.update(len(self.models) - bar.n)
            return float(score(labels, predicted))

        return scored

    def warn(self) -> None:
        """Say in one line which of the fits ended before they had converged, if any."""
        if self.unfinished:
            which = ", ".join(f"{c:.3g}" for c in self.unfinished)
            warnings.warn(
                f"linear probe: {len(self.unfinished)} of {len(self.models)} fits had not converged"
                f" when lbfgs stopped, within {MAX_ITERATIONS:,} iterations (C = {which})",
                stacklevel=2,
            )

    def _fit(self, c: float) -> "LogisticRegression":
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        weight = "balanced" if self.balanced else None
        model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS, class_weight=weight)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(self.features, self.labels)
        for each in caught:
            if issubclass(each.category, ConvergenceWarning):
                self.unfinished.append(c)
            else:
                warnings.warn(each.message, stacklevel=2)
        return model


def search(score: Callable[[float], float]) -> tuple[float, float]:
    """The log10 C that CoOp's search ends with, and its score.

    First the best of 6, 4, ... -6, of equals the largest. Then both ends of the range of one around
    it are scored eight times; the worse one moves to the middle, of equals the upper one. What the
    last step prefers is the answer, which need not be the best that was seen.

    Args:
        score: of log10 C, the larger the better; asked again for what it was asked before.
    """
    best = max(GRID, key=score)
    low, high = best - REACH, best + REACH
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if score(low) < score(high):
            best, low = high, middle
        else:
            best, high = low, middle
    return best, score(best)


def _array(features: Tensor) -> np.ndarray:
    return features.double().cpu().numpy()
