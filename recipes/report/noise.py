"""Is a difference in bits per byte larger than the noise between seeds? (comparison.md 5.2)

A sample maps a seed to the bits per byte of the run with that seed. Groups with three seeds or more
are judged by these; smaller ones by the noise that the seeds of the baseline measure, which a
comparison may call better or worse, marked as such, and a study never.
"""

from dataclasses import replace
from math import isfinite
from statistics import fmean

from recipes.statistics.noise import Seeds, spread_of
from recipes.statistics.paired import MIN_SEEDS, by_noise, difference
from recipes.statistics.verdicts import Difference


def compare(group: Seeds, reference: Seeds, baseline: Seeds) -> Difference:
    """`group` minus `reference`, judged by their seeds or by the noise of `baseline`.

    Paired seed by seed, or by Welch's test, where both have three or more seeds; otherwise the half
    width is t(0.975, df) s sqrt(1/m + 1/n), s pooled over the groups with several seeds.
    """
    value = fmean(group.values()) - fmean(reference.values())
    if not isfinite(value):
        return Difference(value=value, how="a run diverged")
    if min(len(group), len(reference)) >= MIN_SEEDS:
        return difference(group, reference)
    noise = spread_of(baseline)
    if noise is None:
        return Difference(value=value, how=_no_noise(baseline))
    groups = (baseline, reference, group)
    distinct = [g for i, g in enumerate(groups) if g not in groups[:i]]
    spread = spread_of(*distinct) or noise
    how = "pooled noise" if spread.df > noise.df else "noise of the baseline"
    return by_noise(group, reference, spread, how)


def compare_in_pairs(group: Seeds, reference: Seeds, baseline: Seeds) -> Difference:
    """As `compare`, for a study, where fewer than three seeds in common claim nothing.

    Their interval is kept, for the eye; there is no p, so that no table is corrected for them.
    """
    found, common = compare(group, reference, baseline), len(group.keys() & reference.keys())
    if common >= MIN_SEEDS or found.half is None:
        return found
    seeds = f"{common or 'no'} seed{'s' * (common != 1)}"
    how = f"{found.how}; {seeds} in common, and no claim below {MIN_SEEDS}"
    return replace(found, how=how, p=None, p_equal=None, too_few=True)


def _no_noise(baseline: Seeds) -> str:
    if len(baseline) < 2:
        return "the baseline has one seed, so its noise is unknown"
    if not all(isfinite(x) for x in baseline.values()):
        return "a run of the baseline diverged"
    return "the seeds of the baseline gave the same number, so they measure no noise"
