"""What a method is built from: its settings, their published values, and the run around it."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lamp_fast.clip import Trimming
from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds, flag_of, format_layers


@dataclass(frozen=True)
class MethodSettings:
    """What a method alone reads: its flags, their defaults and bounds. Here there are none."""

    def check_together(self) -> None:
        """Refuse values that do not go together.

        Raises:
            InputError: naming the first such flag, its value and what was expected.
        """


def cut_layers(name: str, settings: MethodSettings, depth: int) -> tuple[int, ...]:
    """Layers of a setting as a CLIP has them: the published ones are cut to its depth.

    Args:
        name: of the setting, whose default is what was published.
        settings: of the method.
        depth: of the shallower tower.

    Raises:
        InputError: other layers than the published ones beyond the depth, or none left.
    """
    given = getattr(settings, name)
    layers = tuple(each for each in given if each <= depth)
    if not layers or (layers != given and given != getattr(type(settings), name)):
        raise InputError(
            f"{flag_of(name)} {format_layers(given)}: expected layers within 1..{depth}, the depth"
            " of the shallower tower"
        )
    return layers


@dataclass(frozen=True)
class SteppedSettings(MethodSettings):
    """Of a method whose published length is a number of optimiser steps for each shot."""

    steps_per_shot: Annotated[int, Bounds(1, 1_000_000)] = 500
    """With --epochs none: optimiser steps for each picture that a class has, in the mean over
    classes where they differ; rounded to whole epochs. A number of --epochs is taken instead."""

    def epochs(self, pictures: int, classes: int, batch: int) -> int:
        """Epochs of the published length, at least 1.

        Args:
            pictures, classes: trained.
            batch: pictures an optimiser step; a batch that is not full counts where it is the only
                one of an epoch.
        """
        steps = self.steps_per_shot * pictures / classes
        return max(1, round(steps / max(1, pictures // batch)))


# What methods of so many steps a shot share: AdamW along one cosine, step by step.
ADAMW_BY_STEPS = {
    "lr": 2e-4,
    "lr_end": 1e-6,
    "lr_per": "step",
    "weight_decay": 1e-2,
    "epochs": None,
    "batch": 32,
    "warmup_epochs": 0,
}


@dataclass(frozen=True)
class Preset:
    """Published values; what they leave out has its default.

    Attributes:
        optim: of the optimisation, by the names of its settings.
        own: of the method, by the names of its settings.
        by_data: further ones of the optimisation, by the name of a data set.
        by_shots: the same by pictures a class, for data sets without their own.
        views: of how pictures are cropped, by the names of its settings.
        own_by_data: further ones of the method, by the name of a data set.
    """

    optim: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    by_data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    by_shots: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    views: Mapping[str, Any] = field(default_factory=dict)
    own_by_data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def optim_for(self, data: str, shots: int | None) -> dict[str, Any]:
        """Those of the optimisation for a data set and pictures a class."""
        changes = self.by_data.get(data) or self.by_shots.get(shots, {})
        return {**self.optim, **changes}

    def own_for(self, data: str) -> dict[str, Any]:
        """Those of the method for a data set."""
        return {**self.own, **self.own_by_data.get(data, {})}


def sgd(lr: float, epochs: int, batch: int, warmup_epochs: int = 1) -> dict[str, Any]:
    """The optimisation that most published code shares."""
    return {
        "optimiser": "sgd",
        "lr": lr,
        "epochs": epochs,
        "batch": batch,
        "warmup_epochs": warmup_epochs,
    }


@dataclass(frozen=True)
class RunClasses:
    """The class names of a run, which some methods hold parameters for.

    Attributes:
        base: the trained ones, in label order.
        new: those that are tested without being trained on; often none.
        counts: training pictures of each of the trained ones; empty where nothing asks for them.
    """

    base: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()

    def columns(self, names: Sequence[str]) -> list[int | None]:
        """Where each name stands among the trained ones, None where it does not.

        Classes may share a name (ImageNet has two "missile"): each name asked for is another one.
        The new ones as a whole are none of the trained ones, whatever they are called.
        """
        if tuple(names) == self.new:
            return [None] * len(names)
        free: dict[str, deque[int]] = defaultdict(deque)
        for column, name in enumerate(self.base):
            free[name].append(column)
        return [free[name].popleft() if free[name] else None for name in names]

    def placed(self, names: Sequence[str]) -> tuple[list[int], list[int]]:
        """Of the trained ones among some names, where they stand in ``names``, and where among the
        trained ones."""
        both = [each for each in enumerate(self.columns(names)) if each[1] is not None]
        return [asked for asked, _ in both], [column for _, column in both]

    def trained_columns(self, names: Sequence[str], reason: str) -> list[int]:
        """The same of names that must all be trained ones.

        Args:
            names: asked for.
            reason: why others have no score.

        Raises:
            InputError: a name that was not trained.
        """
        columns = self.columns(names)
        for name, column in zip(names, columns, strict=True):
            if column is None:
                raise InputError(f"classes: {name!r} was not trained: {reason}")
        return columns


@dataclass(frozen=True)
class Surroundings:
    """What a method may know, when it is built, of the run beside its own settings.

    Attributes:
        classes: of the run.
        trimming: what is left out of the text side.
        path: "literal" asks for the equations as they are written, where there is such a path.
        epochs: how many the run trains; None where only its data would tell.
        tau: of the logit adjustment.
    """

    classes: RunClasses = field(default_factory=RunClasses)
    trimming: Trimming = field(default_factory=Trimming)
    path: Literal["exact", "literal"] = "exact"
    epochs: int | None = 50
    tau: float = 1.0
