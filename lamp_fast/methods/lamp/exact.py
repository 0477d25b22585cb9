"""LAMP without the provably redundant work; equal to ``literal`` to rounding.

What is left out, by the numbered facts of docs/mathematics.md, Prompts and attention: prompts are
keys and values only (1); a pool is projected once a layer and then indexed (2); all classes of an
image are one sequence under a tree mask, so what their prompts share is computed once and nothing
is padded (5, 6); the last layer computes the rows that are read out (7); text layers below the
first prompt come prepared (8); images that retrieved the same prompts so far share their text.
:class:`Trimming` switches each off. Memory is bounded by working through (image, class) pairs in
blocks.

An :class:`ExactLamp` is one LAMP with its prompts projected: it holds tensors that follow from the
parameters, so it is made for a pass, or once for parameters that no longer change.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lamp_fast import ops
from lamp_fast.clip.prompts import ClassPrompts, TextForest
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import Block, TextTower, VisionTower
from lamp_fast.methods.lamp.state import Forward, Selections
from lamp_fast.methods.settings.lamp import LampSettings

Prefix = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pool:
    """The prompts of one layer of a tower, projected: M pool entries, then S shared ones.

    Attributes:
        rows: [M + S, width], as learned; the first M are the keys of retrieval.
        bias: float32 [M].
        keys, values: [M + S (+ 1), H, d], of the rows and, on the text side, of bot behind them.
        config: K, and what of retrieval is switched.
        block: projects each choice anew; None where ``keys`` and ``values`` are indexed.
    """

    rows: Tensor
    bias: Tensor
    keys: Tensor
    values: Tensor
    config: LampSettings
    block: Block | None

    def retrieve(self, queries: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Choose pool entries for queries [B, width]: indices [B, K], similarity and counts.

        Similarity and counts come as lists of one element, empty without a pool (K is 0 then).
        """
        config = self.config
        if not config.mpp:
            return queries.new_zeros((len(queries), 0), dtype=torch.int64), [], []
        keys = self.rows[: config.m]
        queries = queries.to(keys.dtype)
        if config.similarity_gradient == "keys":
            queries = queries.detach()
        indices, similarity, counts = ops.retrieve(queries, keys, self.bias, config.k)
        if config.lbo_count == "unbiased":
            with torch.no_grad():
                counts = ops.retrieve(queries, keys, torch.zeros_like(self.bias), config.k)[2]
        return indices, [similarity], [counts]

    def everything(self) -> Prefix:
        """Keys and values [1, rows, H, d] of every row."""
        return self.keys[None], self.values[None]

    def route(self, indices: Tensor) -> Tensor:
        """Append the shared rows and bot to chosen entries: [B, K] -> [B, K + S (+ 1)]."""
        common = torch.arange(len(self.bias), len(self.keys), device=indices.device)
        return torch.cat([indices, common.expand(len(indices), -1)], dim=1)

    def take(self, indices: Tensor) -> Prefix:
        """Keys and values [B, K + S (+ 1), H, d] of each query's chosen entries."""
        route = self.route(indices)
        if self.block is None:
            return self.keys[route], self.values[route]
        bots = len(self.keys) - len(self.rows)
        own = self.rows.to(self.keys.dtype)[route[:, : route.shape[1] - bots]]
        behind = (
            table[len(self.rows) :].expand(len(indices), -1, -1, -1)
            for table in (self.keys, self.values)
        )
        pairs = zip(self.block.prefix(own), behind, strict=True)
        return tuple(torch.cat(pair, dim=1) for pair in pairs)


def project(
    blocks: Sequence[Block],
    rows: Sequence[Tensor],
    bias: Tensor,
    dtype: torch.dtype,
    config: LampSettings,
    trimming: Trimming,
    bot: Sequence[Prefix] = (),
) -> dict[int, Pool]:
    """The pools of a tower by layer, from 1.

    Args:
        blocks: of the tower.
        rows: of each selected layer [M + S, width].
        bias: float32 [layers, M].
        dtype: of the tower.
        config, trimming: see :class:`Pool`.
        bot: on the text side, its keys and values [1, H, d] in every layer.
    """
    pools = {}
    for layer, own_rows, own_bias in zip(config.layers, rows, bias, strict=True):
        block = blocks[layer - 1]
        table = block.prefix(own_rows.to(dtype))
        if bot:
            table = (torch.cat(pair) for pair in zip(table, bot[layer - 1], strict=True))
        anew = None if trimming.project_once else block
        pools[layer] = Pool(own_rows, own_bias, *table, config, anew)
    return pools


