"""The one interface that training, evaluation and prediction know of a method."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lamp_fast.clip.features import unprojected_features
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.data.feature_batches import FeatureBatches
from lamp_fast.data.loading import Batches
from lamp_fast.fields import format_layers
from lamp_fast.methods.fixed import Fixable, Sides, fixed_copy
from lamp_fast.methods.settings import MethodEntry
from lamp_fast.methods.surroundings import Surroundings
from lamp_fast.methods.training_set import TrainingSet

Criterion = Callable[[Tensor, Tensor], Tensor]
# Adds a tensor up, in place, over the processes that train together.
SumOverRanks = Callable[[Tensor], Any]
Value = TypeVar("Value")


class Memo:
    """One value an owner, computed again when anything it depends on has changed.

    Every in-place change of a tensor raises its version: an optimiser's, a load's. A value lives as
    long as its owner. What is kept is replaced and never changed, so threads may ask at once; the
    worst of it is that two of them compute the same.
    """

    def __init__(self) -> None:
        self._of_owner = WeakIdKeyDictionary()

    def get(self, owner: Any, tensors: Iterable[Tensor], compute: Callable[[], Value]) -> Value:
        """The value of ``compute()`` for this very ``owner`` and these tensors as they are now."""
        versions = tuple((id(tensor), tensor._version) for tensor in tensors)
        kept = self._of_owner.get(owner)
        if kept is None or kept[0] != versions:
            kept = self._of_owner[owner] = versions, compute()
        return kept[1]

    def forget(self) -> None:
        """Compute the next ones anew."""
        self._of_owner = WeakIdKeyDictionary()


@dataclass(frozen=True)
class Step:
    """What one forward pass of a batch gives to training.

    Attributes:
        loss: scalar to differentiate, a mean over the batch's rows.
        logits: [B, C], for the training accuracy.
        terms: named scalars for the log, detached.
        observations: what the method wants back in :meth:`Method.after_step`, if anything.
    """

    loss: Tensor
    logits: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    observations: Any = None

    def detached(self) -> "Step":
        """The same numbers without the graph that made them."""
        return replace(self, loss=self.loss.detach(), logits=self.logits.detach())


class Method(Fixable):
    """A way to classify pictures by class names with a frozen CLIP.

    The frozen CLIP is held outside the module tree, so ``state_dict`` and ``parameters`` are the
    method's own. ``classes`` below is whatever :meth:`prepare` returned for a list of names.
    """

    def __init__(self, clip: FrozenClip) -> None:
        super().__init__()
        object.__setattr__(self, "clip", clip)
        self._kept = Memo()

    clip: FrozenClip

    block: int | None = None
    """How many (image, class) pairs are encoded at once; None takes all of a batch."""

    capturable: bool = False
    """Whether a step, and what follows it, neither waits for a value on the device nor, where
    fixed shapes are asked for, has shapes that depend on one: then it can be a CUDA graph."""

    entry: MethodEntry
    """What is known of it without its model: its title, what it refuses, and so on."""

    independent_names: bool = False
    """Whether a class's score does not depend on the other names that are asked for, so that the
    scores over some of the names are columns of those over all."""

    reads_features: bool = False
    """Whether a picture's features of the frozen tower are all that it looks at in testing."""

    has_bias: bool = False
    """Whether load balancing steers what it retrieves."""

    shares_routes: bool = False
    """Whether images that retrieved alike share work, so that shapes depend on values."""

    @property
    def first_changed_layer(self) -> int:
        """The image tower's first layer, from 1, that is not CLIP's own or has prompts; one behind
        the last where the whole tower is CLIP's.

        In training :meth:`step` is given pictures, or what of them enters this layer: those below
        may run for many batches at once (:func:`lamp_fast.clip.features.up_to_layer`).
        """
        return len(self.clip.vision.blocks) + 1 if self.reads_features else 1

    @classmethod
    def build(cls, clip: FrozenClip, settings: Any, surroundings: Surroundings) -> "Method":
        """A fresh one with the settings of a run.

        Args:
            clip: the frozen CLIP.
            settings: a :attr:`MethodEntry.Settings`.
            surroundings: what else of the run it may know.

        Raises:
            InputError: settings that this CLIP cannot serve.
        """
        return cls(clip, settings)

    def resolved(self, settings: Any) -> Any:
        """The settings with what depends on the CLIP filled in, as they are saved."""
        return settings

    def describe(self, settings: Any, optim: Mapping[str, Any]) -> str:
        """Its settings on one line, for the first lines of a run.

        Args:
            settings: a :attr:`MethodEntry.Settings`.
            optim: what is shown of the optimisation.
        """
        return " ".join(
            f"{name}={format_layers(value) if isinstance(value, tuple) else value}"
            for name, value in {**vars(settings), **optim}.items()
        )

    def choose_block(self, names: Sequence[str], template: str) -> int | None:
        """The :attr:`block` that the free memory of this machine allows; changes nothing.

        Args:
            names, template: the larger half's class names, and the prompt.

        Returns:
            None where no block is needed.
        """
        return None

    def read_training_set(self, training: TrainingSet) -> Batches | FeatureBatches | None:
        """Take what is needed of the training set, before the first step of a run, also a resumed
        one, whose state is loaded afterwards.

        Returns:
            What to train on in place of batches of pictures, if anything: :meth:`step` then gets
            their first tensor for ``images``.
        """
        return None

    def settle(self, training: TrainingSet) -> None:
        """Called once after the last epoch, for what is chosen when all is learned."""

    def templates(self, template: str, origin: Origin = NOWHERE) -> tuple[str, ...]:
        """Every template that :meth:`prepare` puts class names into, for the same arguments."""
        return (template,) if origin.words is None else origin.words.templates

    def prepare(self, names: Sequence[str], template: str, origin: Origin = NOWHERE) -> Any:
        """Tokenise class names and compute, once, what of them never changes.

        Args:
            names: of the classes.
            template: class prompt with {} for the name.
            origin: what the names are of.
        """
        raise NotImplementedError

    def step(self, images: Tensor, labels: Tensor, classes: Any, criterion: Criterion) -> Step:
        """Loss of a training batch.

        Args:
            images: [B, 3, S, S], or what of them enters :attr:`first_changed_layer`.
            labels: int64 [B].
            classes: of :meth:`prepare`.
            criterion: the mean loss of logits [B, C] and labels.
        """
        raise NotImplementedError

    def accumulate(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Any,
        criterion: Criterion,
        pieces: int,
        scale: Callable[[Tensor], Tensor],
        fixed_shapes: bool = False,
    ) -> list[Step]:
        """Gradients of a whole batch's mean loss, worked through in ``pieces``.

        Args:
            images, labels, classes, criterion: as in :meth:`step`.
            pieces: how many.
            scale: the loss scaler's.
            fixed_shapes: no shape may depend on a value; asked of :attr:`capturable` methods alone.

        Returns:
            The steps of the pieces, without a graph.
        """
        step = partial(self.step, classes=classes, criterion=criterion)
        return backward_in_pieces(step, images, labels, pieces, scale)

    def logits(self, images: Tensor, classes: Any, adapted: bool = False) -> Tensor:
        """Class scores [B, C] without gradient bookkeeping; memory bounded whatever C is.

        Threads may ask at once, for whatever class lists.

        Args:
            images: [B, 3, S, S].
            classes: of :meth:`prepare`.
            adapted: score with what :meth:`adapt` learned, where it learns something.
        """
        return self.feature_logits(unprojected_features(self.clip, images), classes, adapted)

    def feature_logits(self, features: Tensor, classes: Any, adapted: bool = False) -> Tensor:
        """The same of features before the projection [B, V], where they are all that it reads."""
        raise NotImplementedError

    def forget_text(self) -> None:
        """Drop what evaluation keeps of a class list."""
        self._kept.forget()

    def stages(self, epochs: int) -> tuple[int, ...]:
        """How the epochs of a run divide into stages, each with a rate curve of its own."""
        return (epochs,)

    def enter_stage(self, number: int, classes: Any, first_epoch: bool) -> None:
        """Called when a run comes to a stage, before :meth:`start_epoch`; also when a resumed run,
        whose state is loaded by then, goes on inside one.

        Parameters that want no gradient afterwards stay as they are, whatever the optimiser would
        do to them, and so does its state of them.

        Args:
            number: of the stage, from 0; those of no epoch are left out.
            classes: the trained ones, of :meth:`prepare`.
            first_epoch: false where the run goes on inside the stage.
        """

    def start_epoch(self) -> None:
        """Called before each epoch's first batch."""

    def after_step(
        self,
        observations: Sequence[Any],
        progress: Tensor,
        sum_over_ranks: SumOverRanks | None = None,
    ) -> None:
        """Called once after each applied optimiser step.

        Args:
            observations: ``Step.observations`` of every piece of this rank's part of the batch;
                empty where it has no row. Every rank is called.
            progress: steps applied before this one / planned total, in [0, 1); a float64 scalar on
                the device.
            sum_over_ranks: None in one process alone.
        """

    def epoch_log(self) -> dict[str, Any]:
        """JSON values about the epoch that just ended."""
        return {}

    def adapt(
        self, batches: Sequence[Any], classes: Any, sum_over_ranks: SumOverRanks | None = None
    ) -> dict[str, Any] | None:
        """Adapt to unlabelled pictures of new classes; None where the method has no such step.

        Args:
            batches: yields images as :meth:`step` gets them and can be iterated over again, once a
                pass. With several ranks they are this one's part of every batch, maybe no row.
            classes: of :meth:`prepare`.
            sum_over_ranks: None in one process alone.
        """
        return None

    @property
    def cosine_scale(self) -> float:
        """What its cosines are multiplied by to be logits."""
        return float(self.clip.logit_scale)

    def implied_prior(self, counts: np.ndarray) -> np.ndarray | None:
        """How large its logits take the trained classes to be, in any unit, [C]; of the training
        pictures int64 ``counts`` [C]. None where the run's loss decides that."""
        return None if self.entry.own_loss is None else np.ones(len(counts))

    def trainable_parameters(self) -> int:
        """How many numbers training changes."""
        return sum(each.numel() for each in self.parameters() if each.requires_grad)

    def match_clip(self) -> None:
        """Move the method's own tensors to the CLIP: float32, or float64 with a float64 CLIP."""
        self.to(next(self.clip.parameters()).device)
        if self.clip.dtype == torch.float64:
            self.double()

    def _apply(self, fn, recurse=True):
        self.forget_text()
        return super()._apply(fn, recurse)


