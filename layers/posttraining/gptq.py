"""GPTQ (arXiv:2210.17323): round a weight column by column, and let later columns make up for it.

With H = X^T X of the layer's inputs, the error of a rounded column is spread over the columns that
are still to be rounded so that ||X (W - W^)^T||^2 stays least; the weights of the spreading are
rows of the Cholesky factor of H^-1. Any rounding will do.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from layers.names import check_positive

# [N, g] columns of a group -> a function that rounds any of its columns [N, 1]
Fit = Callable[[Tensor], Callable[[Tensor], Tensor]]


def hessian(x: Tensor) -> Tensor:
    """X^T X / T. x: [T, K]. Returns [K, K] float64; the identity where there are no rows."""
    if len(x) == 0:
        return torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    x = x.double()
    return x.T @ x / len(x)


def round_groups(weight: Tensor, fit: Fit, group: int) -> Tensor:
    """Round to nearest, group by group, with no compensation. weight: [N, K]."""
    return torch.cat([fit(part)(part) for part in weight.split(group, dim=1)], dim=1)


def gptq(weight: Tensor, hess: Tensor, fit: Fit, *, group: int, damping: float = 0.01) -> Tensor:
    """Round a weight with compensation; a group's scales are fitted once the ones before are done.

    Args:
        weight: [N, K].
        hess: [K, K] as from `hessian`.
        fit: sees the columns of a group as they then stand, returns how to round one of them.
        group: columns that share scales; also the block within which updates are made at once.
        damping: this share of the mean of H's diagonal is added to it.

    Returns:
        [N, K] in the weight's dtype, on the grid that `fit` rounds to. An input that is zero in
        every row carries nothing, so its column is rounded to nearest as it stands.

    Raises:
        ValueError: sizes that do not fit, a damping or group that is not positive.
    """
    check_positive(group=group, damping=damping)
    n_in = weight.shape[1]
    if hess.shape != (n_in, n_in):
        raise ValueError(f"hess must be [{n_in}, {n_in}], got {list(hess.shape)}")
    spread = _spread(hess, damping)
    left = weight.double().clone()
    rounded = torch.empty_like(left)
    for start in range(0, n_in, group):
        stop = min(start + group, n_in)
        nearest = fit(left[:, start:stop].to(weight.dtype))
        errors = left.new_empty(len(left), stop - start)
        for j in range(start, stop):
            column = left[:, j : j + 1]
            rounded[:, j : j + 1] = nearest(column.to(weight.dtype)).double()
            error = (column - rounded[:, j : j + 1]) / spread[j, j]
            left[:, j + 1 : stop] -= error * spread[j, j + 1 : stop]
            errors[:, j - start : j - start + 1] = error
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return rounded.to(weight.dtype)


def _spread(hess: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped H^-1: [K, K] float64."""
    damped = hess.double().clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal += damping * torch.where(mean > 0, mean, 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
