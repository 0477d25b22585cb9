"""Losses of logits for training sets whose classes differ in size.

z are logits [B, C], y labels int64 [B], n_c the training pictures of class c, N their sum, and
pi_c = n_c / N. Every loss here but :class:`Lade` is

    1/B sum_b w_{y_b} g(CE(adjust(z_b), y_b)),

a mean over rows of terms that know their own row alone. So a batch in pieces, or on several ranks,
gives the loss of the whole batch. Class weights multiply a row's term and the mean stays one over
rows: torch's ``weight=`` divides by the weights of the labels at hand, which pieces do not share.

Nothing here waits for the device, so a step stays one CUDA graph.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lamp_fast.methods.base import Criterion

# (z [B, C], y [B]) -> [B, C].
Adjust = Callable[[Tensor, Tensor], Tensor]
# Cross-entropies [B] -> [B].
Modulate = Callable[[Tensor], Tensor]


def mean_over_rows(
    adjust: Adjust | None = None, modulate: Modulate | None = None, weights: Tensor | None = None
) -> Criterion:
    """1/B sum_b w_{y_b} g(CE(adjust(z_b), y_b)); the plain cross-entropy without arguments.

    Args:
        adjust: of the logits, for the loss alone.
        modulate: g, of each row's cross-entropy.
        weights: w, [C].
    """
    if modulate is None and weights is None:
        if adjust is None:
            return F.cross_entropy
        return lambda logits, labels: F.cross_entropy(adjust(logits, labels), labels)

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        adjusted = logits if adjust is None else adjust(logits, labels)
        terms = F.cross_entropy(adjusted, labels, reduction="none")
        if modulate is not None:
            terms = modulate(terms)
        if weights is not None:
            terms = weights.to(terms.dtype)[labels] * terms
        return terms.mean()

    return criterion


def logit_adjustment(counts: Tensor, tau: float) -> Adjust:
    """z_c + tau log pi_c: logit adjustment (Menon et al., "Long-Tail Learning via Logit
    Adjustment", ICLR 2021); at tau = 1 balanced softmax (Ren et al., "Balanced Meta-Softmax for
    Long-Tailed Visual Recognition", NeurIPS 2020).

    Args:
        counts: float64 [C].
        tau: 0 leaves the logits alone.
    """
    shift = tau * (counts / counts.sum()).log()
    return lambda logits, labels: logits + shift.to(logits.dtype)


def margins(counts: Tensor, max_margin: float, scale: float) -> Adjust:
    """z_y - s m_y, m_c = max_margin (n_c / min_j n_j)^(-1/4): LDAM (Cao et al., "Learning
    Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019).

    The margin is one of cosines, so it is multiplied by the scale s that makes them logits.

    Args:
        counts: float64 [C].
        max_margin: of the smallest class.
        scale: s.
    """
    scaled = scale * max_margin * (counts / counts.min()) ** -0.25
    classes = torch.arange(len(counts), device=counts.device)

    def adjust(logits: Tensor, labels: Tensor) -> Tensor:
        return logits - scaled.to(logits.dtype) * (labels[:, None] == classes)

    return adjust


def focal(gamma: float) -> Modulate:
    """(1 - p_y)^gamma CE, p_y = exp(-CE) (Lin et al., "Focal Loss for Dense Object Detection",
    ICCV 2017), without that paper's class weight alpha."""

    def modulate(terms: Tensor) -> Tensor:
        # A power below 1 has no slope at 0, which certain rows reach by rounding.
        terms = terms.clamp_min(torch.finfo(terms.dtype).tiny)
        return (-torch.expm1(-terms)) ** gamma * terms

    return modulate


def class_balanced_weights(counts: Tensor, beta: float) -> Tensor:
    """w_c proportional to (1 - beta) / (1 - beta^n_c), of mean 1 over classes (Cui et al.,
    "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019).

    Args:
        counts: float64 [C].
        beta: in [0, 1); 0 weighs all classes alike, towards 1 it comes to 1 / n_c.
    """
    log_beta = torch.tensor(beta, dtype=torch.float64, device=counts.device).log()
    weights = (1 - beta) / -torch.expm1(counts * log_beta)
    return weights / weights.mean()


def inverse_weights(counts: Tensor) -> Tensor:
    """w_c proportional to 1 / pi_c, of mean 1 over classes: generalised re-weighting (Zhang et
    al., "Distribution Alignment", CVPR 2021) at exponent 1, scaled as LIFT does it.

    Args:
        counts: float64 [C].
    """
    weights = 1 / counts
    return weights / weights.mean()


def balanced_weights(counts: Tensor) -> Tensor:
    """w_c = N / (C n_c), of mean 1 over pictures: what scikit-learn calls "balanced".

    Args:
        counts: float64 [C].
    """
    return counts.mean() / counts


class Lade:
    """LADE (Hong et al., "Disentangling Label Distribution for Long-Tailed Visual Recognition",
    CVPR 2021, Eqs. 16 to 20): balanced softmax and a regulariser that draws exp(z_c) to
    p_u(x | c) / p_u(x), p_u the distribution with classes of one size.

        L = CE(z + log pi, y) + weight sum_c pi_c (l_c + remine l_c^2 - f_c)
        f_c = mean of z_bc over the rows of class c, 0 where the batch has none
        l_c = log(1/B sum_b exp(z_bc) / (C pi_{y_b}))

    f_c - l_c is the Donsker-Varadhan bound of KL(p_u(x | c), p_u(x)), whose optimum is that ratio;
    1 / (C pi_{y_b}) makes pictures drawn as they are stand for p_u(x). The public code has a factor
    1 / (C pi_c) in its place, of the column's class and not of the picture's. l_c^2 holds the
    constant that the bound leaves free.

    f_c and l_c are of a whole batch, so the loss of a batch is no mean of the losses of its parts.

    Args:
        counts: float64 [C].
        remine: of the square.
        weight: of the regulariser.
    """

    def __init__(self, counts: Tensor, remine: float, weight: float) -> None:
        self.prior = counts / counts.sum()
        self.balanced = mean_over_rows(logit_adjustment(counts, 1.0))
        self.log_importance = -(len(counts) * self.prior).log()
        self.classes = torch.arange(len(counts), device=counts.device)
        self.remine, self.weight = remine, weight

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        own = labels[:, None] == self.classes
        first = (logits * own).sum(0) / own.sum(0).clamp_min(1)
        importance = self.log_importance.to(logits.dtype)[labels][:, None]
        second = (logits + importance).logsumexp(0) - math.log(len(logits))
        bounds = second + self.remine * second.square() - first
        regulariser = (self.prior.to(logits.dtype) * bounds).sum()
        return self.balanced(logits, labels) + self.weight * regulariser
