"""Class prompts: the tokens of names in a template, and forests of what classes share.

:func:`class_prompts` and :func:`whole_prompts` prepare a list of names once, for every method.

Under a causal mask a token's state depends on the tokens before it alone, so classes whose prompts
begin alike share those tokens' states. Rows of a :class:`TokenForest` are the nodes of a prefix
tree, and a row sees its ancestors and itself. That one mask stands for shared prefixes, for packing
(branches do not see each other) and for cutting behind eot (no node is there). bot is not a node:
it sees only itself, so its keys and values are constants of the CLIP
(:class:`lamp_fast.clip.towers.TextTower`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lamp_fast.clip import tiny
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.errors import InputError


@dataclass(frozen=True)
class ClassTokens:
    """The tokenised prompts of a list of classes.

    Attributes:
        names: the C class names.
        ids: token ids, int64 [C, context], [bot, template and name, eot, padding].
        eot: position of each eot, int64 [C].
    """

    names: tuple[str, ...]
    ids: Tensor
    eot: Tensor

    def __len__(self) -> int:
        return len(self.names)

    @property
    def trimmed_ids(self) -> Tensor:
        """ids cut after the last eot: under a causal mask nothing behind it is ever seen."""
        return self.ids[:, : int(self.eot.max()) + 1]


def tokenise(
    clip: FrozenClip, names: Sequence[str], template: str, *, quiet: bool = False
) -> ClassTokens:
    """Put each name into ``template`` and tokenise it with the CLIP's own tokenizer.

    Args:
        clip: whose tokenizer and eot rule; the ids land on its device.
        names: the class names, at least one.
        template: with ``{}`` where the name goes.
        quiet: do not warn of tokens that the tiny CLIP never saw, where names are only checked.

    Raises:
        InputError: no name, one that is not text, or a prompt longer than the context.
    """
    if not names:
        raise InputError("class names: got none, expected at least one")
    for name in names:
        if not _is_text(name):
            raise InputError(f"class names: {name!a} is not UTF-8, expected text")
    prompts = [template.replace("{}", name) for name in names]
    ids = clip.tokenizer(prompts)
    eot = clip.eot_positions(ids)
    context = ids.shape[1]
    for prompt, position in zip(prompts, eot.tolist(), strict=True):
        if position == context - 1 and _is_cut(clip, prompt, context):
            raise InputError(
                f"class prompt {prompt[:60]!r}: longer than {context} tokens, expected a shorter"
                " class name or template"
            )
    if not quiet and clip.identity is not None and clip.identity.name == "tiny":
        tiny.warn_unseen_tokens(ids)
    device = next(clip.parameters()).device
    return ClassTokens(tuple(names), ids.to(device), eot.to(device))


def same_tokens(tokens: ClassTokens) -> list[tuple[str, ...]]:
    """Groups of at least two names that no text tells apart: their token ids are the same.

    Case, spaces, the ways to write an accent, and quotes do not count for CLIP's tokenizer.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, ids in zip(tokens.names, tokens.ids.tolist(), strict=True):
        groups.setdefault(tuple(ids), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def check_distinct(tokens: ClassTokens, where: str, allowed: Sequence[str] = ()) -> None:
    """Refuse names that give the same tokens.

    Args:
        tokens: of the names.
        where: what the message begins with.
        allowed: names that may be alike among themselves, each as often as it is here.

    Raises:
        InputError: naming the first two.
    """
    for group in same_tokens(tokens):
        if Counter(group) <= Counter(allowed):
            continue
        name, other = group[:2]
        if name == other:
            raise InputError(
                f"{where}: {name!r} is named {group.count(name)} times, expected distinct names"
            )
        # Escaped, for they may well look the same.
        raise InputError(
            f"{where}: {name!a} and {other!a} give the same tokens, expected names that"
            " CLIP can tell apart"
        )


def _is_text(name: str) -> bool:
    """False for what the file system gives for a name that is not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_cut(clip: FrozenClip, prompt: str, context: int) -> bool:
    longer = clip.tokenizer([prompt], context_length=context + 1)
    return bool(clip.eot_positions(longer) >= context)


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


@dataclass(frozen=True)
class TextForest:
    """Prompts of some classes as N sequences of T rows; every class ends in a row of its own.

    Attributes:
        states: [N, T, Dt], the rows as they enter layer ``ClassPrompts.first_layer``.
        positions: int64 [T], where in its class prompt a row stands; bot has 0.
        visible: bool [T, T], what each row sees; None is causal.
        owner: int64 [T], which of the forest's classes a row belongs to; the first of several.
        classes: int64 [c], which of the class list's classes they are.
        sequences, eot: int64 [c], the sequence and the row where each class ends.
    """

    states: Tensor
    positions: Tensor
    visible: Tensor | None
    owner: Tensor
    classes: Tensor
    sequences: Tensor
    eot: Tensor

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class ClassPrompts:
    """A list of classes, ready for the text tower.

    Attributes:
        tokens: the tokenised prompts.
        forests: of all of them together.
        order: int64 [C], where each class stands among the forests' classes.
        first_layer: the text layer, from 1, that the forests' states enter.
        bot: per text layer, keys and values [1, H, d] of bot; empty where bot is a row.
    """

    tokens: ClassTokens
    forests: tuple[TextForest, ...]
    order: Tensor
    first_layer: int = 1
    bot: Sequence[tuple[Tensor, Tensor]] = ()

    def __len__(self) -> int:
        return len(self.tokens)


@torch.no_grad()
def whole_prompts(
    clip: FrozenClip, names: Sequence[str], template: str, *, cut: bool = False
) -> ClassPrompts:
    """One causal sequence a class, of the whole context or cut behind the last eot.

    Raises:
        InputError: see :func:`tokenise`.
    """
    tokens = tokenise(clip, names, template)
    ids = tokens.trimmed_ids if cut else tokens.ids
    classes = torch.arange(len(tokens), device=ids.device)
    positions = torch.arange(ids.shape[1], device=ids.device)
    forest = TextForest(
        states=clip.text.embed(ids),
        positions=positions,
        visible=None,
        owner=torch.zeros_like(positions),
        classes=classes,
        sequences=classes,
        eot=tokens.eot,
    )
    return ClassPrompts(tokens, (forest,), classes)


@torch.no_grad()
def class_prompts(
    clip: FrozenClip,
    names: Sequence[str],
    template: str,
    *,
    first_layer: int = 1,
    most_rows: int | None = None,
    share: bool = True,
    bot_row: bool = True,
) -> ClassPrompts:
    """Forests without what no class needs, behind the layers below ``first_layer``.

    Args:
        clip: the frozen CLIP.
        names, template: as in :func:`tokenise`.
        first_layer: the first layer that a method changes anything of.
        most_rows, share: as in :func:`plant`.
        bot_row: bot is a row, which a method may change; off, the same constant for all.

    Raises:
        InputError: see :func:`tokenise`.
    """
    text, tokens = clip.text, tokenise(clip, names, template)
    device, bot_id = tokens.ids.device, tokens.ids[0, 0]
    bot = () if bot_row else text.bot_prefix(bot_id)
    sequences = [
        ids[: end + 1] for ids, end in zip(tokens.ids.tolist(), tokens.eot.tolist(), strict=True)
    ]
    forests = []
    for tree in plant(sequences, most_rows=most_rows, share=share):
        tree = tree.to(device)
        ids, positions, owner = (
            F.pad(each, (int(bot_row), 0)) for each in (tree.token_ids, tree.positions, tree.owner)
        )
        mask = F.pad(tree.visible, (1, 0), value=True)  # bot is seen by all
        if bot_row:
            ids[0] = bot_id
            mask = F.pad(mask, (0, 0, 1, 0))
            mask[0, 0] = True
        x = text.embed_at(ids, positions)[None]
        for number, block in enumerate(text.blocks[: first_layer - 1]):
            prefix = None if bot_row else tuple(each[None] for each in bot[number])
            x = block(x, prefix, mask=mask)
        forests.append(
            TextForest(
                states=x,
                positions=positions,
                visible=mask if bot_row else tree.visible,
                owner=owner,
                classes=tree.classes,
                sequences=torch.zeros_like(tree.eot),
                eot=tree.eot + bot_row,
            )
        )
    order = torch.cat([forest.classes for forest in forests]).argsort()
    return ClassPrompts(tokens, tuple(forests), order, first_layer, bot)


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
