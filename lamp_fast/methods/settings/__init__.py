"""What is known of a method without its model: settings, published values, what it refuses.

A module a method, none of which imports torch: flags are read and refused before it is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

from lamp_fast.data.settings import DataConfig
from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds, flag_of, format_layers

if TYPE_CHECKING:
    from lamp_fast.methods.base import Method


@dataclass(frozen=True)
class MethodSettings:
    """What a method alone reads: its flags, their defaults and bounds. Here there are none."""

    def check_together(self) -> None:
        """Refuse values that do not go together.

        Raises:
            InputError: naming the first such flag, its value and what was expected.
        """

    @property
    def uses_validation(self) -> bool:
        """Whether anything is chosen on the validation pictures."""
        return False


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


@dataclass(frozen=True)
class MethodEntry:
    """A method as :data:`lamp_fast.methods.METHODS` lists it.

    Attributes:
        model: module and class below ``lamp_fast.methods``, a
            :class:`lamp_fast.methods.base.Method` whose ``entry`` is this one.
        title: its name in tables.
        Settings: a frozen dataclass; its fields are the method's flags.
        presets: published values by the name that ``--preset`` takes, see :meth:`default_preset`.
        own_prompt: its class prompt is its own on every data set, so that ``--template`` is
            refused.
        no_ensemble: why several texts a class are refused; None where the mean of their features is
            taken.
        no_as_published: why ``--as-published`` is refused; None where it is not.
        own_loss: why every ``--loss`` but ce is refused, and class weights; None where they are
            not.
        no_new_names: why names that were not trained have no score; None where they have one.
        no_selection: why ``--select best`` is refused; None where it is not.
    """

    model: str
    title: str
    Settings: type[MethodSettings] = MethodSettings
    presets: Mapping[str, Preset] = field(default_factory=dict)
    own_prompt: bool = False
    no_ensemble: str | None = "it learns inside the text tower, which reads one text a class"
    no_as_published: str | None = None
    own_loss: str | None = None
    no_new_names: str | None = None
    no_selection: str | None = None

    def load(self) -> "type[Method]":
        """The class of the model; the first call imports its module."""
        module, _, name = self.model.rpartition(".")
        return getattr(import_module(f"lamp_fast.methods.{module}"), name)

    def default_preset(self, name: str, clip: str, data: DataConfig) -> str | None:
        """The preset that a run takes unasked; None for the defaults of every setting.

        A method's presets are NAME for base-to-new and, where they are there, NAME-all for training
        on every class and NAME-source for every class of ImageNet, to be tested on other data.
        Few-shot learning on ImageNet is the former.

        Args:
            name: of the method.
            clip: the CLIP's name.
            data: resolved.
        """
        names = [name]
        if data.split == "all":
            names.insert(0, f"{name}-all")
            if data.data == "imagenet":
                names.insert(0 if data.shots is None else 1, f"{name}-source")
        return next((each for each in names if each in self.presets), None)


def sgd(lr: float, epochs: int, batch: int, warmup_epochs: int = 1) -> dict[str, Any]:
    """The optimisation that most published code shares."""
    return {
        "optimiser": "sgd",
        "lr": lr,
        "epochs": epochs,
        "batch": batch,
        "warmup_epochs": warmup_epochs,
    }
