"""What a user has classes called by: several templates, and descriptions of each class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lamp_fast.data.templates import SETS
from lamp_fast.errors import InputError


@dataclass(frozen=True)
class Words:
    """Several texts a class, of whose features methods take the mean.

    Attributes:
        templates: at least one, each with {} for the name.
        descriptions: texts that a class has in place of the templates, by its name as
            :func:`plain_name` writes it; each with {} for the name, or without.
    """

    templates: tuple[str, ...]
    descriptions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def texts(self, name: str) -> tuple[str, ...]:
        """Every text of a class, at least one."""
        given = self.descriptions.get(plain_name(name), self.templates)
        return tuple(text.replace("{}", name) for text in given)

    def undescribed(self, names: Sequence[str]) -> list[str]:
        """Those of some classes that have no description, where others have."""
        if not self.descriptions:
            return []
        return [name for name in names if plain_name(name) not in self.descriptions]

    def describe(self, names: Sequence[str]) -> str:
        """What some classes are called, on one line, and which have no description of their own."""
        without = self.undescribed(names)
        told = f"; {len(without)} without a description, first {without[0]!r}" if without else ""
        return f"{self}{told}"

    def __str__(self) -> str:
        shown = f'"{self.templates[0]}"'
        if len(self.templates) > 1:
            shown += f" and {len(self.templates) - 1} more templates"
        if self.descriptions:
            count = sum(map(len, self.descriptions.values()))
            shown = f"{count:,} descriptions of {len(self.descriptions):,} classes, else {shown}"
        return shown


def plain_name(name: str) -> str:
    """A class name as files that describe it may write it: red_fox is red fox."""
    return name.replace("_", " ").strip()


def check_templates(given: Sequence[str]) -> None:
    """Refuse words of ``--template`` that no templates could be meant by; no file is read.

    Raises:
        InputError: what is neither a template, nor a set's name, nor a ``.txt`` file's.
    """
    for word in given:
        if word not in SETS and not word.endswith(".txt"):
            check_template(word, "--template ")


def check_template(text: str, where: str) -> None:
    """Refuse a template without {}, or with several.

    Raises:
        InputError: beginning with ``where``.
    """
    if text.count("{}") != 1:
        known = ", ".join(SETS)
        others = "" if ": " in where else f"; or one of {known}, or a .txt file of templates"
        raise InputError(f"{where}{text!r}: expected {{}} once, for the class name{others}")


def saved_words(values: Any, where: str) -> Words | None:
    """Words as a run's record holds them: :class:`Words` as JSON, or None.

    Raises:
        InputError: anything else.
    """
    if values is None:
        return None
    try:
        templates, descriptions = tuple(values["templates"]), dict(values["descriptions"])
        described = {name: tuple(texts) for name, texts in descriptions.items()}
        every = [*templates, *(text for texts in described.values() for text in texts)]
        whole = all(isinstance(text, str) and text.strip() for text in every)
        whole = whole and templates and all(described.values())
        whole = whole and all(text.count("{}") == 1 for text in templates)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InputError(f"{where}: expected templates with {{}} once, and texts by class")
    return Words(templates, described)
