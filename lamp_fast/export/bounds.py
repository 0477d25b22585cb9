"""How far an exported graph may lie from its method, and how far it lies.

Every bound is a relative error of the picture's features, which :func:`tolerance` takes to logits.
The assumptions are the same for all precisions: roundings are independent, so that they add up as a
walk does, and pre-norm blocks pass earlier errors on without enlarging them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lamp_fast.classifier import Classifier
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.export.graphs import ACTIVATION_STEPS, WEIGHT_STEPS
from lamp_fast.export.settings import CHECKED_BATCHES
from lamp_fast.methods.base import Method

# Draws of a picture before one is taken whose retrieval hangs on a rounding.
_DRAWS = 16
_ROUNDINGS_A_BLOCK = 16


@dataclass(frozen=True)
class Comparison:
    """An exported graph beside its method, over the same pictures.

    Attributes:
        difference: the largest of logits; infinity for NaN and for another shape.
        agreement: of how many pictures both name the same class first, 0..1.
    """

    difference: float
    agreement: float


def float32_error(clip: FrozenClip) -> float:
    """Relative error of features between two correct programs in float32.

    Each of N blocks (both towers) adds to the residual stream sums of at most n = 4 width terms,
    whose roundings, of 2^-24 each, walk to about sqrt(n) 2^-24 of their size. So features differ by
    about N sqrt(n) 2^-24 of their length.
    """
    terms = 4 * max(clip.vision.width, clip.text.width)
    return _blocks(clip) * terms**0.5 * 2.0**-24


def float16_error(clip: FrozenClip) -> float:
    """Relative error of features of towers in float16.

    Products of float16 are summed in float32 and rounded once, so a sum of any length is off by
    2^-11 of its size, and so are its factors. On the way through a block there are at most 16 such
    roundings: two norms, four weights, four products, attention's scores, weights and sum, the
    activation, and two additions. Over N blocks they walk to sqrt(16 N) 2^-11.
    """
    return (_ROUNDINGS_A_BLOCK * _blocks(clip)) ** 0.5 * 2.0**-11


def int8_error(program: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Relative error of features with every product quantised as ``quantise`` does.

    A value rounded to a step s is off by s / sqrt(12) in the mean, which is s / (sqrt(12) rms) of
    its size; a sum of products of such values is off by as much, relative to itself. Activations
    have the step (max - min) / 255 of the whole tensor, a weight's output channel 2 max / 128. The
    products of ``program`` on ``inputs`` give both, and all of them together a walk.

    What follows for logits is loose: with steps this coarse it reaches the logits' own spread. It
    tells a graph that is broken from one that is rounded, not whether the rounding is harmless;
    :attr:`Comparison.agreement` is measured for that.

    Args:
        program: the float32 module.
        inputs: of it.
    """
    with _ProductSteps() as steps, torch.no_grad():
        program(*inputs)
    return steps.total**0.5


def tolerance(method: Method, error: float | None = None) -> float:
    """How far logits can lie apart if features do by ``error`` of their length, by default
    :func:`float32_error`.

    Normalised, they differ by no more than twice that, and logits by the method's
    :meth:`~lamp_fast.methods.Method.logit_slope` times as much.
    """
    return method.logit_slope() * 2 * (float32_error(method.clip) if error is None else error)


def random_pictures(classifier: Classifier, count: int, error: float = 1e-5) -> Tensor:
    """Seeded noise, float32 [count, 3, S, S], normalised as pictures are.

    Pictures whose retrieval hangs on a relative ``error`` are redrawn: of two all but equal scores
    either may win, and the logits then differ by more than any rounding.
    """
    method = classifier.method
    size = method.clip.preprocessing.size
    generator = torch.Generator().manual_seed(count)
    kept: list[Tensor] = []
    draws = 0
    while len(kept) < count:
        draws += 1
        picture = torch.randn(1, 3, size, size, generator=generator)
        noise = error * torch.randn(picture.shape, generator=generator)
        steady = _equal(method.routes(picture), method.routes(picture + noise))
        if steady or draws > _DRAWS * count:
            kept.append(picture)
    return torch.cat(kept)


def compare(
    program: Callable[[Tensor], Tensor],
    oracle: Callable[[Tensor], Tensor],
    classifier: Classifier,
    error: float = 1e-5,
) -> Comparison:
    """Both on random pictures, at every size in :data:`CHECKED_BATCHES`."""
    differences, same = [], []
    for count in CHECKED_BATCHES:
        images = random_pictures(classifier, count, error)
        expected, got = oracle(images), program(images)
        if got.shape != expected.shape:
            return Comparison(float("inf"), 0.0)
        difference = (got.double() - expected.double()).abs().max()
        differences.append(float(difference.nan_to_num(float("inf"))))
        same += (got.argmax(1) == expected.argmax(1)).tolist()
    return Comparison(max(differences), sum(same) / len(same))


class _ProductSteps(TorchFunctionMode):
    """Adds up, over the products that are computed, the squared relative error of rounding both
    factors to their quantisation steps."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.linear, torch.Tensor.matmul, torch.Tensor.__matmul__):
            x, weight = args[:2]
            columns = weight if function is F.linear else weight.mT  # [.., out, in]
            self.total += float(_squared_error((x.max() - x.min()) / ACTIVATION_STEPS, x))
            step = 2 * columns.abs().amax(-1, keepdim=True) / WEIGHT_STEPS
            self.total += float(_squared_error(step, columns))
        return function(*args, **(kwargs or {}))


def _squared_error(step: Tensor, values: Tensor) -> Tensor:
    """Mean square of rounding ``values`` to ``step``, of their own mean square; 0 of zeros."""
    own = values.square().mean()
    return (step.square().mean() / 12 / own).nan_to_num()


def _blocks(clip: FrozenClip) -> int:
    return len(clip.vision.blocks) + len(clip.text.blocks)


def _equal(routes: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(routes, others, strict=True))
