"""The optimiser of a run, its rate by epoch, and the loss of its logits."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lamp_fast.methods.base import Criterion
from lamp_fast.runs import losses
from lamp_fast.runs.losses import Lade, mean_over_rows
from lamp_fast.runs.settings import OptimConfig, given_weights


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
    weights = given_weights(optim.class_weights, names)
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
