"""LAMP without the provably redundant work; equal to ``literal`` to rounding.

What is left out, by the numbers of SPEC, "Prompts and attention": prompts are keys and values only
(1); a pool is projected once a layer and then indexed (2); all classes of an image are one sequence
under a tree mask, so what their prompts share is computed once and nothing is padded (5, 6); the
last layer computes the rows that are read out (7); text layers below the first prompt come prepared
(8); images that retrieved the same prompts so far share their text. :class:`Trimming` switches each
off. Memory is bounded by working through (image, class) pairs in blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lamp_fast import ops
from lamp_fast.clip import Block, TokenForest
from lamp_fast.methods.lamp.state import Forward, LampClasses, Selections

Prefix = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ClassTexts:
    """The text side of ``text_query=class``: one set of features for all images.

    Attributes:
        features: [C, Ds], normalised.
        similarity: per selected layer [C, K], unbiased cosines of eot and chosen keys.
        counts: per selected layer int64 [M], how many classes chose each entry.
    """

    features: Tensor
    similarity: Sequence[Tensor]
    counts: Sequence[Tensor]


def forward(
    lamp,
    images: Tensor,
    classes: LampClasses,
    bias: tuple[Tensor, Tensor],
    text: ClassTexts | None = None,
    fixed_shapes: bool = False,
) -> Forward:
    """Logits [B, C], similarities and selections; see :class:`Forward`.

    With ``text_query=class``, ``text`` may bring the result of :func:`class_texts`.
    """
    image_bias, text_bias = bias
    features, chosen, image_similarity, image_counts = encode_images(lamp, images, image_bias)
    features = F.normalize(features, dim=-1)
    if lamp.config.text_query == "class":
        text = text or class_texts(lamp, classes, text_bias)
        cosine = features @ text.features.T
    else:
        share = lamp.trimming.share_routes and not fixed_shapes
        cosine = _cosine_in_blocks(lamp, features, chosen, classes, share)
    return Forward(
        logits=lamp.clip.logit_scale * cosine,
        image_similarity=image_similarity,
        text_similarity=text.similarity if text else (),
        selections=Selections.of(
            image_counts, len(images), text.counts if text else (), len(classes)
        ),
    )


def encode_images(
    lamp, images: Tensor, bias: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Image features [B, Ds]; per selected layer chosen entries [B, K], similarity and counts.

    Args:
        lamp: the model.
        images: [B, 3, S, S].
        bias: float32 [layers, M].
    """
    vision = lamp.clip.vision
    x = vision.embed(images)
    cls = torch.zeros(1, dtype=torch.int64, device=x.device)
    chosen, similarities, counts = [], [], []
    update = None
    for number, block in enumerate(vision.blocks, 1):
        x, normed = block.enter(x, update)
        prefix = None
        prompts = lamp.prompts_of(number)
        if prompts is not None:
            rows = prompts.visual_rows()
            indices, similarity, count = _retrieve(lamp, x[:, 0], rows, bias, number)
            pool = _Pool(lamp, block, rows, x.dtype)
            prefix = pool.take(indices)
            chosen.append(indices)
            similarities += similarity
            counts += count
        last = lamp.trimming.last_row and number == len(vision.blocks)
        x, update = block.advance(x, normed, prefix, rows=cls if last else None)
    return vision.readout(x[:, 0] + update[:, 0]), chosen, similarities, counts


def class_texts(lamp, classes: LampClasses, bias: Tensor) -> ClassTexts:
    """Text features where each class retrieves with its own eot.

    The classes of a forest are one sequence whose prefix is the whole projected pool; the mask lets
    each row see the entries that its class chose.
    """
    pools = _text_pools(lamp, classes)
    per_forest = [
        _encode_class_forest(lamp, classes, forest, states, pools, bias)
        for forest, states in zip(classes.forests, classes.states, strict=True)
    ]
    features = torch.cat([each[0] for each in per_forest])[classes.order]
    layers = range(len(per_forest[0][1]))
    similarities = [torch.cat([each[1][layer] for each in per_forest]) for layer in layers]
    counts = [sum(each[2][layer] for each in per_forest) for layer in layers]
    return ClassTexts(F.normalize(features, dim=-1), similarities, counts)


