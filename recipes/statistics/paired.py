"""Differences by seed: paired t, Welch, or the noise of the baseline (comparison.md 5.2).

Two groups of runs are compared seed by seed where they have three or more seeds in common: the
same seed gives both the same data order, so what seeds do to both alike drops out. Groups with
other seeds are compared by Welch's test. Fewer than three seeds claim nothing by themselves; they
may be judged by the noise of a baseline that has more.
"""

from dataclasses import replace
from math import fsum, isfinite, sqrt
from statistics import fmean

from recipes.statistics.noise import ROUNDING, Seeds, Spread, spread_of, squares
from recipes.statistics.verdicts import Difference, judged

MIN_SEEDS = 3  # of each group; below them nothing is claimed
EQUIVALENCE = 0.0025  # of the baseline's loss: smaller differences count as none
SINGLE_RUN = 3.0  # sigma: no single run is called better or worse below (comparison.md 11)


def difference(group: Seeds, reference: Seeds, *, margin: float | None = None) -> Difference:
    """`group` minus `reference` with its t interval, before any correction.

    Pairs are taken wherever three or more seeds are in common, though comparison.md asks for
    Welch's test where the correlation over these is not positive. That picks the narrower of two
    intervals by the data: under equal means and independent seeds 6.5 % of its 95 % intervals miss,
    against 5.0 %.

    Args:
        group, reference: loss by seed.
        margin: for two one-sided tests of equivalence, in the losses' unit; None: EQUIVALENCE of
            the reference's mean.

    Returns:
        A Difference; how it was judged, and the correlation, stand in it. Without an interval where
        a group has fewer than three seeds, a run diverged, or the seeds show no noise.
    """
    value = fmean(group.values()) - fmean(reference.values())
    if not isfinite(value):
        return Difference(value=value, how="a run diverged")
    common = sorted(group.keys() & reference.keys())
    shared = _correlation(group, reference, common) if len(common) >= MIN_SEEDS else None
    if margin is None:
        margin = EQUIVALENCE * abs(fmean(reference.values()))
    sigma = spread_of(reference)
    if len(common) >= MIN_SEEDS:
        found = _by_pairs([group[seed] - reference[seed] for seed in common], margin)
    elif min(len(group), len(reference)) < MIN_SEEDS:
        fewest = min(len(group), len(reference))
        how = f"{fewest} seed{'s' * (fewest != 1)}, and no claim below {MIN_SEEDS}"
        found = Difference(value=value, how=how)
    else:
        found = _welch(group, reference, margin)
    return replace(found, sigma=sigma.std if sigma else None, correlation=shared)


def _correlation(group: Seeds, reference: Seeds, common: list[int]) -> float | None:
    """Pearson's r; None where one of them gave the same number throughout."""
    pairs = [(group[s], reference[s]) for s in common]
    mine, theirs = (fmean(side) for side in zip(*pairs, strict=True))
    both = sqrt(squares(a for a, _ in pairs) * squares(b for _, b in pairs))
    return fsum((a - mine) * (b - theirs) for a, b in pairs) / both if both > 0 else None


def _by_pairs(pairs: list[float], margin: float) -> Difference:
    spread = spread_of(dict(enumerate(pairs)))
    if spread is None:
        how = "the seeds move both alike, to the last digit"
        return Difference(value=fmean(pairs), how=how)
    error, how = spread.std / sqrt(len(pairs)), f"paired over {len(pairs)} seeds"
    return judged(fmean(pairs), error, spread.df, how, margin)


def _welch(group: Seeds, reference: Seeds, margin: float) -> Difference:
    """Welch (1947), Biometrika 34:28; degrees of freedom after Satterthwaite."""
    value = fmean(group.values()) - fmean(reference.values())
    m, n = len(group), len(reference)
    mine, theirs = squares(group.values()) / (m - 1) / m, squares(reference.values()) / (n - 1) / n
    error = sqrt(mine + theirs)
    if error <= ROUNDING:
        return Difference(value=value, how="the seeds gave the same number, they measure no noise")
    df = (mine + theirs) ** 2 / (mine**2 / (m - 1) + theirs**2 / (n - 1))
    return judged(value, error, df, "Welch's test: other seeds", margin)


def by_noise(
    group: Seeds, reference: Seeds, noise: Spread, how: str, *, margin: float | None = None
) -> Difference:
    """`group` minus `reference`, its interval t(0.975, df) s sqrt(1/m + 1/n).

    For groups with too few seeds of their own. The noise is taken to be the same in both; a single
    run counts as better or worse from three sigma on only, which many seeds of the baseline alone
    would undercut.

    Args:
        group, reference: loss by seed, one seed or more.
        noise: of one run, measured elsewhere.
        how: where the noise comes from, in words.
        margin: as in `difference`; None: no test of equivalence.
    """
    value = fmean(group.values()) - fmean(reference.values())
    if not isfinite(value):
        return Difference(value=value, how="a run diverged")
    error = noise.std * sqrt(1 / len(group) + 1 / len(reference))
    found = replace(judged(value, error, noise.df, how, margin), sigma=noise.std, borrowed=True)
    if len(group) == 1 and abs(value) < SINGLE_RUN * noise.std:
        how = f"{how}; a single run below {SINGLE_RUN:g} sigma"
        return replace(found, how=how, too_few=True)
    return found
