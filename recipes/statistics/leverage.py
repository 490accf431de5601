"""How much more a baseline must spend to reach a variant's loss (comparison.md 6.4).

Over compute this is the efficiency leverage, over tokens or seconds at one model the token and time
leverage, over parameters at one token count N_eff / N: the curve's x says which.
"""

from dataclasses import dataclass

import numpy as np

from layers.names import check_positive
from recipes.statistics.bootstrap import DRAWS, Array, Interval, percentile_interval
from recipes.statistics.curves import Frontier
from recipes.statistics.resampled import resampled
from recipes.statistics.scaling import Runs, fit_frontiers

BEYOND = 2.0  # times the baseline's range: a leverage read further out is flagged
SAME_BUDGET = 0.05  # runs whose x differ by less belong to one budget
BASELINE, VARIANT = "baseline", "variant"


@dataclass(frozen=True, kw_only=True)
class Leverage:
    """x_baseline / x, at which both have the same loss; above 1 favours the variant."""

    value: float  # infinite where the loss is below the baseline's floor
    interval: Interval  # over resamples of the runs of both curves
    x: float  # the variant's
    loss: float  # the variant's, there
    equivalent: float  # the baseline's x with this loss (over parameters at one D: N_eff)
    beyond: float  # how often `equivalent` lies outside the baseline's range; 1.0: inside
    baseline_loss: float  # at the variant's x, of the fitted curve
    slope: float  # dl / d ln x of the baseline there, below zero
    settled: bool  # whether the best starts of the fit agreed

    @property
    def extrapolated(self) -> bool:
        """Read further than twice outside the baseline's runs: not to be reported as measured."""
        return not self.beyond <= BEYOND

    @property
    def gap_percent(self) -> float:
        """100 (l - l_b) / l_b at equal x; below zero favours the variant."""
        return 100 * (self.loss - self.baseline_loss) / self.baseline_loss

    @property
    def gap_worth(self) -> float:
        """What the gap is worth, in units of ln x, by the local slope; above zero favours it."""
        return worth(self.loss - self.baseline_loss, self.slope)


def worth(gap: float, slope: float) -> float:
    """A loss gap as a difference of ln x: 0.1 is about 10 % of the compute (comparison.md 6.4).

    Args:
        gap: variant - baseline.
        slope: dl / d ln x of the baseline, below zero.
    """
    check_positive(**{"-slope": -slope})
    return gap / slope


def leverage_of_runs(
    baseline: Runs,
    variant: Runs,
    *,
    at: float | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    sigma: float | None = None,
) -> Leverage:
    """The leverage of the variant's measured loss at one budget, over the baseline's fitted curve.

    Args:
        baseline: runs at three budgets or more.
        variant: runs, of which those at `at` count; their loss is averaged.
        at: the x; None: the variant's largest.
        draws, seed, sigma: as in `resampled`; sigma is the noise of a run in both.
    """
    chosen = _at_budget(variant, at)
    fit = fit_frontiers({BASELINE: baseline})
    again = resampled(fit, draws=draws, seed=seed, sigma=sigma)
    x = float(np.exp(np.log(chosen.x).mean()))
    losses = _means(chosen, draws=draws, seed=seed + 1, sigma=sigma)
    curves = again.frontiers[BASELINE]
    values = curves.reaching(losses) / x
    loss = float(chosen.loss.mean())
    return _leverage(fit.frontier(), baseline, x, loss, values, fit.settled)


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

    Steadier than `leverage_of_runs` where the variant has runs at several budgets and the data, so
    the irreducible loss, are the same.

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
        beyond=max(1.0, equivalent / high, low / equivalent if equivalent else np.inf),
        baseline_loss=float(curve.loss(x)),
        slope=float(curve.slope(x)),
        settled=settled,
    )


def _at_budget(runs: Runs, at: float | None) -> Runs:
    where = float(runs.x.max()) if at is None else at
    near = np.abs(np.log(runs.x / where)) < SAME_BUDGET
    if not near.any():
        raise ValueError(f"the variant has no run at {where:g}, only at {np.unique(runs.x)}")
    return Runs(x=runs.x[near], loss=runs.loss[near])


def _means(runs: Runs, *, draws: int, seed: int, sigma: float | None) -> Array:
    """Resampled means of the runs at one budget: [draws]."""
    generator, n = np.random.default_rng(seed), len(runs.loss)
    if sigma is not None:
        return runs.loss.mean() + sigma / np.sqrt(n) * generator.standard_normal(draws)
    return runs.loss[generator.integers(n, size=(draws, n))].mean(1)


def ling_leverage(activation: float, granularity: float, compute: float) -> float:
    """The efficiency leverage that arXiv:2507.17702 fits to mixtures (its eq. 8).

    EL = A^(a + d lg C + g (lb G)^2 + b lb G), with A saturating at both ends. The logarithms'
    bases are not stated; lg C and lb G alone reproduce its published values. Expect little below
    1e18 FLOPs.

    Args:
        activation: (k + shared) / (experts + shared), in (0, 1).
        granularity: G = 2 d_model / d_expert.
        compute: training FLOPs.
    """
    check_positive(activation=activation, granularity=granularity, compute=compute)
    least, most = 0.0163, 5.28e16
    saturated = 1 / (1 / (activation + 1 / (1 / least - 1 / most)) + 1 / most)
    fine = np.log2(granularity)
    power = 1.23 - 0.0761 * np.log10(compute) + 0.0167 * fine**2 - 0.117 * fine
    return float(saturated**power)
