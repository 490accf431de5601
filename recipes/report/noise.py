"""Is a difference in bits per byte larger than the noise between seeds? (comparison.md 5.2)

A sample maps a seed to the bits per byte of the run with that seed. The noise is measured by
the seeds of the baseline; a group of runs with several seeds adds its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from statistics import fmean, stdev
from typing import Literal

from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes half a second more

Seeds = Mapping[int, float]
Word = Literal["better", "worse", "not resolved"]
LEVEL = 0.05  # two-sided
MIN_PAIRS = 3  # seeds in common from which a difference is taken seed by seed


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A group of runs minus a reference, in bits per byte; below zero is better."""

    value: float
    half: float | None = None  # half width of the 95 % interval; None: the noise is unknown
    p: float | None = None  # two-sided, of this difference alone
    p_holm: float | None = None  # corrected over its table
    df: int | None = None
    how: str  # the way it was judged, or why it could not be

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, not corrected for the number of comparisons."""
        return None if self.half is None else (self.value - self.half, self.value + self.half)

    @property
    def resolved(self) -> bool:
        """Better or worse beyond the noise."""
        return self.word != "not resolved"

    @property
    def word(self) -> Word:
        """The verdict."""
        if self.p_holm is None or self.p_holm > LEVEL:
            return "not resolved"
        return "better" if self.value < 0 else "worse"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The standard deviation of one run, as estimated from one or more groups of seeds."""

    std: float
    df: int

    def half(self, inverse_runs: float) -> float:
        """Half width of the 95 % interval of a mean; inverse_runs is 1/m, or 1/m + 1/n."""
        return float(stdtrit(self.df, 1 - LEVEL / 2)) * self.std * sqrt(inverse_runs)


def spread_of(*groups: Seeds) -> Spread | None:
    """Pooled over the groups with at least two seeds: s^2 = sum (n-1) s_g^2 / sum (n-1).

    None where no group has two seeds, a run diverged, or all seeds gave the same number.
    """
    several = [list(group.values()) for group in groups if len(group) > 1]
    df = sum(len(values) - 1 for values in several)
    if not df or not all(isfinite(x) for values in several for x in values):
        return None
    std = sqrt(sum((len(v) - 1) * stdev(v) ** 2 for v in several) / df)
    return Spread(std=std, df=df) if std > 1e-12 else None  # below: rounding, no noise


def compare(group: Seeds, reference: Seeds, baseline: Seeds) -> Difference:
    """`group` minus `reference`, judged by the noise of `baseline` (and of both, if they have any).

    Paired seed by seed where both have the same three or more seeds; otherwise the half width is
    t(0.975, df) s sqrt(1/m + 1/n), s pooled over the groups with several seeds.
    """
    value = fmean(group.values()) - fmean(reference.values())
    if not isfinite(value):
        return Difference(value=value, how="a run diverged")
    noise = spread_of(baseline)
    if noise is None:
        return Difference(value=value, how=_no_noise(baseline))
    if len(group) >= MIN_PAIRS and group.keys() == reference.keys():
        pairs = {seed: group[seed] - reference[seed] for seed in group}
        spread, inverse, how = spread_of(pairs), 1 / len(pairs), f"paired over {len(pairs)} seeds"
        if spread is None:  # every pair differs by the same number
            return Difference(value=value, how="the seeds move both alike, to the last digit")
    else:
        groups = (baseline, reference, group)
        distinct = [g for i, g in enumerate(groups) if g not in groups[:i]]
        spread = spread_of(*distinct) or noise
        inverse = 1 / len(group) + 1 / len(reference)
        how = "pooled noise" if spread.df > noise.df else "noise of the baseline"
    t = abs(value) / (spread.std * sqrt(inverse))
    return Difference(
        value=value,
        half=spread.half(inverse),
        p=float(2 * stdtr(spread.df, -t)),
        df=spread.df,
        how=how,
    )


def _no_noise(baseline: Seeds) -> str:
    if len(baseline) < 2:
        return "the baseline has one seed, so its noise is unknown"
    if not all(isfinite(x) for x in baseline.values()):
        return "a run of the baseline diverged"
    return "the seeds of the baseline gave the same number, so they measure no noise"


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of k times (k - i), never decreasing."""
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = highest
    return corrected


def correct(differences: Sequence[Difference]) -> list[Difference]:
    """The differences of one table, each with `p_holm` over all that have a `p`."""
    judged = [d.p for d in differences if d.p is not None]
    corrected = iter(holm(judged))
    return [d if d.p is None else replace(d, p_holm=next(corrected)) for d in differences]
