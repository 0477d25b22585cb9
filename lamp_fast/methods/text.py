"""The text tower over class prompts, for methods that learn words or layers of it.

The prompts of a class set are laid out once (:func:`lay_out`), either trimmed, as forests in which
classes share what they begin with and nothing stands behind eot, or as published: one sequence of
77 tokens a class. :func:`encode` runs the tower over either, with hooks for what a method changes,
to the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lamp_fast.clip import Block, FrozenClip, Trimming, plant, through, tokenise
from lamp_fast.errors import InputError


@dataclass(frozen=True)
class Sheet:
    """Tokens of some classes as N sequences of L rows; every class ends in a row of its own.

    Attributes:
        positions: int64 [L], where in its class prompt a row stands; bot has 0.
        states: [N, L, Dt], the rows as they enter layer ``Layout.first_layer``.
        mask: bool [L, L], what each row sees; None is causal.
        classes: int64 [c], which of the class set's classes they are.
        sequences, ends: int64 [c], where each class's eot is.
    """

    positions: Tensor
    states: Tensor
    mask: Tensor | None
    classes: Tensor
    sequences: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Layout:
    """All class prompts of a set.

    Attributes:
        names: the C class names.
        sheets: of all of them together.
        order: int64 [C], where each class stands among the sheets' classes.
        first_layer: the text layer, from 1, that the sheets' states enter.
        last_row: in the last layer compute the eot rows alone.
        most_rows: of a sheet.
    """

    names: tuple[str, ...]
    sheets: tuple[Sheet, ...]
    order: Tensor
    first_layer: int
    last_row: bool
    most_rows: int

    def __len__(self) -> int:
        return len(self.names)


# By layer, from 1: (rows [N, L, Dt], sheet) -> the rows that enter the layer in their place.
Changes = Mapping[int, Callable[[Tensor, Sheet], Tensor]]


@torch.no_grad()
def lay_out(
    clip: FrozenClip, names: Sequence[str], template: str, trimming: Trimming, first_layer: int = 1
) -> Layout:
    """Tokenise and arrange class prompts, and run the layers below ``first_layer``.

    Args:
        clip: the frozen CLIP.
        names, template: as in :func:`lamp_fast.clip.tokenise`.
        trimming: ``as_published`` decides the kind; ``share_tokens``, ``most_rows``, ``last_row``
            and ``prepare_text`` hold for the trimmed kind.
        first_layer: the first layer that a method changes anything of.

    Raises:
        InputError: see :func:`lamp_fast.clip.tokenise`.
    """
    text, tokens = clip.text, tokenise(clip, names, template)
    device, count = tokens.ids.device, len(tokens)
    if trimming.as_published:
        whole = Sheet(
            positions=torch.arange(tokens.ids.shape[1], device=device),
            states=text.embed(tokens.ids),
            mask=None,
            classes=torch.arange(count, device=device),
            sequences=torch.arange(count, device=device),
            ends=tokens.eot,
        )
        return Layout(tokens.names, (whole,), whole.classes, 1, False, 0)
    sequences = [
        ids[: end + 1] for ids, end in zip(tokens.ids.tolist(), tokens.eot.tolist(), strict=True)
    ]
    sheets = []
    for forest in plant(sequences, most_rows=trimming.most_rows, share=trimming.share_tokens):
        forest = forest.to(device)
        # bot is a row here as well: a method that changes layers changes it, too.
        mask = F.pad(forest.visible, (1, 0, 1, 0))
        mask[:, 0] = True
        ids, positions = F.pad(forest.token_ids, (1, 0)), F.pad(forest.positions, (1, 0))
        ids[0] = tokens.ids[0, 0]
        states = text.embed_at(ids, positions)[None]
        sheets.append(
            Sheet(
                positions=positions,
                states=states,
                mask=mask,
                classes=forest.classes,
                sequences=torch.zeros_like(forest.eot),
                ends=forest.eot + 1,
            )
        )
    first = first_layer if trimming.prepare_text else 1
    below = text.blocks[: first - 1]
    sheets = [replace(each, states=through(below, each.states, mask=each.mask)) for each in sheets]
    order = torch.cat([each.classes for each in sheets]).argsort()
    return Layout(tokens.names, tuple(sheets), order, first, trimming.last_row, trimming.most_rows)


def encode(
    clip: FrozenClip,
    layout: Layout,
    changes: Changes | None = None,
    blocks: Sequence[Block] | None = None,
) -> Tensor:
    """Text features, not normalised.

    Args:
        clip: the frozen CLIP.
        layout: of the classes.
        changes: what becomes of the rows before a layer. They may make more sequences of a trimmed
            sheet's one, such as one an image.
        blocks: in place of the tower's own.

    Returns:
        [N, C, Ds], N as ``changes`` made it, or 1.
    """
    features = []
    for sheet in layout.sheets:
        x = run_layers(clip, layout, sheet, sheet.states, layout.first_layer, changes, blocks)
        features.append(clip.text.readout(x))
    return torch.cat(features, dim=1)[:, layout.order]


def run_layers(
    clip: FrozenClip,
    layout: Layout,
    sheet: Sheet,
    x: Tensor,
    first: int,
    changes: Changes | None = None,
    blocks: Sequence[Block] | None = None,
    last: int | None = None,
) -> Tensor:
    """Run rows [N, L, Dt] of a sheet through the layers first..last, from 1.

    Returns:
        With ``last`` the rows [N, L, Dt] behind it; without, the eot rows [N, c, Dt] of the end.
    """
    blocks, changes, update = blocks or clip.text.blocks, changes or {}, None
    for number in range(first, (last or len(blocks)) + 1):
        if number in changes:
            x, update = changes[number](x if update is None else x + update, sheet), None
        how = {"causal": True} if sheet.mask is None else {"mask": sheet.mask}
        if number == len(blocks) and layout.last_row:
            how = {"mask": sheet.mask[sheet.ends], "rows": sheet.ends}
        x, normed = blocks[number - 1].enter(x, update)
        x, update = blocks[number - 1].advance(x, normed, **how)
    x = x if update is None else x + update
    if last is not None or layout.last_row:
        return x
    return x[sheet.sequences, sheet.ends][None] if sheet.mask is None else x[:, sheet.ends]


def separate(layout: Layout, sheet: Sheet) -> list[tuple[Sheet, Tensor]]:
    """The same classes without shared rows, for layers in which classes differ from the start.

    Returns:
        Sheets without states, each with the rows of ``sheet``, int64 [L], that its own continue.
    """
    if sheet.mask is None:
        return [(sheet, sheet.positions)]
    branches = [sheet.mask[end].nonzero()[:, 0] for end in sheet.ends.tolist()]
    separated, group = [], []
    for index, branch in enumerate(branches):
        rows = sum(len(branches[each]) for each in group)
        if group and rows + len(branch) > layout.most_rows:
            separated.append(_side_by_side(sheet, branches, group))
            group = []
        group.append(index)
    separated.append(_side_by_side(sheet, branches, group))
    return separated


def _side_by_side(
    sheet: Sheet, branches: Sequence[Tensor], group: Sequence[int]
) -> tuple[Sheet, Tensor]:
    source = torch.cat([branches[each] for each in group])
    lengths = torch.tensor([len(branches[each]) for each in group], device=source.device)
    owner = torch.arange(len(group), device=source.device).repeat_interleave(lengths)
    ends = lengths.cumsum(0) - 1
    chosen = torch.tensor(list(group), device=source.device)
    return (
        replace(
            sheet,
            positions=sheet.positions[source],
            states=sheet.states[:, :0],
            mask=(owner[:, None] == owner).tril(),
            classes=sheet.classes[chosen],
            sequences=sheet.sequences[chosen],
            ends=ends,
        ),
        source,
    )


def put_words(x: Tensor, sheet: Sheet, words: Tensor) -> Tensor:
    """Replace the tokens behind bot: x [N, L, Dt], words [P, Dt] or [N', P, Dt], N' = N or N = 1.

    The words are as the layer takes them; a first layer's carry their position already.
    """
    count = words.shape[-2]
    position = sheet.positions - 1  # bot's own is -1
    ours = (position >= 0) & (position < count)
    placed = words.to(x.dtype)[..., position.clamp(0, count - 1), :]
    return torch.where(ours[:, None], placed, x)


def context_template(words: str | None, count: int, rest: str = "{}.") -> str:
    """A template whose first ``count`` tokens are to be replaced.

    Args:
        words: what it begins with; None for any words, as many as needed.
        count: learned tokens.
        rest: what follows.
    """
    return f"{words or ' '.join(['a'] * count)} {rest}"


def context_start(clip: FrozenClip, words: str | None, count: int) -> Tensor:
    """Initial values [count, Dt] of learned context tokens, float32 or float64.

    Args:
        clip: whose embeddings of ``words`` are taken.
        words: None draws from N(0, 0.02^2).
        count: how many tokens.

    Raises:
        InputError: words of fewer tokens.
    """
    table = clip.text.text.token_embedding.weight
    precision = torch.promote_types(table.dtype, torch.float32)
    if words is None:
        return 0.02 * torch.randn(count, table.shape[1], dtype=precision)
    with torch.device("cpu"):  # counted also where a method without numbers is built
        ids = clip.tokenizer([words])
        length = int(clip.eot_positions(ids)) - 1
    if length < count:
        raise InputError(
            f"--ctx-init {words!r}: {length} tokens, expected at least the {count} of --n-ctx"
        )
    return table[ids[0, 1 : count + 1].to(table.device)].detach().to(precision)
