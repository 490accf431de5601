"""Bootstrap over runs, or over clusters that share a trunk (comparison.md 6.3, point 4).

A resample is written as how often each run was drawn, so that many of them are fitted at once, as
weights. Never resample the checkpoints of one run: they are one observation; give them one cluster.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layers.names import check_positive

Array = NDArray[np.float64]
DRAWS = 1000
ROUNDS = 200  # of drawing again what could not be fitted


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A percentile interval."""

    low: float
    high: float
    level: float = 0.95
    lost: float = 0.0  # share of the resamples that gave no number

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def percentile_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """The middle `level` of the values; infinite ones count, NaN are lost and told.

    Raises:
        ValueError: where all are NaN.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    given = np.asarray(values, dtype=np.float64).ravel()
    known = given[~np.isnan(given)]
    if not known.size:
        raise ValueError(f"none of {given.size} resamples gave a number")
    ends = [(1 - level) / 2, (1 + level) / 2]
    # no interpolation: it would turn one infinite neighbour into NaN
    low, high = np.quantile(known, ends, method="inverted_cdf")
    lost = 1 - known.size / given.size
    return Interval(low=float(low), high=float(high), level=level, lost=lost)


def resample(
    n: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    clusters: Sequence[object] | None = None,
    strata: Sequence[object] | None = None,
    usable: Callable[[Array], NDArray[np.bool_]] | None = None,
) -> Array:
    """How often each run stands in each resample.

    Args:
        n: runs.
        draws: resamples.
        seed: of the generator; the same seed gives the same resamples.
        clusters: a label per run; runs of one label are drawn together. None: each alone.
        strata: a label per run; of each label as many clusters are drawn as there are, so that no
            curve of several loses all its runs. No cluster may lie in two strata.
        usable: [d, n] counts -> [d] whether a fit can be made of them; others are drawn again.

    Returns:
        [draws, n] float64, whole numbers.

    Raises:
        ValueError: where usable resamples are too rare to be found.
    """
    check_positive(n=n, draws=draws)
    by_cluster = _codes(n, clusters, "clusters")
    by_stratum = _codes(n, strata, "strata", missing=np.zeros(n, dtype=np.int64))
    members = [np.unique(by_cluster[by_stratum == s]) for s in np.unique(by_stratum)]
    if sum(len(m) for m in members) != len(np.unique(by_cluster)):
        raise ValueError("a cluster lies in two strata: its runs are drawn together or not at all")
    generator = np.random.default_rng(seed)

    def draw(rows: int) -> Array:
        counts = np.zeros((rows, by_cluster.max() + 1))
        for m in members:
            picked = m[generator.integers(len(m), size=(rows, len(m)))]
            np.add.at(counts, (np.arange(rows)[:, None], picked), 1.0)
        return counts[:, by_cluster]

    found = draw(draws)
    if usable is None:
        return found
    for _ in range(ROUNDS):
        bad = ~usable(found)
        if not bad.any():
            return found
        found[bad] = draw(int(bad.sum()))
    raise ValueError(
        f"of {draws} resamples {int((~usable(found)).sum())} never had enough different runs for a "
        "fit: run more seeds or budgets, or say `sigma`, the noise of a run"
    )


def perturb(losses: ArrayLike, sigma: float, *, draws: int = DRAWS, seed: int = 0) -> Array:
    """Losses with normal noise of a known size added: [draws, n].

    The parametric bootstrap, for ladders of one run per budget, which have nothing to draw from.
    """
    check_positive(sigma=sigma, draws=draws)
    known = np.asarray(losses, dtype=np.float64)
    return known + sigma * np.random.default_rng(seed).standard_normal((draws, known.size))


def means(
    losses: ArrayLike, *, draws: int = DRAWS, seed: int = 0, sigma: float | None = None
) -> Array:
    """Resampled means of runs at one place: [draws].

    Args:
        losses: [n].
        draws, seed: of the generator.
        sigma: noise of one run, added; None: runs are drawn with replacement.
    """
    known, generator = np.asarray(losses, dtype=np.float64), np.random.default_rng(seed)
    if sigma is not None:
        return known.mean() + sigma / np.sqrt(known.size) * generator.standard_normal(draws)
    return known[generator.integers(known.size, size=(draws, known.size))].mean(1)


def _codes(
    n: int,
    labels: Sequence[object] | None,
    what: str,
    missing: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Labels as 0, 1, ... in the order in which they come."""
    if labels is None:
        return np.arange(n) if missing is None else missing
    if len(labels) != n:
        raise ValueError(f"{what} must name each of {n} runs, got {len(labels)}")
    order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([order[label] for label in labels], dtype=np.int64)
