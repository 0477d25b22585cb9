"""What a request asks, from its query parameters."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from lamp_fast.answers.asked import Asked, Score
from lamp_fast.errors import InputError
from lamp_fast.runs.class_numbers import read_numbers
from lamp_fast.runs.prior import Wanted


@dataclass(frozen=True)
class Question:
    """As of ``predict``; a prior of one's own is a JSON object, never a file.

    Attributes:
        top: how many classes a picture.
        level: above the classes; None answers with classes.
        prior: "uniform", "train" or the text of a JSON object; None leaves scores as they are.
        reject, reject_by, coverage: see :class:`lamp_fast.answers.asked.Asked`.
    """

    top: int = 5
    level: str | None = None
    prior: str | None = None
    reject: str | None = None
    reject_by: Score | None = None
    coverage: float | None = None

    @property
    def asked(self) -> Asked:
        """Of answers, beside classes and probabilities."""
        return Asked(self.reject, self.reject_by, self.coverage)

    @property
    def wanted_prior(self) -> Wanted | None:
        """What :attr:`prior` means."""
        if self.prior in (None, "uniform", "train"):
            return self.prior
        return read_numbers("prior", self.prior)

    def options(self) -> dict[str, Any]:
        """The keywords of :meth:`lamp_fast.Classifier.classify_each`."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return own | {"prior": self.wanted_prior}


def read_question(parameters: Iterable[tuple[str, str]]) -> Question:
    """The question of a query's parameters.

    Raises:
        InputError: one that is not known, is there twice or has no value of its kind.
    """
    known = [each.name for each in fields(Question)]
    values: dict[str, Any] = {}
    for name, text in parameters:
        if name not in known:
            raise InputError(f"parameter {name!r}: expected one of {', '.join(known)}")
        if name in values:
            raise InputError(f"parameter {name!r}: is there twice, expected once")
        values[name] = text
    for name, kind, words in (("top", int, "a whole number"), ("coverage", float, "a number")):
        if name in values:
            try:
                values[name] = kind(values[name])
            except ValueError:
                raise InputError(f"{name} {values[name]!r}: expected {words}") from None
    if values.get("prior") == "none":
        del values["prior"]
    prior = values.get("prior", "uniform")
    # What else would begin with no brace names a file, and no client names one of ours.
    if prior not in ("uniform", "train") and not prior.lstrip().startswith("{"):
        raise InputError(
            f"prior {prior!r}: expected uniform, train, none or a JSON object of shares"
        )
    question = Question(**values)
    # Both refuse what cannot be asked of any run.
    _ = question.asked, question.wanted_prior
    return question
