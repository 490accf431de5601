"""The noise between seeds: how much one run may differ from the next (comparison.md 5.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import fmean, stdev

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


def spread_of(*groups: Seeds) -> Spread | None:
    """Pooled over the groups with at least two seeds: s^2 = sum (n-1) s_g^2 / sum (n-1).

    None where no group has two seeds, a run diverged, or all seeds gave the same number.
    """
    several = [list(group.values()) for group in groups if len(group) > 1]
    df = sum(len(values) - 1 for values in several)
    if not df or not all(isfinite(x) for values in several for x in values):
        return None
    std = sqrt(sum((len(v) - 1) * stdev(v) ** 2 for v in several) / df)
    return Spread(std=std, df=df) if std > ROUNDING else None


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of finite numbers and half the width of its 95 % interval, from Student's t.

    Raises:
        ValueError: for fewer than two numbers, whose spread nothing says.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs two numbers at least, got {len(values)}")
    return fmean(values), half_width(stdev(values) / sqrt(len(values)), len(values) - 1)