def backward_in_pieces(
    step: Callable[[Tensor, Tensor], Step],
    images: Tensor,
    labels: Tensor,
    pieces: int,
    scale: Callable[[Tensor], Tensor],
) -> list[Step]:
    """Gradients of a batch's mean loss, a piece after the other; the steps without their graphs."""
    steps = []
    for some, their in zip(images.chunk(pieces), labels.chunk(pieces), strict=True):
        taken = step(some, their)
        share = len(their) / len(labels)
        scale(taken.loss if share == 1 else taken.loss * share).backward()
        steps.append(taken.detached())
    return steps


class TwoTowers(Method):
    """A method whose text features depend on the class alone (Eq. 3 with learned towers).

    Subclasses bring ``text_features`` and, where they learn in the image tower, ``image_features``;
    the loss is the criterion's, to which :meth:`regularisation` may add.

    Args:
        clip: the frozen CLIP.
        keep_text: in evaluation compute text features once for a class set, until a parameter
            changes.
    """

    no_class_matrix = None
    independent_names = True

    def __init__(self, clip: FrozenClip, *, keep_text: bool = True) -> None:
        super().__init__(clip)
        self.keep_text = keep_text

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.reads_features = cls.image_features is TwoTowers.image_features

    def text_features(self, classes: Any) -> Tensor:
        """[C, Ds], normalised."""
        raise NotImplementedError

    def image_features(self, images: Tensor) -> Tensor:
        """[B, Ds], normalised; of the frozen tower unless a method learns in it."""
        return frozen_image_features(self.clip, images)

    @torch.no_grad()
    def fixed_sides(self, clip: FrozenClip, classes: Any, adapted: bool = False) -> Sides:
        return Sides(fixed_copy(self, clip).image_features, self.text_features(classes))

    def regularisation(self, text: Tensor, classes: Any) -> dict[str, Tensor]:
        """Named, weighted scalars that are added to the criterion's loss."""
        return {}

    def step(self, images: Tensor, labels: Tensor, classes: Any, criterion: Criterion) -> Step:
        text = self.text_features(classes)
        logits = self._scores(self.image_features(images), text)
        cross_entropy = criterion(logits, labels)
        extra = self.regularisation(text, classes)
        loss = sum(extra.values(), cross_entropy)
        terms = {"cross_entropy": cross_entropy, **extra} if extra else {}
        return Step(loss, logits, {name: each.detach() for name, each in terms.items()})

    @torch.no_grad()
    def logits(self, images: Tensor, classes: Any, adapted: bool = False) -> Tensor:
        return self._scores(self.image_features(images), self._text(classes))

    @torch.no_grad()
    def feature_logits(self, features: Tensor, classes: Any, adapted: bool = False) -> Tensor:
        return self._scores(self.clip.vision.joint(features), self._text(classes))

    def _text(self, classes: Any) -> Tensor:
        compute = partial(self.text_features, classes)
        keep = self.keep_text
        return self._kept.get(classes, self.parameters(), compute) if keep else compute()

    def _scores(self, features: Tensor, text: Tensor) -> Tensor:
        return self.clip.logit_scale * features @ text.T


@torch.no_grad()
def plain_image_features(clip: FrozenClip, images: Tensor) -> Tensor:
    """CLIP's own image features [B, Ds], not normalised."""
    return clip.vision.project(unprojected_features(clip, images))


def frozen_image_features(clip: FrozenClip, images: Tensor) -> Tensor:
    """CLIP's own image features [B, Ds], normalised."""
    return clip.vision.joint(unprojected_features(clip, images))
