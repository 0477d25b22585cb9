"""Class prompts as a forest of tokens: what classes share is one node.

Under a causal mask a token's state depends on the tokens before it alone, so classes whose prompts
begin alike share those tokens' states. Rows are the nodes of a prefix tree, and a row sees its
ancestors and itself. That one mask stands for shared prefixes, for packing (branches do not see
each other) and for cutting behind eot (no node is there). bot is not a node: it sees only itself,
so its keys and values are constants of the CLIP (:class:`lamp_fast.clip.TextTower`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenForest:
    """The prefix tree of some classes' token sequences, without bot, in depth-first order.

    Attributes:
        token_ids: int64 [T], the token of each node.
        positions: int64 [T], its position in its sequence; bot has 0, so these start at 1.
        visible: bool [T, T], row i sees node j: j is i or an ancestor of i.
        owner: int64 [T], which of the forest's classes a node belongs to (the first that has it).
        eot: int64 [C], the node where each class ends.
        classes: int64 [C], which class of the whole set each one is.
    """

    token_ids: Tensor
    positions: Tensor
    visible: Tensor
    owner: Tensor
    eot: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    def to(self, device: torch.device) -> "TokenForest":
        return TokenForest(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def plant(
    sequences: Sequence[Sequence[int]], *, most_rows: int | None = None, share: bool = True
) -> list[TokenForest]:
    """Arrange token sequences (bot first, eot last, no padding) as forests.

    Args:
        sequences: the C classes' token ids.
        most_rows: start a new forest rather than exceed this many nodes (a class longer than that
            gets its own); None keeps all classes in one.
        share: merge common beginnings; off, every class is a branch of its own.
    """
    order = sorted(range(len(sequences)), key=lambda index: (list(sequences[index]), index))
    forests, grown = [], _Growing()
    for index in order:
        branch = list(sequences[index])[1:]
        if most_rows is not None and grown.eot and grown.rows_with(branch, share) > most_rows:
            forests.append(grown.finish())
            grown = _Growing()
        grown.add(index, branch, share)
    forests.append(grown.finish())
    return forests


class _Growing:
    """A forest under construction; ``path`` is the last branch, the only one that can be shared
    because sequences come sorted."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.ancestry: list[list[int]] = []
        self.owner: list[int] = []
        self.path: list[int] = []
        self.eot: list[int] = []
        self.classes: list[int] = []

    def rows_with(self, branch: list[int], share: bool) -> int:
        return len(self.tokens) + len(branch) - (self._common(branch) if share else 0)

    def add(self, index: int, branch: list[int], share: bool) -> None:
        path = self.path[: self._common(branch)] if share else []
        for token in branch[len(path) :]:
            node = len(self.tokens)
            self.tokens.append(token)
            self.positions.append(len(path) + 1)
            path.append(node)
            self.ancestry.append(list(path))
            self.owner.append(len(self.classes))
        self.path = path
        self.eot.append(path[-1])
        self.classes.append(index)

    def finish(self) -> TokenForest:
        rows = len(self.tokens)
        visible = torch.zeros(rows, rows, dtype=torch.bool)
        for row, seen in enumerate(self.ancestry):
            visible[row, seen] = True
        return TokenForest(
            torch.tensor(self.tokens),
            torch.tensor(self.positions),
            visible,
            torch.tensor(self.owner),
            torch.tensor(self.eot),
            torch.tensor(self.classes),
        )

    def _common(self, branch: list[int]) -> int:
        common = 0
        for node, token in zip(self.path, branch, strict=False):
            if self.tokens[node] != token:
                break
            common += 1
        return common
