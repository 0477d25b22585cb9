"""Scores on the validation pictures of the trained classes, made as those on test pictures are."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lamp_fast.data.pictures import Pictures
from lamp_fast.errors import InputError
from lamp_fast.methods.base import Method
from lamp_fast.runs.experiment import Experiment
from lamp_fast.runs.metrics import confusion_matrix, harmonic_mean, shown_macro_f1
from lamp_fast.runs.ranks import ALONE, Ranks
from lamp_fast.runs.scorer import Scorer


def validation_logits(
    experiment: Experiment, method: Method, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor]:
    """Class scores of every validation picture of the trained classes, in order.

    Args:
        experiment: whose benchmark has validation pictures, see
            :func:`lamp_fast.runs.config.uses_validation`.
        method: that scores; the run's, or zero-shot CLIP.
        ranks: the processes that share the pictures; every one gets all scores.

    Returns:
        Logits float32 [n, C] over the trained classes in label order, and labels int64 [n], on the
        CPU.

    Raises:
        InputError: there is no validation picture, or scores are not finite.
    """
    benchmark = experiment.benchmark
    if not len(benchmark.val):
        raise InputError(f"--data {benchmark.name}: this run holds no validation picture")
    part = _Part(experiment, method, benchmark.base_names, benchmark.val, ranks)
    return part.logits(), torch.from_numpy(benchmark.val.labels.copy())


class Validation:
    """What a run's method makes of the validation pictures, epoch after epoch.

    Args:
        experiment: with validation pictures, and with those of the stand-ins where classes are held
            out.
        ranks: the processes that share the pictures; every one gets the same figures.

    Raises:
        InputError: there is no such picture.
    """

    def __init__(self, experiment: Experiment, ranks: Ranks = ALONE) -> None:
        benchmark, method = experiment.benchmark, experiment.method
        for names, pictures in (
            (benchmark.base_names, benchmark.val),
            (benchmark.stand_ins, benchmark.val_new),
        ):
            if names and not len(pictures):
                raise InputError(
                    f"--select best: --data {benchmark.name} has no validation picture of"
                    f" {names[0]!r} and the {len(names) - 1} classes beside it"
                )
        self.parts = {"": _Part(experiment, method, benchmark.base_names, benchmark.val, ranks)}
        if stand_ins := benchmark.stand_ins:
            part = _Part(experiment, method, stand_ins, benchmark.val_new, ranks)
            self.parts["_held_out"] = part

    def line(self) -> dict[str, Any]:
        """Columns of the log: macro-F1 over the classes that have pictures, accuracy, the score
        that epochs are compared by, and the seconds that all this took.

        Nothing that is drawn in training is drawn otherwise for it.
        """
        started = time.perf_counter()
        figures: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            for end, part in self.parts.items():
                confusion = part.confusion()
                figures[f"val_macro_f1{end}"] = shown_macro_f1(confusion)
                figures[f"val_accuracy{end}"] = float(confusion.trace() / confusion.sum())
        macro_f1 = [figures[f"val_macro_f1{end}"] for end in self.parts]
        figures["val_score"] = macro_f1[0] if len(macro_f1) == 1 else harmonic_mean(*macro_f1)
        return {**figures, "val_seconds": time.perf_counter() - started}

    def __len__(self) -> int:
        return sum(len(part.pictures) for part in self.parts.values())


class _Part:
    """Validation pictures and the names that they are scored over."""

    def __init__(
        self,
        experiment: Experiment,
        method: Method,
        names: Sequence[str],
        pictures: Pictures,
        ranks: Ranks,
    ) -> None:
        self.pictures, self.classes, self.ranks = pictures, len(names), ranks
        self.scorer = Scorer(experiment, method, names, pictures, ranks)

    def logits(self) -> Tensor:
        """float32 [n, C], on the CPU."""
        own = [torch.empty(0, self.classes), *(each.float().cpu() for each in self.scorer.logits())]
        gathered = self.ranks.gather(torch.cat(own).numpy())
        return torch.cat([torch.from_numpy(each) for each in gathered])

    def confusion(self) -> Any:
        """int64 [C, C], pictures by true and predicted class."""
        predicted = self.logits().argmax(1).numpy()
        return confusion_matrix(self.pictures.labels, predicted, self.classes)