@dataclass(frozen=True)
class _Pool:
    """The projected rows of one layer, ready to be keys and values.

    The table holds the M pool entries, the S shared prompts and, on the text side, bot. ``rows``
    are the first two as learned, for retrieval; ``dtype`` is what the tower computes in.
    """

    lamp: object
    block: Block
    rows: Tensor
    dtype: torch.dtype
    bot: Prefix | None = None

    def __post_init__(self) -> None:
        table = self.block.prefix(self.rows.to(self.dtype))
        if self.bot is not None:
            table = tuple(torch.cat(pair) for pair in zip(table, self.bot, strict=True))
        object.__setattr__(self, "table", table)

    def everything(self) -> Prefix:
        """Keys and values [1, rows, H, d] of every row."""
        keys, values = self.table
        return keys[None], values[None]

    def route(self, indices: Tensor) -> Tensor:
        """Append the shared rows and bot to chosen entries: [B, K] -> [B, K + S (+ 1)]."""
        keys, _ = self.table
        pool_size = self.lamp.config.m if self.lamp.config.mpp else 0
        common = torch.arange(pool_size, len(keys), device=indices.device)
        return torch.cat([indices, common.expand(len(indices), -1)], dim=1)

    def take(self, indices: Tensor) -> Prefix:
        """Keys and values [B, K + S (+ 1), H, d] of each query's chosen entries."""
        route = self.route(indices)
        if self.lamp.trimming.project_once:
            keys, values = self.table
            return keys[route], values[route]
        with_bot = self.bot is not None
        rows = self.rows.to(self.dtype)
        projected = self.block.prefix(rows[route[:, :-1] if with_bot else route])
        if not with_bot:
            return projected
        bots = (each.expand(len(indices), -1, -1, -1) for each in self.bot)
        return tuple(torch.cat(pair, dim=1) for pair in zip(projected, bots, strict=True))


def _text_pools(lamp, classes: LampClasses) -> list[_Pool]:
    dtype = lamp.clip.dtype
    return [
        _Pool(lamp, block, lamp.prompts_of(number).text_rows(), dtype, classes.bot[number - 1])
        for number, block in enumerate(lamp.clip.text.blocks, 1)
        if lamp.prompts_of(number) is not None
    ]


def _encode_class_forest(lamp, classes, forest: TokenForest, states: Tensor, pools, bias: Tensor):
    """Features [c, Ds] of a forest's classes; per selected layer similarity and counts."""
    x, update = states[None], None
    similarities, counts = [], []
    pool_of = iter(pools)
    for number, block in lamp.text_blocks(classes):
        x, normed = block.enter(x, update)
        prefix = tuple(each[None] for each in classes.bot[number - 1])
        seen = forest.visible.new_ones(len(forest), 1)
        if lamp.prompts_of(number) is not None:
            pool = next(pool_of)
            indices, similarity, count = _retrieve(lamp, x[0, forest.eot], pool.rows, bias, number)
            prefix = pool.everything()
            route = pool.route(indices)  # [C, K + S + 1]
            seen = forest.visible.new_zeros(len(route), prefix[0].shape[1])
            seen = seen.scatter(1, route, True)[forest.owner]
            similarities += similarity
            counts += count
        x, update = _advance_text(lamp, block, number, x, normed, prefix, seen, forest)
    return _read_out(lamp, x + update, forest)[0], similarities, counts


