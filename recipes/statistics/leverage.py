"""How much more a baseline must spend to reach a variant's loss (comparison.md 6.4).

Over compute this is the efficiency leverage, over tokens or seconds at one model the token and time
leverage, over parameters at one token count N_eff / N: the curve's x says which.
"""

from dataclasses import dataclass
from math import isfinite, nan

import numpy as np

from recipes.statistics.bootstrap import DRAWS, Array, Interval, percentile_interval
from recipes.statistics.curves import Frontier
from recipes.statistics.resampled import resampled
from recipes.statistics.scaling import Runs, fit_frontiers

BEYOND = 2.0  # times the baseline's range: a leverage read further out is flagged
LOST = 0.05  # of the resamples without a number: from here on the interval says nothing
SAME_BUDGET = 0.05  # runs whose x differ by less belong to one budget
NOWHERE = "no budget brings the baseline's fitted curve to this loss"
BASELINE, VARIANT = "baseline", "variant"


@dataclass(frozen=True, kw_only=True)
class Leverage:
    """x_baseline / x, at which both have the same loss; above 1 favours the variant."""

    value: float  # infinite where the loss is below the baseline's floor
    interval: Interval  # over resamples of the runs of both curves
    x: float  # the variant's
    loss: float  # the variant's, there
    equivalent: float  # the baseline's x with this loss (over parameters at one D: N_eff)
    beyond: float  # how far `equivalent` lies outside the baseline's range; 1.0: inside
    baseline_loss: float  # at the variant's x, of the fitted curve
    slope: float  # dl / d ln x of the baseline there, below zero
    settled: bool  # whether the best starts of the fit agreed
    read_beyond: float = 1.0  # as `beyond`, of x, at which both curves are read

    @property
    def extrapolated(self) -> bool:
        """Read further than twice outside the baseline's runs: not to be reported as measured."""
        return not self.beyond <= BEYOND

    @property
    def unsure(self) -> str | None:
        """Why not even whether it is above 1 is known; None where it is.

        An extrapolated leverage may well be known to be above 1: that says only that the variant's
        curve lies below the baseline's at x. At the baseline's largest budget any above two is one.
        """
        if not isfinite(self.value):
            return NOWHERE
        if not self.settled:
            return "the fit's starts disagree"
        if self.interval.lost >= LOST:
            return f"{self.interval.lost:.0%} of the resamples gave no number"
        if not self.read_beyond <= BEYOND:
            return f"the curves are read {self.read_beyond:.3g}× outside the baseline's budgets"
        return None

    @property
    def gap_percent(self) -> float:
        """100 (l - l_b) / l_b at equal x; below zero favours the variant."""
        return 100 * (self.loss - self.baseline_loss) / self.baseline_loss

    @property
    def gap_worth(self) -> float:
        """What the gap is worth in units of ln x, by the local slope; above zero favours it.

        0.1 is about 10 % of the compute (comparison.md 6.4); NaN for a curve that does not fall.
        """
        return (self.loss - self.baseline_loss) / self.slope if self.slope < 0 else nan


def leverage_of_curves(
    baseline: Runs,
    variant: Runs,
    *,
    at: float | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    sigma: float | None = None,
) -> Leverage:
    """The leverage of the variant's fitted curve over the baseline's, both with one floor E.

    The data, and so the irreducible loss, are the same for both.

    Args:
        baseline, variant: runs at two budgets or more each, five in all.
        at: where to read the curves; None: the variant's largest x.
        draws, seed, sigma: as in `resampled`.
    """
    fit = fit_frontiers({BASELINE: baseline, VARIANT: variant})
    again = resampled(fit, draws=draws, seed=seed, sigma=sigma).frontiers
    x = float(variant.x.max()) if at is None else at
    values = again[BASELINE].reaching(again[VARIANT].loss(x)) / x
    loss = float(fit.frontier(VARIANT).loss(x))
    return _leverage(fit.frontier(BASELINE), baseline, x, loss, values, fit.settled)


def _leverage(
    curve: Frontier, baseline: Runs, x: float, loss: float, values: Array, settled: bool
) -> Leverage:
    equivalent = float(curve.reaching(loss))
    low, high = float(baseline.x.min()), float(baseline.x.max())
    return Leverage(
        value=equivalent / x,
        interval=percentile_interval(values),
        x=x,
        loss=loss,
        equivalent=equivalent,
        beyond=_beyond(equivalent, low, high),
        baseline_loss=float(curve.loss(x)),
        slope=float(curve.slope(x)),
        settled=settled,
        read_beyond=_beyond(x, low, high),
    )


def _beyond(at: float, low: float, high: float) -> float:
    """By what factor a place lies outside a range; NaN of NaN, which Python's max would drop."""
    return float(np.max([1.0, at / high, low / at if at else np.inf]))
