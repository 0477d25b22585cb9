"""Scores on the validation pictures of the trained classes, made as those on test pictures are."""

import torch
from torch import Tensor

from lamp_fast.errors import InputError
from lamp_fast.methods.base import Method
from lamp_fast.runs.experiment import Experiment
from lamp_fast.runs.ranks import ALONE, Ranks
from lamp_fast.runs.scoring import Scorer


def validation_logits(
    experiment: Experiment, method: Method, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor]:
    """Class scores of every validation picture of the trained classes, in order.

    Args:
        experiment: whose benchmark has validation pictures, see
            :func:`lamp_fast.runs.experiment.uses_validation`.
        method: that scores; the run's, or zero-shot CLIP.
        ranks: the processes that share the pictures; every one gets all scores.

    Returns:
        Logits float32 [n, C] over the trained classes in label order, and labels int64 [n], on the
        CPU.

    Raises:
        InputError: there is no validation picture, or scores are not finite.
    """
    benchmark = experiment.benchmark
    pictures, names = benchmark.val, benchmark.base_names
    if not len(pictures):
        raise InputError(f"--data {benchmark.name}: this run holds no validation picture")
    scorer = Scorer(experiment, method, names, pictures, ranks)
    own = [torch.empty(0, len(names)), *(each.float().cpu() for each in scorer.logits())]
    logits = torch.cat([torch.from_numpy(each) for each in ranks.gather(torch.cat(own).numpy())])
    return logits, torch.from_numpy(pictures.labels.copy())
