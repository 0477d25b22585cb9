"""What a LAMP forward pass takes and gives, whichever path computes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selections:
    """How many rows chose each pool entry; integers, so sums are exact.

    Attributes:
        image: int64 [layers, M] over ``image_rows`` pictures.
        text: int64 [layers, M] over ``text_rows`` classes, or None unless ``text_query=class``.
    """

    image: Tensor
    image_rows: int
    text: Tensor | None
    text_rows: int

    @classmethod
    def of(
        cls,
        image: Sequence[Tensor],
        image_rows: int,
        text: Sequence[Tensor],
        text_rows: int,
    ) -> "Selections | None":
        """Stack per-layer counts; None where no pool was asked."""
        if not image:
            return None
        return cls(
            torch.stack(list(image)),
            image_rows,
            torch.stack(list(text)) if text else None,
            text_rows if text else 0,
        )


def over_ranks(
    here: Selections | None, like: Tensor, sum_over_ranks: Callable[[Tensor], Any]
) -> Selections:
    """A step's selections on all ranks, in one sum of integers.

    Every rank with a row computed the same text, so its sum is divided by how many they are.

    Args:
        here: of this rank; None without a row.
        like: int64 [layers, M], where sums lie.
        sum_over_ranks: adds a tensor up in place.
    """
    mine = torch.zeros(2 * like.numel() + 3, dtype=torch.int64, device=like.device)
    image, text, facts = mine.split([like.numel(), like.numel(), 3])
    if here is not None:
        image.copy_(here.image.flatten())
        if here.text is not None:
            text.copy_(here.text.flatten())
        facts.copy_(torch.tensor([here.image_rows, here.text_rows, 1]))
    sum_over_ranks(mine)
    image_rows, text_rows, ranks = facts.tolist()
    return Selections(
        image.view_as(like),
        image_rows,
        text.view_as(like) // ranks if text_rows else None,
        text_rows // ranks,
    )


@dataclass(frozen=True)
class Forward:
    """Result of one pass over B pictures and C classes.

    Attributes:
        logits: [B, C].
        image_similarity: per selected layer [B, K], unbiased cosines of cls and chosen keys.
        text_similarity: the same of eot and chosen text keys, [C, K]; empty in ``image`` mode.
        selections: what was chosen; None without a pool.
    """

    logits: Tensor
    image_similarity: Sequence[Tensor]
    text_similarity: Sequence[Tensor]
    selections: Selections | None


def similarity_loss(similarity: Sequence[Tensor]) -> Tensor:
    """sum over layers of (1 - mean over rows and choices of the cosine), Eq. 11: a scalar.

    With text queries their layers count as well. 0 without a pool.
    """
    return sum((1 - each.mean() for each in similarity), torch.zeros(()))
