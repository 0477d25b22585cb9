"""The optimiser of a run, its rate by epoch, and the loss of its logits."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from lamp_fast.data.loading import Sampling
from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds, FloatOrNone, IntOrNone
from lamp_fast.methods.base import Criterion
from lamp_fast.runs import losses
from lamp_fast.runs.class_numbers import check_numbers, read_numbers
from lamp_fast.runs.losses import Lade, mean_over_rows

Loss = Literal["ce", "la", "balanced", "ldam", "cb", "grw", "focal", "lade"]


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation, as the peers do it."""

    optimiser: Literal["adamw", "adam", "sgd"] = "adamw"
    """sgd has momentum 0.9, the others betas (0.9, 0.999)."""
    lr: Annotated[float, Bounds(above=0, high=1e30)] = 3e-3
    lr_end: Annotated[float, Bounds(0, 1e30)] = 0.0
    """What the cosine falls towards."""
    lr_per: Literal["epoch", "step"] = "epoch"
    """How often the rate moves along its cosine."""
    weight_decay: Annotated[float, Bounds(0, 1_000_000)] = 5e-4
    eps: Annotated[float, Bounds(above=0, high=1_000_000)] = 1e-8
    """Of adamw and adam."""
    epochs: Annotated[IntOrNone, Bounds(1, 1_000_000)] = 50
    """none: as many as the method's published number of steps is on these data (CLIP-LoRA, 2SFS);
    the run keeps the number."""
    batch: Annotated[int, Bounds(1, 1_000_000_000)] = 4
    """Pictures an optimiser step."""
    accumulate: Annotated[int, Bounds(1, 1_000_000)] = 1
    """Process each batch in this many pieces: less memory, the same step."""
    clip_grad: Annotated[FloatOrNone, Bounds(above=0, high=1_000_000)] = None
    """Largest gradient norm; none leaves gradients alone."""
    warmup_epochs: Annotated[int, Bounds(0, 1_000_000)] = 1
    """Epochs at --warmup-lr first (none where there is only one epoch)."""
    warmup_lr: Annotated[float, Bounds(above=0, high=1e30)] = 1e-5
    loss: Loss = "ce"
    """What is minimised over the logits, for classes of unequal size. ce: cross-entropy. la: of
    logits + tau log prior, which asks for equal accuracy of all classes; balanced: la at tau 1;
    lade: that with a regulariser. ldam: a margin, wider for small classes. cb, grw: weights by the
    effective number of pictures, or by 1 / prior. focal: pictures that are still hard."""
    logit_adjustment: bool = False
    """The same as --loss la (Menon et al. 2020): the tables' "+LA"."""
    tau: Annotated[float, Bounds(0, 1_000_000)] = 1.0
    """Of la, and of Candle's loss: 0 is ce, 1 is right where test classes are of one size."""
    loss_max_margin: Annotated[float, Bounds(0, 1_000)] = 0.5
    """Of ldam: the smallest class's margin, as a cosine; others have n^(-1/4) of it."""
    loss_beta: Annotated[float, Bounds(0, below=1)] = 0.9999
    """Of cb: 0 weighs classes alike, towards 1 it comes to 1 / n."""
    loss_gamma: Annotated[float, Bounds(0, 1_000)] = 2.0
    """Of focal: 0 is ce, more looks away from what is already right."""
    loss_lader: Annotated[float, Bounds(0, 1_000_000)] = 0.1
    """Of lade: how much its regulariser counts."""
    loss_remine: Annotated[float, Bounds(0, 1_000_000)] = 0.1
    """Of lade: how much the regulariser's square counts."""
    class_weights: str = "none"
    """Multiplies each picture's loss by a number of its class: none; auto, N / (C n_c), so that all
    classes weigh alike; or a JSON file {"cat": 2, "dog": 0.5} of all trained classes, whose content
    the run keeps."""
    sampler: Sampling = "shuffle"
    """Which pictures an epoch has: shuffle takes each once; balanced draws as many with
    replacement, every class alike; sqrt lies between, a class by the root of its size."""

    @property
    def criterion(self) -> Loss:
        """The loss, by whichever flag it was asked for."""
        return "la" if self.logit_adjustment else self.loss

    @property
    def splits_batches(self) -> bool:
        """Whether a batch's loss is the mean of its parts', so that they may be taken apart."""
        return self.criterion != "lade"

    def check_together(self) -> None:
        """Refuse settings of the loss that do not go together.

        Raises:
            InputError: naming the first such flag, its value and what was expected.
        """
        if self.logit_adjustment and self.loss not in ("ce", "la"):
            raise InputError(
                f"--loss {self.loss} --logit-adjustment: expected one of the two;"
                " --no-logit-adjustment takes back what --config says"
            )
        if self.criterion == "balanced" and self.tau != 1:
            raise InputError(f"--tau {self.tau}: --loss balanced is la at 1, expected --loss la")
        if self.class_weights != "none" and self.criterion in ("cb", "grw", "lade"):
            raise InputError(
                f"--class-weights: --loss {self.criterion} weighs classes itself, expected none"
            )
        if self.splits_batches:
            return
        whole = f"--loss {self.loss} compares the pictures of a whole batch"
        if self.accumulate > 1:
            raise InputError(f"--accumulate {self.accumulate}: {whole}, expected 1")
        if self.sampler != "shuffle":
            raise InputError(
                f"--sampler {self.sampler}: {whole} drawn as they are, expected shuffle"
            )

    def resolved(self, names: Sequence[str]) -> "OptimConfig":
        """The same with the content of a file of class weights in place of its name, as JSON.

        Raises:
            InputError: a file that is not there, or says something else than a positive number for
                each of the trained classes ``names``.
        """
        if self.class_weights in ("none", "auto"):
            return self
        weights = _given_weights(self.class_weights, names)
        return replace(self, class_weights=json.dumps(weights))

    def describe(self) -> str | None:
        """What of loss and sampling is not the default, in words; None where all is."""
        words = []
        if self.criterion != "ce":
            words.append(f"loss {self.criterion}")
        if self.class_weights != "none":
            words.append(f"class weights {'auto' if self.class_weights == 'auto' else 'given'}")
        if self.sampler != "shuffle":
            words.append(f"sampler {self.sampler}")
        return ", ".join(words) or None


