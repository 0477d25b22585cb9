"""The text tower over class prompts, for methods that learn words or layers of it.

The prompts of a class list are prepared once (:func:`prepare_prompts`), either trimmed, as forests
in which classes share what they begin with and nothing stands behind eot, or as published: one
sequence of 77 tokens a class. :func:`encode` runs the tower over either, with hooks for what a
method changes, to the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lamp_fast.clip.prompts import ClassPrompts, TextForest, class_prompts, whole_prompts
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import Block, FrozenClip
from lamp_fast.data.benchmark import Origin
from lamp_fast.data.catalog import CATALOG
from lamp_fast.data.templates import IMAGENET_7
from lamp_fast.data.words import Words
from lamp_fast.errors import InputError

# By layer, from 1: (rows [N, T, Dt], forest) -> the rows that enter the layer in their place.
Changes = Mapping[int, Callable[[Tensor, TextForest], Tensor]]


def prepare_prompts(
    clip: FrozenClip,
    names: Sequence[str],
    template: str,
    trimming: Trimming,
    first_layer: int = 1,
    *,
    bot_row: bool = True,
) -> ClassPrompts:
    """Class prompts with what ``trimming`` leaves out of them.

    Args:
        clip: the frozen CLIP.
        names, template: as in :func:`lamp_fast.clip.prompts.tokenise`.
        trimming: ``as_published`` decides the kind; the rest holds for the trimmed one.
        first_layer: the first layer that a method changes anything of.
        bot_row: see :func:`lamp_fast.clip.prompts.class_prompts`; of the trimmed kind.

    Raises:
        InputError: see :func:`lamp_fast.clip.prompts.tokenise`.
    """
    if trimming.as_published:
        return whole_prompts(clip, names, template)
    return class_prompts(
        clip,
        names,
        template,
        first_layer=first_layer if trimming.prepare_text else 1,
        most_rows=trimming.most_rows,
        share=trimming.share_tokens,
        bot_row=bot_row,
    )


def encode(
    clip: FrozenClip,
    prompts: ClassPrompts,
    changes: Changes | None = None,
    blocks: Sequence[Block] | None = None,
    last_row: bool = True,
    readout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Text features, not normalised.

    Args:
        clip: the frozen CLIP.
        prompts: of the classes.
        changes: what becomes of the rows before a layer. They may make more sequences of a forest's
            one, such as one an image.
        blocks: in place of the tower's own.
        last_row: in the last layer compute a forest's eot rows alone.
        readout: in place of the tower's own.

    Returns:
        [N, C, Ds], N as ``changes`` made it, or 1.
    """
    features, readout = [], readout or clip.text.readout
    for forest in prompts.forests:
        x = run_layers(
            clip, forest, forest.states, prompts.first_layer, changes, blocks, last_row=last_row
        )
        features.append(readout(x))
    return torch.cat(features, dim=1)[:, prompts.order]


def imagenet_or(
    template: str, origin: Origin, templates: tuple[str, ...] = IMAGENET_7
) -> tuple[str, ...]:
    """The user's where there are several; ``templates`` where names are of ImageNet or a variant
    and the user gave no template; else the one."""
    if origin.words is not None:
        return origin.words.templates
    named = CATALOG.get(origin.data)
    return templates if named is not None and named.is_imagenet else (template,)


@torch.no_grad()
def plain_text_features(clip: FrozenClip, names: Sequence[str], template: str) -> Tensor:
    """CLIP's own text features [C, Ds] of class names in a template, not normalised."""
    return encode(clip, whole_prompts(clip, names, template, cut=True))[0]


def zero_shot_texts(
    clip: FrozenClip, names: Sequence[str], template: str, words: Words | None = None
) -> Tensor:
    """The same, normalised; of ``words``, where there are some, :func:`ensemble_texts`."""
    if words is not None:
        return F.normalize(ensemble_texts(clip, names, words), dim=-1)
    return F.normalize(plain_text_features(clip, names, template), dim=-1)


def mean_text_features(
    clip: FrozenClip,
    names: Sequence[str],
    templates: Sequence[str],
    words: Words | None = None,
) -> Tensor:
    """CLIP's own text features of class names [C, Ds]: normalised, the mean over templates (or over
    the texts of ``words``), normalised again."""
    if words is not None:
        return F.normalize(ensemble_texts(clip, names, words), dim=-1)
    each = [zero_shot_texts(clip, names, one) for one in templates]
    return F.normalize(torch.stack(each).mean(0), dim=-1)


# Texts encoded at once; and lists of texts whose means a CLIP keeps.
_TEXTS_AT_ONCE, _KEPT_MEANS = 1024, 8
_MEANS: WeakKeyDictionary[FrozenClip, dict[Any, Tensor]] = WeakKeyDictionary()


