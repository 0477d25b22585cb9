"""LAMP as one graph: the exact path over constants, for classes and parameters that stay."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lamp_fast.clip import ClassPrompts, FrozenClip
from lamp_fast.methods.lamp.exact import Pool, TextEncoder
from lamp_fast.methods.lamp.model import Lamp


@torch.no_grad()
def fixed_logits(
    lamp: Lamp, clip: FrozenClip, classes: ClassPrompts, adapted: bool
) -> Callable[[Tensor], Tensor]:
    """Pictures [B, 3, S, S] to logits [B, C] in one piece, whose shapes depend on B alone.

    Pools are projected here, and with ``text_query=class`` the text is computed; with ``image``
    every picture has its own text and shares nothing.

    Args:
        lamp: with trained parameters.
        clip: its CLIP, as the graph is to read it.
        classes: of :meth:`Lamp.prepare`.
        adapted: retrieve with the bias adapted to new classes.
    """
    exact = lamp.exact(classes, adapted, fixed_shapes=True, clip=clip)
    images, text = replace(exact.images, pools=_apart(exact.images.pools)), exact.text
    if isinstance(text, TextEncoder):
        bot = [(keys.clone(), values.clone()) for keys, values in classes.bot]
        classes = replace(classes, bot=bot)
        text = replace(text, pools=_apart(text.pools), classes=classes, block=None)
    exact = replace(exact, images=images, text=text)
    return lambda pictures: exact(pictures).logits


def _apart(pools: Mapping[int, Pool]) -> dict[int, Pool]:
    """The same in tensors of their own: views of one storage cannot be stored alone."""
    return {
        layer: replace(
            pool, bias=pool.bias.clone(), keys=pool.keys.clone(), values=pool.values.clone()
        )
        for layer, pool in pools.items()
    }
