"""What a LAMP forward pass takes and gives, whichever path computes it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamp_fast.clip import ClassTokens, TokenForest


@dataclass(frozen=True)
class LampClasses:
    """Class prompts prepared for LAMP.

    Attributes:
        tokens: the tokenised prompts.
        forests: the same as prefix trees, at most so many rows each.
        states: per forest [T, Dt], its rows as they enter layer ``first_layer``.
        first_layer: the text layer, from 1, that a pass begins with. Rows below the first selected
            layer have seen no prompt and never change.
        bot: per text layer, keys and values [1, H, d] of the bot token.
        order: int64 [C], where each class stands among the forests' classes.
    """

    tokens: ClassTokens
    forests: tuple[TokenForest, ...]
    states: tuple[Tensor, ...]
    first_layer: int
    bot: list[tuple[Tensor, Tensor]]
    order: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


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
