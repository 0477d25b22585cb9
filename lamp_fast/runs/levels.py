"""Answers at levels above the classes: probabilities of a parent are the sum of its classes'."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lamp_fast.data.hierarchy import Level


def roll_up(probabilities: Tensor, level: Level) -> Tensor:
    """Probabilities of parents: [B, C] of the classes to [B, K]."""
    parent = torch.from_numpy(level.parent).to(probabilities.device)
    total = probabilities.new_zeros(len(probabilities), len(level.names))
    return total.index_add_(1, parent, probabilities)


def predict_levels(logits: Tensor, levels: Sequence[Level]) -> Tensor:
    """The likeliest class of each picture, and its likeliest parent at each level.

    A parent whose classes share the probability is ahead of one class that has the most of it, so
    the parent of the likeliest class may be another.

    Args:
        logits: [B, C].
        levels: of the C classes.

    Returns:
        int64 [B, 1 + levels], of equal ones the first.
    """
    answers = [logits.argmax(1)]
    if levels:
        probabilities = logits.double().softmax(1)
        answers += [roll_up(probabilities, level).argmax(1) for level in levels]
    return torch.stack(answers, dim=1)


def level_accuracies(
    levels: Sequence[Level], labels: np.ndarray, predicted: np.ndarray
) -> dict[str, float]:
    """Accuracy by the title of each level.

    Args:
        levels: of the classes.
        labels: int64 [N], the true classes.
        predicted: int64 [N, levels], parents.
    """
    return {
        level.title: float((level.parent[labels] == predicted[:, column]).mean())
        for column, level in enumerate(levels)
    }
