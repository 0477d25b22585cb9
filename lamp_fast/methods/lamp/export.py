"""LAMP as one graph: the exact path over constants, for classes and parameters that stay."""

from collections.abc import Mapping
from dataclasses import replace

from lamp_fast.methods.lamp.exact import ExactLamp, Pool, TextEncoder


def apart(exact: ExactLamp) -> ExactLamp:
    """The same in one piece and in tensors of their own: views of one storage cannot be stored
    alone."""
    images, text = replace(exact.images, pools=_apart(exact.images.pools)), exact.text
    if isinstance(text, TextEncoder):
        bot = [(keys.clone(), values.clone()) for keys, values in text.classes.bot]
        classes = replace(text.classes, bot=bot)
        text = replace(text, pools=_apart(text.pools), classes=classes, block=None)
    return replace(exact, images=images, text=text)


def _apart(pools: Mapping[int, Pool]) -> dict[int, Pool]:
    return {
        layer: replace(
            pool,
            rows=pool.rows.detach(),
            bias=pool.bias.clone(),
            keys=pool.keys.clone(),
            values=pool.values.clone(),
        )
        for layer, pool in pools.items()
    }
