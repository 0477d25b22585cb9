"""Which epoch of a run is kept: the last one, or the best on validation pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from lamp_fast.data.entries import OWN_DATA, PUBLISHED_FORM
from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds, FloatOrNone, IntOrNone
from lamp_fast.methods.settings import MethodEntry

# In a line of the log, what is maximised; a line without it is no candidate.
SCORE = "val_score"


@dataclass(frozen=True)
class SelectionConfig:
    """What is chosen on the validation pictures of the trained classes."""

    select: Literal["auto", "last", "best"] = "auto"
    """The epoch that is kept. best: of highest macro-F1 on the validation pictures, of equals the
    first. last: the last one, as papers do. auto: best for own pictures (but lists), else last."""
    patience: Annotated[IntOrNone, Bounds(1, 1_000_000)] = None
    """Of --select best: stop after this many epochs without a better one; none trains them all."""
    validation: Literal["auto", "on", "all", "off"] = "auto"
    """on: also take the validation pictures, whose scores the run keeps (validation.safetensors);
    of data without any a fifth of every class is taken out of its training pictures. all: every
    one of them, however long scoring them after each epoch takes. off: only where the method
    chooses its own settings on them. auto: on for own pictures (but lists) and with --select best,
    else off."""
    holdout_classes: Annotated[FloatOrNone, Bounds(above=0, below=1)] = None
    """Of --select best with --split base-new: this share of the base classes is not trained and
    stands in for new ones; the epoch is the one of highest harmonic mean of the macro-F1 of those
    that are kept and of those. none keeps all, so that only trained classes count."""
    retrain: bool = False
    """Of --holdout-classes: then train all base classes, to the epoch that was chosen without."""

    def resolved(self, data: str, method: MethodEntry) -> "SelectionConfig":
        """The same with the defaults of a data set, by its name, and a method filled in."""
        select = self.select
        own = data in OWN_DATA and data not in PUBLISHED_FORM
        if select == "auto":
            asked = own and self.validation != "off" and method.no_selection is None
            select = "best" if asked else "last"
        validation = self.validation
        if validation == "auto":
            validation = "on" if own or select == "best" else "off"
        return replace(self, select=select, validation=validation)

    @property
    def uses_validation(self) -> bool:
        """Whether the run asks for validation pictures, of a resolved selection."""
        return self.validation in ("on", "all")

    @property
    def held_out(self) -> float | None:
        """The share of the base classes that is not trained."""
        return None if self.retrain else self.holdout_classes

    @property
    def searches(self) -> bool:
        """Whether epochs are compared, and not just counted up to one that is known."""
        return self.select == "best" and not self.retrain

    def check(self, method: MethodEntry, split: str) -> None:
        """Refuse what does not go together, of a resolved selection.

        Args:
            method: of the run.
            split: how the classes are divided.

        Raises:
            InputError: naming the first such flag, its value and what was expected.
        """
        best = self.select == "best"
        if best and method.no_selection is not None:
            raise InputError(f"--select best: {method.no_selection}; expected last")
        if best and self.validation == "off":
            raise InputError("--validation off: --select best chooses on validation pictures")
        for flag, given in (
            (f"--patience {self.patience}", self.patience is not None),
            (f"--holdout-classes {self.holdout_classes}", self.holdout_classes is not None),
        ):
            if given and not best:
                raise InputError(f"{flag}: expected --select best with it, not last")
        if self.holdout_classes is None:
            if self.retrain:
                raise InputError("--retrain: expected --holdout-classes with it")
            return
        flag = f"--holdout-classes {self.holdout_classes:g}"
        if split != "base-new":
            raise InputError(f"{flag}: expected --split base-new with it, not {split}")
        if method.no_new_names is not None:
            raise InputError(f"{flag}: {method.no_new_names}")


# Until 0.3.0 nothing but a method asked for validation pictures.
BEFORE = {"select": "last", "validation": "off"}


def selected_epoch(history: Sequence[Mapping[str, Any]]) -> int | None:
    """The epoch, from 1, of the highest score, of equals the first; None where none has one.

    Args:
        history: the lines of a run's log.
    """
    candidates = [line for line in history if SCORE in line]
    return max(candidates, key=lambda line: line[SCORE])["epoch"] if candidates else None


def is_exhausted(history: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether the last ``patience`` epochs brought nothing better."""
    best = selected_epoch(history)
    if best is None or patience is None:
        return False
    return history[-1]["epoch"] - best >= patience


def summary(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the results say of the choice, as JSON values; None where nothing was compared.

    Args:
        history: the lines of a run's log.

    Returns:
        "epoch" from 1, and of every candidate the "curve": its epoch and figures in 0..1.
    """
    epoch = selected_epoch(history)
    if epoch is None:
        return None
    curve = [
        {name: value for name, value in line.items() if name == "epoch" or is_figure(name)}
        for line in history
        if SCORE in line
    ]
    return {"epoch": epoch, "of": len(history), "curve": curve}


def is_figure(name: str) -> bool:
    """Whether a column of the log is a figure in 0..1 on validation pictures."""
    return name.startswith("val_") and name != "val_seconds"
