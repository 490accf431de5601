"""How sharply the loss rises around the logits of the last token (precision.md section 14).

arXiv:2405.18710 perturbs logits in place of weights, so that the forward pass of an evaluation is
enough, and finds that it rises before a run diverges. Its formula was not found; this is metric
2.1 of Keskar et al. (arXiv:1609.04836) with the logits y as what is perturbed:

    phi = 100 * (max over |z_i| <= eps (|y_i| + 1) of L(y + z) - L(y)) / (1 + L(y))

Cross-entropy never falls as a wrong logit rises (dL/dy_i = p_i) nor as the right one falls
(dL/dy_t = p_t - 1), so the maximum is at one corner: all wrong logits up, the right one down.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from layers.names import check_positive
from recipes.batches import Batch

EPS = 1e-3  # the larger of the two that Keskar et al. report


def worst_logits(logits: Tensor, targets: Tensor, eps: float = EPS) -> Tensor:
    """Of all logits within eps (|y_i| + 1) of `logits`, those of the largest cross-entropy.

    Args:
        logits: [N, V].
        targets: [N] int64.
        eps: relative reach of the perturbation.

    Returns:
        [N, V] in float64: the rise is a small difference of two losses.

    Raises:
        ValueError: eps is not positive.
    """
    check_positive(sharpness_eps=eps)
    y = logits.double()
    up = torch.ones_like(y).scatter(-1, targets[..., None], -1.0)
    return y + up * eps * (y.abs() + 1)


def loss_and_rise(logits: Tensor, targets: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token and by how much the worst perturbation raises it: two [N].

    Both in nats, float64. Shapes and errors as in `worst_logits`.
    """
    loss = F.cross_entropy(logits.double(), targets, reduction="none")
    worst = F.cross_entropy(worst_logits(logits, targets, eps), targets, reduction="none")
    return loss, worst - loss


def sharpness(logits: Tensor, targets: Tensor, eps: float = EPS) -> float:
    """phi, in percent, of the mean loss over N tokens; NaN for none.

    The mean's maximum is the mean of the maxima, as each token has logits of its own.
    Shapes and errors as in `worst_logits`.
    """
    loss, rise = loss_and_rise(logits, targets, eps)
    return phi(loss.mean().item(), rise.mean().item())


def phi(loss: float, rise: float) -> float:
    """The metric from the mean loss and its mean rise, in nats."""
    return 100 * rise / (1 + loss)


class Sharpness(Metric):
    """phi over the last judged token of every sequence of an evaluation, all domains together."""

    full_state_update = False
    loss: Tensor  # float64, summed
    rise: Tensor  # float64, summed
    n_tokens: Tensor  # int64

    def __init__(self, eps: float = EPS):
        super().__init__()
        check_positive(sharpness_eps=eps)
        self.eps = eps
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("loss", zero, dist_reduce_fx="sum")
        self.add_state("rise", zero.clone(), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Add a batch. logits: [B, S, V]."""
        rows, last = last_tokens(batch)
        loss, rise = loss_and_rise(logits[rows, last], batch.targets[rows, last], self.eps)
        self.loss += loss.sum()
        self.rise += rise.sum()
        self.n_tokens += len(rows)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and rise, summed, and tokens, over all processes."""
        return self.loss, self.rise, self.n_tokens

    def value(self) -> float:
        """phi of everything added so far; NaN where nothing was."""
        loss, rise, n = (part.item() for part in cast("tuple[Tensor, ...]", self.compute()))
        return phi(loss / n, rise / n) if n else math.nan


def last_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Sequences with a judged token, and the place of the last one in each: two [n] int64."""
    n, s = batch.targets.shape
    device = batch.targets.device
    judged = batch.judged
    if judged is None:
        return torch.arange(n, device=device), torch.full((n,), s - 1, device=device)
    place = torch.arange(1, s + 1, device=device)
    last = (judged * place).amax(1) - 1  # [B], -1 where none is judged
    rows = (last >= 0).nonzero()[:, 0]
    return rows, last[rows]