@torch.no_grad()
def ensemble_texts(
    clip: FrozenClip, names: Sequence[str], words: Words, *, normalised: bool = True
) -> Tensor:
    """The mean of CLIP's own text features over the texts of each class, [C, Ds], not normalised.

    The last few are kept, for a run asks for the same ones to train, to choose and to score.

    Args:
        clip: the frozen CLIP.
        names: of the classes.
        words: their texts.
        normalised: of each text before the mean, as CLIP's authors do for ImageNet; off, as CLAP
            and PromptSRC do.
    """
    texts = [words.texts(name) for name in names]
    kept = _MEANS.setdefault(clip, {})
    key = (tuple(texts), normalised, clip.dtype, next(clip.parameters()).device)
    if key not in kept:
        while len(kept) >= _KEPT_MEANS:
            kept.pop(next(iter(kept)), None)
        kept[key] = _mean_by_class(clip, texts, normalised)
    return kept[key]


def _mean_by_class(clip: FrozenClip, texts: Sequence[Sequence[str]], normalised: bool) -> Tensor:
    device = next(clip.parameters()).device
    prompts = [text for each in texts for text in each]
    counts = torch.tensor([len(each) for each in texts], device=device)
    owner = torch.arange(len(texts), device=device).repeat_interleave(counts)
    total = None
    starts = range(0, len(prompts), _TEXTS_AT_ONCE)
    hidden = True if len(starts) == 1 else None
    for start in tqdm(starts, desc="encoding texts", leave=False, disable=hidden):
        features = plain_text_features(clip, prompts[start : start + _TEXTS_AT_ONCE], "{}")
        if normalised:
            features = F.normalize(features, dim=-1)
        if total is None:
            total = features.new_zeros(len(texts), features.shape[1])
        total.index_add_(0, owner[start : start + _TEXTS_AT_ONCE], features)
    return total / counts[:, None]


def run_layers(
    clip: FrozenClip,
    forest: TextForest,
    x: Tensor,
    first: int,
    changes: Changes | None = None,
    blocks: Sequence[Block] | None = None,
    last: int | None = None,
    last_row: bool = True,
) -> Tensor:
    """Run rows [N, T, Dt] of a forest through the layers first..last, from 1.

    Returns:
        With ``last`` the rows [N, T, Dt] behind it; without, the eot rows [N, c, Dt] of the end.
    """
    blocks, changes, update = blocks or clip.text.blocks, changes or {}, None
    causal, eot = forest.visible is None, forest.eot
    for number in range(first, (last or len(blocks)) + 1):
        if number in changes:
            x, update = changes[number](x if update is None else x + update, forest), None
        how = {"causal": True} if causal else {"mask": forest.visible}
        if number == len(blocks) and last_row and not causal:
            how = {"mask": forest.visible[eot], "rows": eot}
        x, normed = blocks[number - 1].enter(x, update)
        x, update = blocks[number - 1].advance(x, normed, **how)
    x = x if update is None else x + update
    if causal and last is None:
        return x[forest.sequences, eot][None]
    return x if last is not None or last_row else x[:, eot]


def separate(forest: TextForest, most_rows: int) -> list[tuple[TextForest, Tensor]]:
    """The same classes without shared rows, for layers in which classes differ from the start.

    Args:
        forest: the classes.
        most_rows: of one forest of several classes.

    Returns:
        Forests without states, each with the rows of ``forest``, int64 [T], that its own continue.
    """
    if forest.visible is None:
        return [(forest, forest.positions)]
    branches = [forest.visible[end].nonzero()[:, 0] for end in forest.eot.tolist()]
    separated, group = [], []
    for index, branch in enumerate(branches):
        rows = sum(len(branches[member]) for member in group)
        if group and rows + len(branch) > most_rows:
            separated.append(_side_by_side(forest, branches, group))
            group = []
        group.append(index)
    separated.append(_side_by_side(forest, branches, group))
    return separated


def _side_by_side(
    forest: TextForest, branches: Sequence[Tensor], group: Sequence[int]
) -> tuple[TextForest, Tensor]:
    source = torch.cat([branches[member] for member in group])
    lengths = torch.tensor([len(branches[member]) for member in group], device=source.device)
    owner = torch.arange(len(group), device=source.device).repeat_interleave(lengths)
    chosen = torch.tensor(list(group), device=source.device)
    alone = replace(
        forest,
        states=forest.states[:, :0],
        positions=forest.positions[source],
        visible=(owner[:, None] == owner).tril(),
        owner=owner,
        classes=forest.classes[chosen],
        sequences=forest.sequences[chosen],
        eot=lengths.cumsum(0) - 1,
    )
    return alone, source


def put_words(x: Tensor, forest: TextForest, words: Tensor) -> Tensor:
    """Replace the tokens behind bot: x [N, L, Dt], words [P, Dt] or [N', P, Dt], N' = N or N = 1.

    The words are as the layer takes them; a first layer's carry their position already.
    """
    count = words.shape[-2]
    position = forest.positions - 1  # bot's own is -1
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
