"""What is said of one picture, and how a line of text, of CSV and of JSON says it."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lamp_fast.data.hierarchy import CLASS
from lamp_fast.errors import InputError
from lamp_fast.files import path_text

if TYPE_CHECKING:
    from lamp_fast.answers.rules import Answered

Bias = Literal["trained", "adapted", "none"]


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one picture, best first.

    Attributes:
        names: class names; of equal scores the one given first comes first.
        probabilities: of each, over all classes that were asked for: calibrated where they can be,
            else softmax of the scores as they are.
        trained: whether each was among the trained classes.
        bias: what prompts were retrieved with, see :meth:`lamp_fast.Classifier.bias_for`.
        level: of the names: "class", or a level above, where probabilities are sums over classes
            and trained is what any of these was.
        raw_probabilities: softmax of the scores as they are.
        calibrated: whether ``probabilities`` are.
        score: how sure the answer is, by what was asked for; None where nothing is to be refused.
        rejected: whether it is "none of these": the score is below the threshold, and ``names[0]``
            is what would have been the answer.
        prediction_set: the names that remain at the coverage that was asked for, best first,
            perhaps none; None where no coverage was.
    """

    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    trained: tuple[bool, ...]
    bias: Bias
    level: str = CLASS
    raw_probabilities: tuple[float, ...] = ()
    calibrated: bool = False
    score: float | None = None
    rejected: bool = False
    prediction_set: tuple[str, ...] | None = None


def predictions(
    answered: "Answered",
    names: Sequence[str],
    trained: Sequence[bool],
    bias: Bias,
    top: int,
    level: str = CLASS,
) -> Iterator[Prediction]:
    """Put what is said of some pictures in words.

    Args:
        answered: of n pictures over C classes.
        names, trained: of the classes, [C].
        bias: what prompts were retrieved with.
        top: how many classes a picture.
        level: of the names.
    """
    refused, best = answered.refused, answered.order[:, :top]
    remaining = [None] * len(best)
    if answered.sets is not None:
        order, within = answered.order.cpu(), answered.sets.gather(1, answered.order).cpu()
        remaining = [
            tuple(names[each] for each in classes[some].tolist())
            for classes, some in zip(order, within, strict=True)
        ]
    rows = zip(
        best.tolist(),
        answered.probabilities.gather(1, best).tolist(),
        answered.raw.gather(1, best).tolist(),
        answered.calibrated.tolist(),
        answered.score.tolist(),
        strict=True,
    )
    for index, (classes, likely, raw, calibrated, score) in enumerate(rows):
        yield Prediction(
            names=tuple(names[each] for each in classes),
            probabilities=tuple(likely),
            trained=tuple(trained[each] for each in classes),
            bias=bias,
            level=level,
            raw_probabilities=tuple(raw),
            calibrated=calibrated,
            score=None if refused is None else score,
            rejected=refused is not None and bool(refused[index]),
            prediction_set=remaining[index],
        )


@dataclass(frozen=True)
class Columns:
    """What rows tell: the level of the names, and what was asked for beside them."""

    level: str = CLASS
    rejects: bool = False
    sets: bool = False

    @property
    def header(self) -> tuple[str, ...]:
        """Of the CSV."""
        names = ("file", "rank", self.level, "probability", "trained", "raw", "calibrated")
        return (
            *names,
            *(("score", "rejected") if self.rejects else ()),
            *(("set",) if self.sets else ()),
        )

    def csv_rows(
        self, shown: Callable[[str], str], picture: Path, outcome: Prediction | InputError
    ) -> str:
        """A line a class; nothing of a picture that could not be read.

        Args:
            shown: what makes names fit the output.
            picture: its file.
            outcome: what became of it.
        """
        if isinstance(outcome, InputError):
            return ""
        after = [_word(outcome.calibrated)]
        if self.rejects:
            after += [f"{outcome.score:.6g}", _word(outcome.rejected)]
        if self.sets:
            after.append(json.dumps([shown(name) for name in outcome.prediction_set]))
        return csv_text(
            [shown(path_text(picture)), rank, shown(name), f"{likely:.6g}", _word(trained),
             f"{raw:.6g}", *after]
            for rank, (name, likely, trained, raw) in enumerate(_classes(outcome), start=1)
        )  # fmt: skip

    def json_line(self, picture: Path, outcome: Prediction | InputError) -> str:
        """:meth:`json_row` as a line."""
        return json.dumps(self.json_row(path_text(picture), outcome)) + "\n"

    def json_row(self, file: str, outcome: Prediction | InputError) -> dict[str, Any]:
        """An object; of a picture that could not be read, with the reason."""
        found: dict[str, Any] = {"file": file}
        if isinstance(outcome, InputError):
            return {**found, "reason": str(outcome)}
        found["calibrated"] = outcome.calibrated
        if self.rejects:
            found |= {"score": outcome.score, "rejected": outcome.rejected}
        if self.sets:
            found["set"] = list(outcome.prediction_set)
        found["predictions"] = [
            {outcome.level: name, "probability": likely, "raw": raw, "trained": trained}
            for name, likely, trained, raw in _classes(outcome)
        ]
        return found

    def line(self, picture: Path, outcome: Prediction) -> str:
        """For people."""
        told = ", ".join(
            f"{name} {100 * likely:.2f}%{'' if trained else ' (not trained)'}"
            for name, likely, trained, _ in _classes(outcome)
        )
        if outcome.rejected:
            told = f"none of these (score {outcome.score:.4g}); the best would be {told}"
        if self.sets:
            held = outcome.prediction_set
            told += f"; set of {len(held)}{': ' if held else ''}{', '.join(held)}"
        return f"{path_text(picture)}: {told}"


def _classes(outcome: Prediction) -> Iterable[tuple[str, float, bool, float]]:
    return zip(
        outcome.names,
        outcome.probabilities,
        outcome.trained,
        outcome.raw_probabilities,
        strict=True,
    )


def _word(value: bool) -> str:
    return str(value).lower()


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as lines of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
