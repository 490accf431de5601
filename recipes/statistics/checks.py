"""Is the form of a law right? Hold-outs, and residuals that bend (comparison.md 6.3, point 5)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr

from recipes.statistics.bootstrap import Array
from recipes.statistics.scaling import Runs, fit_chinchilla, fit_frontier

LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """What a law says of the largest budget from all smaller ones. Use it once."""

    at: float  # the budget left out
    predicted: float  # mean over its runs
    measured: float
    sigmas: float | None  # (measured - predicted) in standard errors of the measured mean

    @property
    def error(self) -> float:
        """measured - predicted."""
        return self.measured - self.predicted


def hold_out_frontier(runs: Runs, *, sigma: float | None = None) -> HoldOut:
    """l = E + A x^-a without the largest x, held against it.

    Args:
        runs: four different x at least.
        sigma: standard deviation of one run's loss; None: the error is not put in terms of it.
    """
    kept, left, top = _without_top(runs, runs.x)
    return _held(top, fit_frontier(kept).frontier().loss(left.x), left.loss, sigma)


def hold_out_chinchilla(
    runs: Runs, *, compute: ArrayLike | None = None, sigma: float | None = None
) -> HoldOut:
    """l = E + A N^-alpha + B D^-beta without the largest compute, held against it.

    Args:
        runs: x is [n, 2], parameters and tokens.
        compute: [n], the budget of each run; None: N D.
        sigma: as in `hold_out_frontier`.
    """
    budgets = runs.x.prod(1) if compute is None else np.asarray(compute, dtype=np.float64)
    kept, left, top = _without_top(runs, budgets)
    return _held(top, fit_chinchilla(kept).chinchilla().loss(*left.x.T), left.loss, sigma)


def _without_top(runs: Runs, budgets: Array) -> tuple[Runs, Runs, float]:
    top = float(budgets.max())
    out = budgets > top * (1 - 1e-9)
    kept, left = (Runs(x=runs.x[mask], loss=runs.loss[mask]) for mask in (~out, out))
    return kept, left, top


def _held(top: float, predicted: Array, measured: Array, sigma: float | None) -> HoldOut:
    off = float(measured.mean() - predicted.mean())
    return HoldOut(
        at=top,
        predicted=float(predicted.mean()),
        measured=float(measured.mean()),
        sigmas=None if sigma is None else off / sigma * len(measured) ** 0.5,
    )


@dataclass(frozen=True, kw_only=True)
class Bend:
    """How residuals curve along an input."""

    curvature: float  # of ln(loss) per (ln x)^2
    p: float  # two-sided, that a straight form would show as much

    @property
    def bent(self) -> bool:
        """Whether the form is wrong along this input, beyond the noise."""
        return self.p <= LEVEL


def bend(residuals: ArrayLike, x: ArrayLike) -> Bend:
    """t-test of the quadratic term of residuals over ln x: curvature means a wrong form.

    Args:
        residuals: [n], ln(measured) - ln(fitted), as in `Fit.residuals`.
        x: [n], any input that the residuals should not follow: N, D, D / N, C; four different
            values at least.
    """
    y, logs = np.asarray(residuals, dtype=np.float64), np.log(np.asarray(x, dtype=np.float64))
    if len(y) != len(logs) or len(np.unique(logs)) < 4:
        raise ValueError(f"needs four different x, one per residual, got {len(np.unique(logs))}")
    u = logs - logs.mean()
    design = np.stack([np.ones_like(u), u, u**2], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ y
    df = len(y) - 3
    error = np.sqrt(((y - design @ coefficients) ** 2).sum() / df * inverse[2, 2])
    t = abs(coefficients[2]) / max(error, 1e-300)
    return Bend(curvature=float(coefficients[2]), p=float(2 * stdtr(df, -t)))
