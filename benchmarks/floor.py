"""The least arithmetic of a LAMP step, in units of CLIP's image forward.

Counts multiply-adds of matrix products over rows that must exist: nothing for normalisation,
activation or memory traffic, so no program reaches it.
"""

from lamp_fast.clip import FrozenClip


def step_floor(
    clip: FrozenClip, images: int, text_rows: int, eot_rows: int, first_layer: int
) -> tuple[float, float]:
    """FLOPs of a training step and of an evaluation over those of the plain image forward.

    Args:
        clip: the towers.
        images: B.
        text_rows: text rows (without bot) that have to be computed, over all images.
        eot_rows: how many of them are read out.
        first_layer: first layer with prompts, from 1; gradients go no lower, and text below it is
            not computed in a step.
    """
    vision, text = clip.vision, clip.text
    tokens = vision.visual.positional_embedding.shape[0]
    patches = (tokens - 1) * images
    embed = patches * vision.visual.conv1.weight[0].numel() * vision.width
    depth = len(vision.blocks)
    full = embed + depth * _layer(vision.width, tokens * images, tokens)
    last = _last_layer(vision.width, tokens * images, images, tokens)
    forward = embed + (depth - 1) * _layer(vision.width, tokens * images, tokens) + last
    backward = (depth - first_layer) * _layer(vision.width, tokens * images, tokens) + last
    # A class row meets some ten keys; its attention is left out.
    text_layers = len(text.blocks) - first_layer
    text_forward = text_layers * _layer(text.width, text_rows, 0)
    text_forward += _last_layer(text.width, text_rows, eot_rows, 0)
    return (forward + backward + 2 * text_forward) / full, (forward + text_forward) / full


def _layer(width: int, rows: int, keys: int) -> int:
    return rows * (12 * width * width + 2 * keys * width)


def _last_layer(width: int, rows: int, read: int, keys: int) -> int:
    """Keys and values of every row; query, output and MLP of the rows that are read."""
    return rows * 2 * width * width + read * (10 * width * width + 2 * keys * width)
