"""The noise between seeds: how much one run may differ from the next (comparison.md 5.1)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, sqrt
from statistics import fmean

from scipy.special import stdtrit  # Student's t; scipy.stats takes half a second more

Seeds = Mapping[int, float]  # seed: loss of the run with it
LEVEL = 0.05  # two-sided
ROUNDING = 1e-12  # a spread below is none


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The standard deviation of one run, as estimated from one or more groups of seeds."""

    std: float
    df: int

    def half(self, inverse_runs: float) -> float:
        """Half width of the 95 % interval of a mean; inverse_runs is 1/m, or 1/m + 1/n."""
        return half_width(self.std * sqrt(inverse_runs), self.df)


def half_width(error: float, df: float, level: float = LEVEL) -> float:
    """t(1 - level/2, df) times the standard error."""
    return float(stdtrit(df, 1 - level / 2)) * error


def squares(values: Iterable[float]) -> float:
    """Sum of squared distances to the mean; `statistics.variance` is exact but slow."""
    given = list(values)
    mean = fmean(given)
    return fsum((x - mean) ** 2 for x in given)


def spread_of(*groups: Seeds) -> Spread | None:
    """Pooled over the groups with at least two seeds: s^2 = sum (n-1) s_g^2 / sum (n-1).

    None where no group has two seeds, a run diverged, or all seeds gave the same number.
    """
    several = [list(group.values()) for group in groups if len(group) > 1]
    df = sum(len(values) - 1 for values in several)
    if not df or not all(isfinite(x) for values in several for x in values):
        return None
    std = sqrt(sum(map(squares, several)) / df)
    return Spread(std=std, df=df) if std > ROUNDING else None


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of finite numbers and half the width of its 95 % interval, from Student's t.

    Raises:
        ValueError: for fewer than two numbers, whose spread nothing says.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs two numbers at least, got {n}")
    return fmean(values), half_width(sqrt(squares(values) / (n - 1) / n), n - 1)
