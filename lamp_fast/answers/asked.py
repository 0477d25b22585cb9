"""What can be asked of answers, checked before anything is loaded."""

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, get_args

from lamp_fast.errors import InputError

Score = Literal["probability", "cosine", "energy"]
SCORES: tuple[Score, ...] = get_args(Score)

# Of the sets that a run's test pictures judge.
COVERAGE = 0.9


@dataclass(frozen=True)
class Asked:
    """What is asked of answers beside classes and probabilities.

    Attributes:
        reject: "5%", the share of pictures like those of validation that may be refused, or a score
            below which there is no answer, as a number or a word; None answers always.
        by: the score, one of :data:`SCORES`; None is "probability".
        coverage: how often a set of names is to hold the right one; None asks for no sets.

    Raises:
        InputError: what is neither a rate nor a score, a score that there is not, one without
            ``reject``, or a coverage that is not between 0 and 1.
    """

    reject: str | float | None = None
    by: Score | None = None
    coverage: float | None = None

    def __post_init__(self) -> None:
        if self.by is not None and self.by not in SCORES:
            raise InputError(f"reject_by {self.by!r}: expected one of {', '.join(SCORES)}")
        if self.by is not None and self.reject is None:
            raise InputError(f"reject_by {self.by}: expected reject with it")
        if self.reject is not None:
            self.rejection()
        if self.coverage is not None and not 0 < self.coverage < 1:
            raise InputError(f"coverage {self.coverage}: expected more than 0 and less than 1")

    def rejection(self) -> tuple[float | None, float | None]:
        """The rate, or else the score, that was given."""
        given = self.reject
        is_rate = isinstance(given, str) and given.strip().endswith("%")
        try:
            # A hundredth of the decimal number that was written, not of what it is rounded to.
            number = float(Decimal(given.strip()[:-1]) / 100) if is_rate else float(given)
        except (TypeError, ValueError, ArithmeticError):
            number = math.nan
        if not math.isfinite(number) or (is_rate and not 0 < number < 1):
            raise InputError(
                f"reject {given}: expected a rate of more than 0% and less than 100%, such as 5%,"
                " or a score, a number"
            )
        return (number, None) if is_rate else (None, number)