@dataclass(frozen=True)
class EncodedImages:
    """What the image tower made of B pictures.

    Attributes:
        features: [B, Ds], normalised.
        chosen: per selected layer int64 [B, K], the retrieved entries.
        similarity: per selected layer [B, K], unbiased cosines of cls and chosen keys.
        counts: per selected layer int64 [M], how many pictures chose each entry.
    """

    features: Tensor
    chosen: Sequence[Tensor]
    similarity: Sequence[Tensor]
    counts: Sequence[Tensor]


@dataclass(frozen=True)
class ImageEncoder:
    """The image tower, whose cls retrieves in every selected layer.

    Attributes:
        tower: CLIP's.
        pools: by selected layer, from 1.
        last_row: in the last layer compute cls alone.
    """

    tower: VisionTower
    pools: Mapping[int, Pool]
    last_row: bool

    def __call__(self, images: Tensor) -> EncodedImages:
        """Encode pictures [B, 3, S, S], or what of them enters the first layer with a pool."""
        first = min(self.pools)
        x, update = self.tower.entering(images, first), None
        cls = torch.zeros(1, dtype=torch.int64, device=x.device)
        chosen, similarities, counts = [], [], []
        for number, block in enumerate(self.tower.blocks[first - 1 :], first):
            x, normed = block.enter(x, update)
            prefix = None
            if number in self.pools:
                pool = self.pools[number]
                indices, similarity, count = pool.retrieve(x[:, 0])
                prefix = pool.take(indices)
                chosen.append(indices)
                similarities += similarity
                counts += count
            last = self.last_row and number == len(self.tower.blocks)
            x, update = block.advance(x, normed, prefix, rows=cls if last else None)
        features = self.tower.readout(x[:, 0] + update[:, 0])
        return EncodedImages(F.normalize(features, dim=-1), chosen, similarities, counts)


@dataclass(frozen=True)
class ClassTexts:
    """The text side of ``text_query=class``: one set of features for all images.

    Attributes:
        features: [C, Ds], normalised.
        similarity: per selected layer [C, K], unbiased cosines of eot and chosen keys.
        counts: per selected layer int64 [M], how many classes chose each entry.
    """

    features: Tensor
    similarity: Sequence[Tensor] = ()
    counts: Sequence[Tensor] = ()