def _cosine_in_blocks(lamp, features: Tensor, chosen: list[Tensor], classes, share: bool) -> Tensor:
    """Cosine [B, C] of normalised features with each image's own text features.

    (image, class) pairs are taken in blocks of at most ``lamp.block`` pairs; with gradient and
    more than one block, each is computed again in backward instead of being kept. Retrieval is over
    by then, so nothing is chosen or counted twice.
    """
    images = len(features)
    limit = lamp.block or images * len(classes)
    if images == 0:
        return features.new_zeros(0, len(classes))
    pools = _text_pools(lamp, classes)
    images_at_once = max(1, min(images, limit // max(len(each.eot) for each in classes.forests)))
    pieces = -(-images // images_at_once) * len(classes.forests)
    recompute = torch.is_grad_enabled() and pieces > 1 and limit < images * len(classes)
    rows = []
    for first in range(0, images, images_at_once):
        some = slice(first, first + images_at_once)
        columns = []
        for forest, states in zip(classes.forests, classes.states, strict=True):
            arguments = (lamp, classes, forest, states, pools, share, features[some])
            routes = [indices[some] for indices in chosen]
            if recompute:
                columns.append(
                    checkpoint(
                        _cosine, *arguments, *routes, use_reentrant=False, preserve_rng_state=False
                    )
                )
            else:
                columns.append(_cosine(*arguments, *routes))
        rows.append(torch.cat(columns, dim=1)[:, classes.order])
    return torch.cat(rows)


def _cosine(
    lamp, classes, forest, states, pools, share: bool, features: Tensor, *chosen: Tensor
) -> Tensor:
    """Cosine [b, c] of b images with the classes of one forest."""
    images = len(features)
    x, update = states[None], None
    owner = torch.zeros(images, dtype=torch.int64, device=features.device)  # text row -> image
    pool_of = iter(zip(pools, chosen, strict=True))
    for number, block in lamp.text_blocks(classes):
        if lamp.prompts_of(number) is None:
            prefix = tuple(each[None] for each in classes.bot[number - 1])
        else:
            pool, indices = next(pool_of)
            if share:
                parents, owner, indices = _distinct(owner, indices)
                x, update = (x if update is None else x + update)[parents], None
            elif len(x) < images:
                # The states are the same for all images until their first prompts.
                x = (x if update is None else x + update).expand(images, -1, -1)
                owner, update = torch.arange(images, device=x.device), None
            prefix = pool.take(indices)
        x, normed = block.enter(x, update)
        seen = forest.visible.new_ones(len(forest), prefix[0].shape[1])
        x, update = _advance_text(lamp, block, number, x, normed, prefix, seen, forest)
    text = F.normalize(_read_out(lamp, x + update, forest), dim=-1)  # [distinct, c, Ds]
    return torch.einsum("bd,bcd->bc", features, text[owner])


def _distinct(owner: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split images that shared their text so far by what they choose now.

    Args:
        owner: int64 [B], which text states each image reads.
        indices: int64 [B, K], its choice in this layer.

    Returns:
        parents, int64 [U], the states that each new one continues; the new owner, int64 [B]; the
        choice of each new one, int64 [U, K].
    """
    both = torch.cat([owner[:, None], indices], dim=1)
    distinct, owner = torch.unique(both, dim=0, return_inverse=True)
    return distinct[:, 0], owner, distinct[:, 1:]


def _advance_text(lamp, block, number, x, normed, prefix, seen, forest: TokenForest):
    """One text layer over a forest: prefix visibility ``seen`` [T, P] beside the tree's."""
    mask = torch.cat([seen, forest.visible], dim=1)
    if lamp.trimming.last_row and number == len(lamp.clip.text.blocks):
        return block.advance(x, normed, prefix, mask=mask[forest.eot], rows=forest.eot)
    return block.advance(x, normed, prefix, mask=mask)


def _read_out(lamp, x: Tensor, forest: TokenForest) -> Tensor:
    """Text features [N, c, Ds] of the forest's classes."""
    eot = x if lamp.trimming.last_row else x[:, forest.eot]
    return lamp.clip.text.readout(eot)


def _retrieve(lamp, queries: Tensor, rows: Tensor, bias: Tensor, number: int):
    """Choose from the first M rows: indices [B, K], similarity and counts.

    Similarity and counts come as lists of one element, empty without a pool (K is 0 then).
    """
    config = lamp.config
    if not config.mpp:
        return queries.new_zeros((len(queries), 0), dtype=torch.int64), [], []
    keys = rows[: config.m]
    queries = queries.to(keys.dtype)
    if config.similarity_gradient == "keys":
        queries = queries.detach()
    layer_bias = bias[config.layers.index(number)]
    indices, similarity, counts = ops.retrieve(queries, keys, layer_bias, config.k)
    if config.lbo_count == "unbiased":
        with torch.no_grad():
            counts = ops.retrieve(queries, keys, torch.zeros_like(layer_bias), config.k)[2]
    return indices, [similarity], [counts]
