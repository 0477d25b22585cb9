"""The methods of a comparison, in their order, with the settings that they are tried with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lamp_fast.compare.settings import CompareConfig
from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.methods import METHODS
from lamp_fast.methods.base import Method
from lamp_fast.runs.config import TrainConfig, change, default_config

Group = Literal["zero-shot", "over features", "training"]
GROUPS: tuple[Group, ...] = ("zero-shot", "over features", "training")
ZEROSHOT = "zeroshot"


@dataclass(frozen=True)
class Candidate:
    """A method, and what it is first tried with.

    Attributes:
        method: as ``--method`` names it.
        group: what kind of work it is.
        published: its settings, as they were published; None where these do not go together with
            what was asked for.
        refusal: why there are none.
    """

    method: str
    group: Group
    published: TrainConfig | None
    refusal: str | None = None

    @property
    def title(self) -> str:
        """As shown."""
        return METHODS[self.method].title or self.method


def group_of(method: str) -> Group:
    """What kind of work a method is: nothing to learn, something over features of the frozen tower
    that are computed once, or training through the towers."""
    if method == ZEROSHOT:
        return "zero-shot"
    kind = METHODS[method].load()
    over_features = kind.reads_features and kind.read_training_set is not Method.read_training_set
    return "over features" if over_features else "training"


def find_candidates(config: CompareConfig) -> list[Candidate]:
    """Every method that was asked for, group by group, in the order of the registry."""
    methods = dict.fromkeys(config.methods or METHODS)
    ordered = sorted(methods, key=lambda method: GROUPS.index(group_of(method)))
    return [_candidate(config, method) for method in ordered]


def _candidate(config: CompareConfig, method: str) -> Candidate:
    try:
        settings = published_settings(config, method)
    except InputError as error:
        return Candidate(method, group_of(method), None, str(error))
    return Candidate(method, group_of(method), settings)


def published_settings(config: CompareConfig, method: str) -> TrainConfig:
    """What a method was published with, on the pictures of a comparison.

    Raises:
        InputError: settings that do not go together.
    """
    data = config.pictures
    given = {
        "method": method,
        "data": data.data,
        "split": data.split,
        "clip": config.clip.clip,
        "shots": data.shots,
    }
    settings = replace(
        default_config(given),
        seed=config.seed,
        clip=config.clip.resolved(data.data),
        data=data,
        machine=config.machine,
    )
    # The same validation pictures for all, and of each method the epoch that these prefer.
    select = "best" if METHODS[method].no_selection is None else "last"
    settings = change(settings, {"selection.validation": "all", "selection.select": select})
    if config.epochs is not None:
        settings = change(settings, {"optim.epochs": config.epochs})
    validate(settings)
    return settings


def describe_changes(settings: TrainConfig, published: TrainConfig) -> str:
    """What of a method's settings is not as published, as flags; empty where all is."""
    words: Sequence[str] = [
        f"--{name.replace('_', '-')} {value}"
        if not isinstance(value, bool)
        else _switch(name, value)
        for group in ("own", "optim")
        for name, value in vars(getattr(settings, group)).items()
        if value != getattr(getattr(published, group), name)
    ]
    return " ".join(words)


def _switch(name: str, on: bool) -> str:
    return f"--{'' if on else 'no-'}{name.replace('_', '-')}"
