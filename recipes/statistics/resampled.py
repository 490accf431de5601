"""The same fit of every resample: intervals of decisions (comparison.md 6.3, point 4).

Ask the curves of all resamples for what is decided (the best size, a leverage, a predicted loss)
and take `bootstrap.percentile_interval` of the answers.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from recipes.statistics.bootstrap import DRAWS, Array, perturb, resample
from recipes.statistics.curves import Chinchilla, Frontier
from recipes.statistics.minimise import descend
from recipes.statistics.powerlaw import PowerLaws
from recipes.statistics.scaling import Fit


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """A fit made again of every resample."""

    fit: Fit
    theta: Array  # [b, P]
    counts: Array  # [b, n], how often each run stands in it
    losses: Array  # [b, n]

    @property
    def frontiers(self) -> dict[str, Frontier]:
        """Curves whose coefficients are [b]."""
        return self.fit.frontiers_of(self.theta)

    @property
    def chinchilla(self) -> Chinchilla:
        """The law with coefficients [b]."""
        return self.fit.chinchilla_of(self.theta)


def resampled(
    fit: Fit, *, draws: int = DRAWS, seed: int = 0, sigma: float | None = None
) -> Resampled:
    """Fit every resample, all curves together.

    Args:
        fit: of the runs themselves, from which each resample's fit starts.
        draws: 1,000 at least for an interval that is reported.
        seed: of the generator.
        sigma: None: runs (clusters, where they are named) are drawn with replacement, within each
            curve; resamples with too few different budgets are drawn again. A number: the
            standard deviation of one run's loss, added as noise; for one run per budget, and
            nearer its level: in 149 simulated studies of 30 runs 95 % intervals covered in 93 to
            96 % (best size 93), against 85 to 95 % with runs drawn (137 studies, best size 85).
    """
    n, laws = len(fit.laws.group), fit.laws
    measured = np.exp(laws.log_loss)
    if sigma is None:
        counts = resample(
            n,
            draws=draws,
            seed=seed,
            clusters=_clusters(fit),
            strata=[int(g) for g in laws.group],
            usable=lambda c: _usable(laws, c),
        )
        losses = np.broadcast_to(measured, (draws, n))
    else:
        counts, losses = np.ones((draws, n)), perturb(measured, sigma, draws=draws, seed=seed)
    starts = np.repeat(fit.minimum.theta[None], draws, axis=0)
    theta, _ = descend(replace(laws, log_loss=np.log(losses)), starts, counts)
    return Resampled(fit=fit, theta=theta, counts=counts, losses=losses)


def _clusters(fit: Fit) -> list[object]:
    """A label per run, of its own where its curve names none."""
    return [
        (name, i if runs.clusters is None else ("cluster", runs.clusters[i]))
        for name, runs in zip(fit.names, fit.runs, strict=True)
        for i in range(len(runs.loss))
    ]


def _usable(laws: PowerLaws, counts: Array) -> NDArray[np.bool_]:
    """Whether a resample has as many different inputs as the fit has parameters: [b]."""
    enough = np.ones(len(counts), dtype=bool)
    for column in laws.logs.T:
        keys = np.stack([laws.group, np.round(column, 9)], axis=1)
        places, of = np.unique(keys, axis=0, return_inverse=True)
        present = (counts @ np.eye(len(places))[of.ravel()] > 0).astype(float)  # [b, inputs]
        by_group = present @ (places[:, :1] == np.arange(laws.member.shape[1]))
        least = 2 if laws.logs.shape[1] == 1 else 3
        enough &= (by_group >= least).all(1) & (by_group.sum(1) >= 1 + 2 * laws.member.shape[1])
    return enough
