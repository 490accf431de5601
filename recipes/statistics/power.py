"""How many seeds a difference needs, and what so many seeds can tell (comparison.md 5.2).

From the noncentral t distribution: with n seeds in each of two groups the statistic of a true
difference has noncentrality effect / (sigma sqrt(2 / n)) and 2n - 2 degrees of freedom; taken in
pairs that correlate by rho, effect / (sigma sqrt(2 (1 - rho) / n)) and n - 1.
"""

from math import isnan, sqrt

from scipy.optimize import brentq
from scipy.special import nctdtr, stdtrit

from layers.names import check_positive
from recipes.statistics.paired import MIN_SEEDS

MOST_SEEDS = 100_000


def power_of(
    effect: float, sigma: float, n: int, *, alpha: float = 0.05, correlation: float | None = None
) -> float:
    """Probability that a true difference is found.

    Args:
        effect: the difference, in the losses' unit; its sign does not matter.
        sigma: standard deviation of one run over seeds, in the same unit.
        n: seeds of each group, two at least.
        alpha: two-sided level. For k variants in a table, alpha / k is what Holm's correction asks
            of the first.
        correlation: None for groups of other seeds; else they are compared in pairs that
            correlate by so much.
    """
    _check(sigma=sigma, alpha=alpha, correlation=correlation)
    if n < 2:
        raise ValueError(f"n must be 2 at least, got {n}")
    pairs = correlation is not None
    df = n - 1 if pairs else 2 * n - 2
    error = sigma * sqrt((2 * (1 - correlation) if pairs else 2) / n)
    bound, shift = stdtrit(df, 1 - alpha / 2), abs(effect) / error
    wrong_side = nctdtr(df, shift, -bound)
    # scipy gives NaN far out in that tail, where it is below 1e-9
    return float(1 - nctdtr(df, shift, bound) + (0.0 if isnan(wrong_side) else wrong_side))


def seeds_needed(
    effect: float,
    sigma: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    correlation: float | None = None,
) -> int:
    """The fewest seeds per group, three at least, that find the difference with this power.

    Raises:
        ValueError: where no number up to 100,000 would do, or a value is out of its range.
    """
    check_positive(effect=abs(effect))
    _check_power(power, alpha)

    def enough(n: int) -> bool:
        return power_of(effect, sigma, n, alpha=alpha, correlation=correlation) >= power

    low, high = MIN_SEEDS - 1, MIN_SEEDS
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            raise ValueError(f"no {MOST_SEEDS:,} seeds find {effect:g} at sigma {sigma:g}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def resolution(
    n: int,
    sigma: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    correlation: float | None = None,
) -> float:
    """The smallest true difference that n seeds per group find with this power."""
    _check_power(power, alpha)

    def missing(effect: float) -> float:
        return power_of(effect, sigma, n, alpha=alpha, correlation=correlation) - power

    high = sigma
    while missing(high) < 0:
        high *= 2
    return float(brentq(missing, 0.0, high, xtol=1e-12 * sigma, rtol=1e-10))  # type: ignore[arg-type]


def _check(*, sigma: float, alpha: float, correlation: float | None) -> None:
    check_positive(sigma=sigma)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    if correlation is not None and not -1 <= correlation < 1:
        raise ValueError(f"correlation must be in [-1, 1), got {correlation}")


def _check_power(power: float, alpha: float) -> None:
    if not alpha < power < 1:
        raise ValueError(f"power must be in (alpha, 1) = ({alpha:g}, 1), got {power}")
