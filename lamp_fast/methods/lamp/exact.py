"""LAMP without the provably redundant work; equal to ``literal`` to rounding.

Prompts are keys and values only, each pool is projected once a layer and then indexed, text is cut
after the last eot, and text layers below the first prompt come prepared (SPEC, "Prompts and
attention", 1, 2, 4, 5, 8).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lamp_fast import ops
from lamp_fast.clip import Block
from lamp_fast.methods.lamp.state import Forward, LampClasses, Selections


def forward(lamp, images: Tensor, classes: LampClasses, bias: tuple[Tensor, Tensor]) -> Forward:
    """Logits [B, C], similarities and selections; see :class:`Forward`."""
    image_bias, text_bias = bias
    features, routes, image_similarity, image_counts = encode_images(lamp, images, image_bias)
    features = F.normalize(features, dim=-1)
    text_similarity, text_counts = [], []
    if lamp.config.text_query == "class":
        text, text_similarity, text_counts = encode_class_texts(lamp, classes, text_bias)
        cosine = features @ F.normalize(text, dim=-1).T
    else:
        cosine = _cosine_in_blocks(lamp, features, routes, classes)
    return Forward(
        logits=lamp.clip.logit_scale * cosine,
        image_similarity=image_similarity,
        text_similarity=text_similarity,
        selections=Selections.of(image_counts, len(images), text_counts, len(classes)),
    )


def encode_images(
    lamp, images: Tensor, bias: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Image features [B, Ds]; per selected layer the chosen rows [B, K + S], similarity and counts.

    Args:
        lamp: the model.
        images: [B, 3, S, S].
        bias: float32 [layers, M].
    """
    vision = lamp.clip.vision
    x = vision.embed(images)
    routes, similarities, counts = [], [], []
    for number, block in enumerate(vision.blocks, 1):
        prompts = lamp.prompts_of(number)
        if prompts is None:
            x = block(x)
            continue
        rows = prompts.visual_rows()
        route, similarity, chosen = _route(lamp, x[:, 0], rows, bias, number)
        x = block(x, _prefix(block, rows.to(x.dtype), route))
        routes.append(route)
        similarities += similarity
        counts += chosen
    return vision.readout(x[:, 0]), routes, similarities, counts


def encode_class_texts(
    lamp, classes: LampClasses, bias: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Text features [C, Ds] where each class retrieves with its own eot, similarity and counts."""
    x = classes.states
    index = torch.arange(len(x), device=x.device)
    similarities, counts = [], []
    for number, block in lamp.prompted_text_blocks():
        prompts = lamp.prompts_of(number)
        if prompts is None:
            x = block(x, causal=True)
            continue
        rows = prompts.text_rows()
        route, similarity, chosen = _route(lamp, x[index, classes.tokens.eot], rows, bias, number)
        x = block(x, _prefix(block, rows.to(x.dtype), route), causal=True, blind=1)
        similarities += similarity
        counts += chosen
    return lamp.clip.text.readout(x[index, classes.tokens.eot]), similarities, counts


def _cosine_in_blocks(lamp, features: Tensor, routes: list[Tensor], classes) -> Tensor:
    """Cosine [B, C] of normalised features with each image's own text features.

    Under ``no_grad`` the (image, class) pairs are taken in blocks of at most ``lamp.pair_block``,
    so that memory does not grow with the number of classes.
    """
    pools = [
        block.prefix(lamp.prompts_of(number).text_rows().to(features.dtype))
        for number, block in lamp.prompted_text_blocks()
        if lamp.prompts_of(number) is not None
    ]
    images, count = len(features), len(classes)
    limit = images * count if torch.is_grad_enabled() else lamp.pair_block
    class_block = max(1, min(count, limit))
    image_block = max(1, limit // class_block)
    rows = []
    for first in range(0, images, image_block):
        some = slice(first, first + image_block)
        chosen = [route[some] for route in routes]
        columns = []
        for start in range(0, count, class_block):
            text = _encode_pairs(lamp, pools, chosen, classes, slice(start, start + class_block))
            text = F.normalize(text, dim=-1)
            columns.append(torch.einsum("bd,bcd->bc", features[some], text))
        rows.append(torch.cat(columns, dim=1))
    return torch.cat(rows) if rows else features.new_zeros(0, count)


def _encode_pairs(lamp, pools, routes, classes: LampClasses, which: slice) -> Tensor:
    """Text features [b, c, Ds] of b images' prompts with the classes ``which``."""
    states, eot = classes.states[which], classes.tokens.eot[which]
    images = len(routes[0])
    x = states.expand(images, -1, -1, -1).flatten(0, 1)  # [b c, L, Dt], an image's classes together
    prompted = iter(zip(pools, routes, strict=True))
    for number, block in lamp.prompted_text_blocks():
        if lamp.prompts_of(number) is None:
            x = block(x, causal=True)
            continue
        (keys, values), route = next(prompted)
        x = block(x, (keys[route], values[route]), causal=True, blind=1)
    x = x.unflatten(0, (images, len(states)))
    index = torch.arange(len(states), device=x.device)
    return lamp.clip.text.readout(x[:, index, eot])


def _route(lamp, queries: Tensor, rows: Tensor, bias: Tensor, number: int):
    """Retrieve from the first M rows and append the shared ones: route int64 [B, K + S].

    Similarity and counts come as lists of one element, or empty without a pool.
    """
    config = lamp.config
    pool_size = len(rows) - (config.s if config.msp else 0)
    shared = torch.arange(pool_size, len(rows), device=rows.device).expand(len(queries), -1)
    if not config.mpp:
        return shared, [], []
    keys = rows[:pool_size]
    queries = queries.to(keys.dtype)
    layer_bias = bias[config.layers.index(number)]
    indices, similarity, counts = ops.retrieve(queries, keys, layer_bias, config.k)
    if config.lbo_count == "unbiased":
        with torch.no_grad():
            counts = ops.retrieve(queries, keys, torch.zeros_like(layer_bias), config.k)[2]
    return torch.cat([indices, shared], dim=1), [similarity], [counts]


def _prefix(block: Block, rows: Tensor, route: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, K + S, H, d] of each query's route: project once, then index."""
    keys, values = block.prefix(rows)
    return keys[route], values[route]