@dataclass(frozen=True)
class TextEncoder:
    """The text tower over a list of classes.

    Attributes:
        tower: CLIP's.
        pools: by selected layer, from 1.
        classes: prepared.
        last_row: in the last layer compute the eot rows alone.
        share_routes: images that retrieved the same so far share their text; how many rows there
            are then depends on values.
        block: how many (image, class) pairs are encoded at once; None takes all.
    """

    tower: TextTower
    pools: Mapping[int, Pool]
    classes: ClassPrompts
    last_row: bool
    share_routes: bool
    block: int | None

    def class_texts(self) -> ClassTexts:
        """Text features where each class retrieves with its own eot.

        The classes of a forest are one sequence whose prefix is the whole projected pool; the mask
        lets each row see the entries that its class chose.
        """
        per_forest = [self._encode_forest(forest) for forest in self.classes.forests]
        features, similarities, counts = zip(*per_forest, strict=True)
        features = torch.cat(features)[self.classes.order]
        similarities = [torch.cat(layer) for layer in zip(*similarities, strict=True)]
        counts = [sum(layer) for layer in zip(*counts, strict=True)]
        return ClassTexts(F.normalize(features, dim=-1), similarities, counts)

    def cosine(self, images: EncodedImages) -> Tensor:
        """Cosine [B, C] of image features with each image's own text features.

        (image, class) pairs are taken in blocks; with gradient and more than one block, each is
        computed again in backward instead of being kept. Retrieval is over by then, so nothing is
        chosen or counted twice.
        """
        features, count = images.features, len(self.classes)
        if len(features) == 0:
            return features.new_zeros(0, count)
        if self.block is None:
            return self._cosine(features, *images.chosen)
        largest = max(len(forest.eot) for forest in self.classes.forests)
        at_once = max(1, min(len(features), self.block // largest))
        pieces = -(-len(features) // at_once) * len(self.classes.forests)
        recompute = pieces > 1 and self.block < len(features) * count
        parts = (tensor.split(at_once) for tensor in (features, *images.chosen))
        blocks = zip(*parts, strict=True)
        return torch.cat([self._cosine(*block, recompute=recompute) for block in blocks])

    def _cosine(self, features: Tensor, *chosen: Tensor, recompute: bool = False) -> Tensor:
        """Cosine [b, C] of b images with all classes, a forest after the other."""
        columns = []
        for forest in self.classes.forests:
            arguments = (forest, features, *chosen)
            if recompute and torch.is_grad_enabled():
                how = {"use_reentrant": False, "preserve_rng_state": False}
                columns.append(checkpoint(self._cosine_with_forest, *arguments, **how))
            else:
                columns.append(self._cosine_with_forest(*arguments))
        return torch.cat(columns, dim=1)[:, self.classes.order]

    def _cosine_with_forest(self, forest: TextForest, features: Tensor, *chosen: Tensor) -> Tensor:
        """Cosine [b, c] of b images with the classes of one forest."""
        x, update = forest.states, None
        owner = torch.zeros(len(features), dtype=torch.int64, device=x.device)  # row of each image
        choices = iter(chosen)
        for number, block in self._blocks():
            if number in self.pools:
                indices = next(choices)
                if self.share_routes:
                    parents, owner, indices = _distinct(owner, indices)
                    x, update = (x if update is None else x + update)[parents], None
                elif len(x) < len(features):
                    # The states are the same for all images until their first prompts.
                    x = (x if update is None else x + update).expand(len(features), -1, -1)
                    owner, update = torch.arange(len(features), device=x.device), None
                prefix = self.pools[number].take(indices)
            else:
                prefix = self._bot(number)
            x, normed = block.enter(x, update)
            seen = forest.visible.new_ones(len(forest), prefix[0].shape[1])
            x, update = self._advance(number, x, normed, prefix, seen, forest)
        text = F.normalize(self._read_out(x + update, forest), dim=-1)  # [distinct, c, Ds]
        return torch.einsum("bd,bcd->bc", features, text[owner])

    def _encode_forest(self, forest: TextForest) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Features [c, Ds] of a forest's classes; per selected layer similarity and counts."""
        x, update = forest.states, None
        similarities, counts = [], []
        for number, block in self._blocks():
            x, normed = block.enter(x, update)
            if number in self.pools:
                pool = self.pools[number]
                indices, similarity, count = pool.retrieve(x[0, forest.eot])
                prefix, route = pool.everything(), pool.route(indices)  # [c, K + S + 1]
                seen = forest.visible.new_zeros(len(route), prefix[0].shape[1])
                seen = seen.scatter(1, route, True)[forest.owner]
                similarities += similarity
                counts += count
            else:
                prefix, seen = self._bot(number), forest.visible.new_ones(len(forest), 1)
            x, update = self._advance(number, x, normed, prefix, seen, forest)
        return self._read_out(x + update, forest)[0], similarities, counts

    def _blocks(self) -> Iterable[tuple[int, Block]]:
        """(number, block) from where the classes are prepared to the end."""
        first = self.classes.first_layer
        return enumerate(self.tower.blocks[first - 1 :], first)

    def _bot(self, number: int) -> Prefix:
        """Keys and values [1, 1, H, d] of bot in a layer without prompts."""
        keys, values = self.classes.bot[number - 1]
        return keys[None], values[None]

    def _advance(
        self,
        number: int,
        x: Tensor,
        normed: Tensor,
        prefix: Prefix,
        seen: Tensor,
        forest: TextForest,
    ) -> tuple[Tensor, Tensor]:
        """One layer over a forest: prefix visibility ``seen`` [T, P] beside the tree's."""
        mask = torch.cat([seen, forest.visible], dim=1)
        block = self.tower.blocks[number - 1]
        if self.last_row and number == len(self.tower.blocks):
            return block.advance(x, normed, prefix, mask=mask[forest.eot], rows=forest.eot)
        return block.advance(x, normed, prefix, mask=mask)

    def _read_out(self, x: Tensor, forest: TextForest) -> Tensor:
        """Text features [N, c, Ds] of the forest's classes."""
        return self.tower.readout(x if self.last_row else x[:, forest.eot])


@dataclass(frozen=True)
class ExactLamp:
    """Logits of pictures for a list of classes.

    Attributes:
        images: the image side.
        text: the text side: one for all images (``text_query=class``), or each image its own.
        logit_scale: CLIP's, a scalar.
    """

    images: ImageEncoder
    text: ClassTexts | TextEncoder
    logit_scale: Tensor

    def __call__(self, images: Tensor) -> Forward:
        """One pass over pictures [B, 3, S, S]."""
        encoded, shared = self.images(images), isinstance(self.text, ClassTexts)
        cosine = encoded.features @ self.text.features.T if shared else self.text.cosine(encoded)
        return Forward(
            logits=self.logit_scale * cosine,
            image_similarity=encoded.similarity,
            text_similarity=self.text.similarity if shared else (),
            selections=Selections.of(
                encoded.counts, len(images), self.text.counts if shared else (), cosine.shape[1]
            ),
        )


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
