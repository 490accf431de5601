"""Quantiles of a standard normal: how many deviations above the mean k of n entries begin."""

import math
from statistics import NormalDist

import torch
from torch import Tensor

STEPS = 40  # to a double's precision for shares down to 1e-12


def quantile(k: float, n: int) -> float:
    """z = Q(1 - k / n), -inf for k >= n."""
    return NormalDist().inv_cdf(1 - k / n) if k < n else float("-inf")


def quantiles(k: float, n: Tensor) -> Tensor:
    """`quantile` of many n, float32. n: int64 of any shape; 0 gives -inf."""
    share = (1 - k / n.clamp_min(1).double()).clamp_min(0)
    return torch.special.ndtri(share).float()


def quantile_table(k: float, n_max: int) -> Tensor:
    """[n_max + 1] float32, z of rows with n = 0, 1, ..., n_max valid entries; -inf where n <= k."""
    return quantiles(k, torch.arange(n_max + 1))


def quantile_here(k: float, n: int, device: torch.device) -> float | Tensor:
    """`quantile`; a tensor in a compiled graph whose n differs from call to call."""
    if not torch.compiler.is_compiling():
        return quantile(k, n)
    # here, since it imports the compiler
    from torch.fx.experimental.symbolic_shapes import has_static_value

    if has_static_value(n) and not isinstance(k, torch.SymInt | torch.SymFloat):
        return _traced(k, n)
    return quantiles(k, torch.full((), n, device=device))


def _traced(k: float, n: int) -> float:
    """`quantile` in steps that a compiler follows, which cannot look into `NormalDist`.

    A tensor's own computation would be fused into the loop over the entries, once for each of them.
    Newton's steps from 0 never pass the root, as the tail is convex there.
    """
    if k >= n:
        return float("-inf")
    share = min(k / n, 1 - k / n)
    z = 0.0
    for _ in range(STEPS):
        tail = math.erfc(z / math.sqrt(2)) / 2
        z += (tail - share) * math.sqrt(2 * math.pi) * math.exp(z * z / 2)
    return z if k / n <= 0.5 else -z