def learning_rate(optim: OptimConfig, epoch: float) -> float:
    """The rate of an epoch (from 0) as the peers step it: constant warm-up, then cosine.

    lr / 2 (1 + cos(pi (e - W) / E)) with E all epochs, W the warm-up ones (none when E is 1), so it
    never reaches 0. With ``lr_end`` the cosine falls from lr towards that. Between two epochs, for
    a rate that moves with every step, ``epoch`` has a part behind the point.
    """
    warmup = optim.warmup_epochs if optim.epochs > 1 else 0
    if epoch < warmup:
        return optim.warmup_lr
    height = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / optim.epochs))
    return optim.lr_end + (optim.lr - optim.lr_end) * height


def _given_weights(given: str, names: Sequence[str]) -> dict[str, float]:
    shown = "--class-weights" if given.lstrip().startswith("{") else f"--class-weights {given}"
    return check_numbers(shown, read_numbers("--class-weights", given), names)


def row_weights(
    optim: OptimConfig, counts: Sequence[int], names: Sequence[str] = ()
) -> Tensor | None:
    """What each class's rows are multiplied by, float64 [C]; None where by nothing.

    Args:
        optim: of a run.
        counts: training pictures of each class.
        names: of the classes; for weights that were given by name.
    """
    sizes = torch.tensor(counts, dtype=torch.float64)
    if optim.criterion == "cb":
        return losses.class_balanced_weights(sizes, optim.loss_beta)
    if optim.criterion == "grw":
        return losses.inverse_weights(sizes)
    if optim.class_weights == "none":
        return None
    if optim.class_weights == "auto":
        return losses.balanced_weights(sizes)
    weights = _given_weights(optim.class_weights, names)
    return torch.tensor([weights[name] for name in names], dtype=torch.float64)


def build_criterion(
    optim: OptimConfig,
    counts: Sequence[int],
    device: torch.device,
    *,
    scale: float = 1.0,
    names: Sequence[str] = (),
) -> Criterion:
    """The loss of a run's logits; see :mod:`lamp_fast.runs.losses`.

    Args:
        optim: of the run.
        counts: training pictures of each class.
        device: where the logits are.
        scale: what cosines are multiplied by to be logits; for margins.
        names: of the classes; for weights that were given by name.
    """
    sizes = torch.tensor(counts, dtype=torch.float64, device=device)
    weights = row_weights(optim, counts, names)
    weights = None if weights is None else weights.to(device)
    kind, adjust, modulate = optim.criterion, None, None
    if kind == "lade":
        return Lade(sizes, optim.loss_remine, optim.loss_lader)
    if kind in ("la", "balanced"):
        adjust = losses.logit_adjustment(sizes, optim.tau if kind == "la" else 1.0)
    elif kind == "ldam":
        adjust = losses.margins(sizes, optim.loss_max_margin, scale)
    elif kind == "focal":
        modulate = losses.focal(optim.loss_gamma)
    return mean_over_rows(adjust, modulate, weights)


def build_optimiser(
    optim: OptimConfig, parameters: Sequence[Tensor], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW or Adam with the paper's betas, or SGD with the peers' momentum.

    On a GPU one fused kernel that reads its rate (and Adam's step count) there, captured or not.
    """
    # torch refuses an optimiser of nothing; a method without parameters takes the same road.
    parameters = parameters or [torch.empty(0, device=device)]
    common = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    if device.type == "cuda":
        common |= {"lr": torch.tensor(optim.lr, device=device), "fused": True}
    if optim.optimiser == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **common)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optim.optimiser]
    return kind(
        parameters,
        betas=(0.9, 0.999),
        eps=optim.eps,
        capturable=device.type == "cuda",
        **common,
    )
