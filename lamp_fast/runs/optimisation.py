"""The optimiser of a run, its rate by epoch, and the loss of its logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lamp_fast.fields import Bounds, FloatOrNone
from lamp_fast.methods.base import Criterion


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
    epochs: Annotated[int, Bounds(1, 1_000_000)] = 50
    batch: Annotated[int, Bounds(1, 1_000_000_000)] = 4
    """Pictures an optimiser step."""
    accumulate: Annotated[int, Bounds(1, 1_000_000)] = 1
    """Process each batch in this many pieces: less memory, the same step."""
    clip_grad: Annotated[FloatOrNone, Bounds(above=0, high=1_000_000)] = None
    """Largest gradient norm; none leaves gradients alone."""
    warmup_epochs: Annotated[int, Bounds(0, 1_000_000)] = 1
    """Epochs at --warmup-lr first (none where there is only one epoch)."""
    warmup_lr: Annotated[float, Bounds(above=0, high=1e30)] = 1e-5
    logit_adjustment: bool = False
    """Add tau * log prior to the training logits (Menon et al. 2020): the tables' "+LA"."""
    tau: Annotated[float, Bounds(0, 1_000_000)] = 1.0


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


def build_criterion(optim: OptimConfig, counts: Sequence[int], device: torch.device) -> Criterion:
    """Cross-entropy, with logit adjustment CE(logits + tau log prior) where it is on."""
    if not optim.logit_adjustment:
        return F.cross_entropy
    prior = torch.tensor(counts, dtype=torch.float64, device=device)
    shift = optim.tau * (prior / prior.sum()).log()
    return lambda logits, labels: F.cross_entropy(logits + shift.to(logits.dtype), labels)


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
