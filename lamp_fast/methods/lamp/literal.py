"""LAMP as the paper prints it: prompts are tokens, every class is encoded for every picture.

Slow and obvious: the oracle of the ``exact`` path. It runs open_clip's own blocks on concatenated
sequences of 77 + P tokens, drops the prompts' outputs before the next layer (Eq. 7), and retrieves
with plain torch, so it shares no code with what it checks beyond the learned parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lamp_fast.clip.towers import at_least_float32
from lamp_fast.methods.lamp.prompts import LayerPrompts
from lamp_fast.methods.lamp.state import Forward, Selections


def forward(lamp, images: Tensor, classes, bias: tuple[Tensor, Tensor]) -> Forward:
    """Logits [B, C], similarities and selections; see :class:`Forward`."""
    clip, config = lamp.clip, lamp.config
    image_bias, text_bias = bias
    features, retrieved, image_similarity, image_counts = _encode_images(lamp, images, image_bias)
    ids, eot = classes.tokens.ids, classes.tokens.eot
    text_similarity, text_counts = [], []
    if config.text_query == "class":
        text, text_similarity, text_counts = _encode_class_texts(lamp, ids, eot, text_bias)
        text = text.expand(len(images), -1, -1)
    else:
        per_image = [
            _encode_texts_for_image(lamp, ids, eot, [chosen[image] for chosen in retrieved])
            for image in range(len(images))
        ]
        text = (
            torch.stack(per_image)
            if per_image
            else features.new_zeros(0, len(ids), features.shape[-1])
        )
    cosine = torch.einsum("bd,bcd->bc", F.normalize(features, dim=-1), F.normalize(text, dim=-1))
    return Forward(
        logits=clip.logit_scale * cosine,
        image_similarity=image_similarity,
        text_similarity=text_similarity,
        selections=Selections.of(image_counts, len(images), text_counts, len(ids)),
    )


def _encode_images(lamp, images, image_bias):
    visual = lamp.clip.model.visual
    x = visual._embeds(images)
    chosen_by_layer, similarities, counts = [], [], []
    for number, block in enumerate(visual.transformer.resblocks, 1):
        prompts = lamp.prompts_of(number)
        if prompts is None:
            x = block(x)
            continue
        chosen = _retrieve(lamp, prompts.visual_rows, x[:, 0], image_bias, number)
        rows = prompts.visual_rows()
        if lamp.config.mpp:
            similarities.append(chosen.similarity)
            counts.append(chosen.counts)
        inserted = _with_shared(prompts, rows, chosen.indices).to(x.dtype)  # [B, P, Dv]
        length = x.shape[1]
        x = block(torch.cat([x, inserted], dim=1))[:, :length]
        chosen_by_layer.append(chosen.indices)
    return lamp.clip.vision.readout(x[:, 0]), chosen_by_layer, similarities, counts


def _encode_texts_for_image(lamp, ids, eot, chosen_by_layer):
    """One text pass per class, with the prompts that one image retrieved: [C, Ds]."""
    passes = []
    for class_ids, position in zip(ids, eot, strict=True):
        x = lamp.clip.text.embed(class_ids[None])
        chosen = iter(chosen_by_layer)
        for number, block in enumerate(_text_blocks(lamp.clip), 1):
            prompts = lamp.prompts_of(number)
            inserted = (
                None
                if prompts is None
                else _with_shared(prompts, prompts.text_rows(), next(chosen)[None])
            )
            x = _text_block(block, x, inserted)
        passes.append(lamp.clip.text.readout(x[0, position]))
    return torch.stack(passes)


def _encode_class_texts(lamp, ids, eot, text_bias):
    """Each class retrieves from T with its own eot token: features [C, Ds]."""
    x = lamp.clip.text.embed(ids)
    classes = torch.arange(len(ids), device=ids.device)
    similarities, counts = [], []
    for number, block in enumerate(_text_blocks(lamp.clip), 1):
        prompts = lamp.prompts_of(number)
        if prompts is None:
            x = _text_block(block, x, None)
            continue
        chosen = _retrieve(lamp, prompts.text_rows, x[classes, eot], text_bias, number)
        if lamp.config.mpp:
            similarities.append(chosen.similarity)
            counts.append(chosen.counts)
        x = _text_block(block, x, _with_shared(prompts, prompts.text_rows(), chosen.indices))
    return lamp.clip.text.readout(x[classes, eot]), similarities, counts


def _text_blocks(clip):
    return clip.text.text.transformer.resblocks


def _text_block(block, x, inserted):
    """[bot, P, T, eot, padding] through one causal block; P's outputs are dropped."""
    if inserted is None:
        return block(x, attn_mask=_causal_mask(x.shape[1], x))
    prompts = inserted.to(x.dtype).expand(len(x), -1, -1)
    sequence = torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1)
    out = block(sequence, attn_mask=_causal_mask(sequence.shape[1], x))
    return torch.cat([out[:, :1], out[:, 1 + prompts.shape[1] :]], dim=1)


def _causal_mask(length, like):
    mask = torch.full((length, length), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu(1)


class _Chosen:
    def __init__(self, indices, similarity, counts):
        self.indices, self.similarity, self.counts = indices, similarity, counts


def _retrieve(lamp, rows, queries, bias_by_layer, layer_number) -> _Chosen:
    """Eq. 4 and 8: the K entries of largest cosine + bias, lower index first on ties."""
    config = lamp.config
    if not config.mpp:
        none = queries.new_zeros((len(queries), 0), dtype=torch.int64)
        return _Chosen(none, None, None)
    keys = rows()[: config.m]
    queries = at_least_float32(queries)
    if config.similarity_gradient == "keys":
        queries = queries.detach()
    cosine = F.cosine_similarity(queries[:, None], keys[None], dim=-1)
    bias = bias_by_layer[lamp.config.layers.index(layer_number)]
    indices = _top(cosine.detach() + bias, config.k)
    counted = indices if config.lbo_count == "biased" else _top(cosine.detach(), config.k)
    counts = torch.bincount(counted.flatten(), minlength=config.m)
    return _Chosen(indices, cosine.gather(1, indices), counts)


def _top(scores, k):
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def _with_shared(prompts: LayerPrompts, rows: Tensor, indices: Tensor) -> Tensor:
    """[retrieved; shared] of each query: [B, K + S, width]."""
    shared = rows[len(prompts.visual_pool) :].expand(len(indices), -1, -1)
    return torch.cat([rows[indices], shared], dim=1)
