"""A method whose weights and classes no longer change: what becomes of it in an exported graph.

An exporter takes tensors that a function reads for constants, but refuses parameters that belong to
no module of its own. So a method is served by a copy whose weights are buffers.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lamp_fast.clip.towers import FrozenClip

Value = TypeVar("Value")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Sides:
    """Logits as a product: logit scale * ``pictures(images)`` @ ``classes``.T.

    Attributes:
        pictures: images float32 [B, 3, S, S] to float32 [B, D], the same whatever the classes.
        classes: float32 [C, D].
    """

    pictures: Callable[[Tensor], Tensor]
    classes: Tensor


class Once:
    """In place of a :class:`lamp_fast.methods.base.Memo`: the first value, whatever follows."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def get(self, owner: Any, tensors: Iterable[Tensor], compute: Callable[[], Value]) -> Value:
        """The value of the first call's ``compute()``."""
        if not self.values:
            self.values.append(compute())
        return self.values[0]

    def forget(self) -> None:
        """What does not change is not forgotten."""


def without_parameters(module: Module, replaced: dict[int, Any] | None = None) -> Module:
    """A copy that shares its weights as buffers, of which a graph keeps those alone that it reads.

    Args:
        module: what to copy.
        replaced: by id, what stands in the copy for an object that ``module`` holds.
    """
    plain = {id(weight): weight.detach() for weight in module.parameters()}
    shared = {id(buffer): buffer for buffer in module.buffers()}
    module = copy.deepcopy(module, {**plain, **shared, **(replaced or {})})
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, weight)
    return module


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """Nested dataclasses, lists, tuples and dicts with every floating tensor in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if is_dataclass(value):
        names = [field.name for field in fields(value) if field.init]
        return replace(
            value, **{name: cast_floating(getattr(value, name), dtype) for name in names}
        )
    if isinstance(value, dict):
        return {key: cast_floating(each, dtype) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cast_floating(each, dtype) for each in value)
    return value


def fixed_copy(method: Module, clip: FrozenClip) -> Module:
    """The method over another CLIP, with its own weights as buffers.

    Args:
        method: a :class:`lamp_fast.methods.base.Method`.
        clip: of :func:`without_parameters`, in the precision that the graph is to compute in.
    """
    fixed = without_parameters(method, {id(method.clip): clip, id(method._kept): Once()})
    return fixed.eval()


class Fixable(nn.Module):
    """What an exporter asks of a method; ``classes`` is what its ``prepare`` returned."""

    clip: FrozenClip

    text_per_picture: bool = False
    """Whether every picture has its own text, so that work grows with pictures times classes."""

    no_class_matrix: str | None = "its logits are no product of pictures and classes"
    """Why an exported graph cannot take the classes as a matrix (:meth:`fixed_sides`); None where
    it can."""

    def fixed_sides(self, clip: FrozenClip, classes: Any, adapted: bool = False) -> Sides:
        """Both factors of the logits; asked where :attr:`no_class_matrix` is None.

        Args:
            clip, classes, adapted: as in :meth:`fixed_logits`.
        """
        raise NotImplementedError

    def fixed_logits(
        self, clip: FrozenClip, classes: Any, adapted: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """Pictures [B, 3, S, S] to logits [B, C], for an exporter: weights and classes are
        constants, shapes depend on B alone.

        Args:
            clip: the method's own with buffers for parameters
                (:func:`without_parameters`), perhaps in lower precision.
            classes: of :meth:`prepare`.
            adapted: as in :meth:`logits`.
        """
        if self.no_class_matrix is None:
            sides = self.fixed_sides(clip, classes, adapted)
            return lambda images: clip.logit_scale * sides.pictures(images) @ sides.classes.T
        fixed, size = fixed_copy(self, clip), clip.preprocessing.size
        weight = clip.model.logit_scale
        fixed.logits(weight.new_zeros(1, 3, size, size), classes, adapted)  # fills Once
        return lambda images: fixed.logits(images, classes, adapted)

    def logit_slope(self) -> float:
        """How much a logit changes at most if a picture's normalised features move by 1."""
        return float(self.clip.logit_scale)

    def routes(self, images: Tensor) -> list[Tensor]:
        """What a picture's logits hang on by a choice, not smoothly: int64 [B, any] each."""
        return []
