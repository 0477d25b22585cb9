"""Whether a run holds a validation part, and what it chooses on it."""

from dataclasses import dataclass, replace
from typing import Literal

from lamp_fast.data.entries import OWN_DATA


@dataclass(frozen=True)
class SelectionConfig:
    """What is chosen on the validation pictures of the trained classes."""

    validation: Literal["auto", "on", "off"] = "auto"
    """on: also take the validation pictures, whose scores the run keeps (validation.safetensors);
    of data without any a fifth of every class is taken out of its training pictures. off: only
    where the method chooses its own settings on them. auto: on for own pictures, else off."""

    def resolved(self, data: str) -> "SelectionConfig":
        """The same with the defaults of a data set, by its name, filled in."""
        if self.validation != "auto":
            return self
        return replace(self, validation="on" if data in OWN_DATA else "off")

    @property
    def uses_validation(self) -> bool:
        """Whether the run asks for validation pictures, of a resolved selection."""
        return self.validation == "on"


# Until 0.3.0 nothing but a method asked for validation pictures.
BEFORE = {"validation": "off"}
