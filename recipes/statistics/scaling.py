"""Scaling laws fitted to runs (comparison.md 6.2, 6.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike

from recipes.statistics.bootstrap import Array
from recipes.statistics.curves import Chinchilla, Frontier
from recipes.statistics.minimise import Minimum, minimum
from recipes.statistics.powerlaw import DELTA, PowerLaws

FLOORS = (0.02, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # starts of E, of the lowest loss
EXPONENTS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
# the grid of Hoffmann et al.: arXiv:2203.15556, app. D.3
GRID_E, GRID_P, GRID_A = (-1.0, -0.5, 0.0, 0.5, 1.0), (0.0, 0.5, 1.0, 1.5, 2.0), range(0, 30, 5)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs of one curve, each ended at its own schedule's end."""

    x: Array  # [n] or [n, J]: compute, tokens, seconds, or (parameters, tokens)
    loss: Array  # [n]
    clusters: tuple[object, ...] | None = None  # runs that share a trunk; None: each alone

    def __post_init__(self) -> None:
        if len(self.x) != len(self.loss) or not len(self.x):
            got = f"{len(self.x)} and {len(self.loss)}"
            raise ValueError(f"x and loss must name the same runs, one at least, got {got}")
        if self.clusters is not None and len(self.clusters) != len(self.loss):
            raise ValueError(f"clusters must name {len(self.loss)} runs, got {len(self.clusters)}")
        for name, values in (("x", self.x), ("loss", self.loss)):
            if not (np.isfinite(values) & (values > 0)).all():
                raise ValueError(f"{name} must be positive and finite, got {values}")


def runs_of(x: ArrayLike, loss: ArrayLike, clusters: Sequence[object] | None = None) -> Runs:
    """Runs from any numbers."""
    return Runs(
        x=np.asarray(x, dtype=np.float64),
        loss=np.asarray(loss, dtype=np.float64),
        clusters=None if clusters is None else tuple(clusters),
    )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Laws fitted to one or several curves, and how much to trust the optimiser."""

    names: tuple[str, ...]
    runs: tuple[Runs, ...]
    laws: PowerLaws
    centre: Array  # [J], mean ln x
    minimum: Minimum

    @property
    def residuals(self) -> dict[str, Array]:
        """ln(measured) - ln(fitted), by curve, in the order of its runs."""
        found = self.laws.log_loss - self.laws.terms(self.minimum.theta[None])[0][0]
        return {name: found[self.laws.group == i] for i, name in enumerate(self.names)}

    @property
    def settled(self) -> bool:
        """Whether the best starts all ended at the same parameters."""
        return self.minimum.agreed == self.minimum.of

    def frontier(self, name: str | None = None) -> Frontier:
        """The curve of that name; may be left out where there is one."""
        return self.frontiers_of(self.minimum.theta)[name or self.names[0]]

    def chinchilla(self) -> Chinchilla:
        """The law over parameters and tokens."""
        return self.chinchilla_of(self.minimum.theta)

    def frontiers_of(self, theta: Array) -> dict[str, Frontier]:
        """From parameters [P] or [b, P]."""
        e, a, p = self.laws.split(np.atleast_2d(theta))
        shape = theta.shape[:-1]
        return {
            name: Frontier(
                floor=np.exp(e[:, 0]).reshape(shape),
                log_scale=(a[:, i, 0] + p[:, i, 0] * self.centre[0]).reshape(shape),
                exponent=p[:, i, 0].reshape(shape),
            )
            for i, name in enumerate(self.names)
        }

    def chinchilla_of(self, theta: Array) -> Chinchilla:
        """From parameters [P] or [b, P]."""
        e, a, p = self.laws.split(np.atleast_2d(theta))
        shape = theta.shape[:-1]
        log_a, log_b = ((a + p * self.centre)[:, 0, j].reshape(shape) for j in (0, 1))
        alpha, beta = (p[:, 0, j].reshape(shape) for j in (0, 1))
        floor = np.exp(e[:, 0]).reshape(shape)
        return Chinchilla(floor=floor, log_a=log_a, alpha=alpha, log_b=log_b, beta=beta)


def fit_frontiers(
    curves: Mapping[str, Runs], *, weights: Mapping[str, ArrayLike] | None = None
) -> Fit:
    """l = E + A x^-a for each curve, with one E for all of them.

    Fit curves apart (one call each) where the data, and so the irreducible loss, differ.

    Args:
        curves: by name; x is [n].
        weights: of each run, by name; None: one each.

    Raises:
        ValueError: for fewer different x than there are parameters.
    """
    laws, centre = _laws(curves)
    _check_enough(curves)
    w = None if weights is None else np.concatenate([np.asarray(weights[n]) for n in curves])
    return _fitted(curves, laws, centre, _frontier_starts(laws), w)


def fit_frontier(runs: Runs, *, weights: ArrayLike | None = None) -> Fit:
    """l = E + A x^-a for one curve."""
    name = "baseline"
    return fit_frontiers({name: runs}, weights=None if weights is None else {name: weights})


def fit_chinchilla(runs: Runs, *, weights: ArrayLike | None = None) -> Fit:
    """l = E + A N^-alpha + B D^-beta; never with different sparsities in one fit.

    Args:
        runs: x is [n, 2], parameters and tokens; three different values of each, five runs.
        weights: of each run; None: one each.
    """
    if runs.x.ndim != 2 or runs.x.shape[1] != 2:
        raise ValueError(f"x must be [n, 2], parameters and tokens, got shape {runs.x.shape}")
    sizes, tokens = (len(np.unique(column)) for column in runs.x.T)
    if min(sizes, tokens) < 3 or len(np.unique(runs.x, axis=0)) < 5:
        found = f"{sizes} and {tokens} in {len(runs.loss)} runs"
        raise ValueError(f"three sizes and token counts in five runs at least, got {found}")
    laws, centre = _laws({"all": runs})
    if np.linalg.matrix_rank(laws.logs, tol=1e-6) < 2:
        raise ValueError("tokens follow from the size in every run: fit_frontier is the law for it")
    rows = np.array(list(product(GRID_E, GRID_A, GRID_A, GRID_P, GRID_P)), dtype=np.float64)
    rows[:, 1:3] -= rows[:, 3:5] * centre  # ln A and ln B at the centre of the data
    w = None if weights is None else np.asarray(weights, dtype=np.float64)
    return _fitted({"all": runs}, laws, centre, rows, w)


def _laws(curves: Mapping[str, Runs]) -> tuple[PowerLaws, Array]:
    logs = np.log(np.concatenate([r.x.reshape(len(r.loss), -1) for r in curves.values()]))
    centre = logs.mean(0)
    group = np.repeat(np.arange(len(curves)), [len(r.loss) for r in curves.values()])
    log_loss = np.log(np.concatenate([r.loss for r in curves.values()]))
    return PowerLaws(logs=logs - centre, log_loss=log_loss, group=group, delta=DELTA), centre


def _check_enough(curves: Mapping[str, Runs]) -> None:
    counts = {name: len(np.unique(r.x)) for name, r in curves.items()}
    needed = 1 + 2 * len(counts)
    if min(counts.values()) < 2 or sum(counts.values()) < needed:
        told = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise ValueError(
            f"{len(counts)} curves with one floor need two budgets each and {needed} in all, got "
            f"{told}"
        )


def _frontier_starts(laws: PowerLaws) -> Array:
    """Floors below the lowest loss, one exponent for all, each A through its curve's middle."""
    members = laws.member / laws.member.sum(0)  # [n, G]
    lowest = laws.log_loss.min()
    rows = []
    for share, exponent in product(FLOORS, EXPONENTS):
        e = lowest + np.log(share)
        above = np.log(np.exp(laws.log_loss) - np.exp(e)) + exponent * laws.logs[:, 0]
        a = above @ members
        rows.append(np.concatenate([[e], a, np.full(len(a), exponent)]))
    return np.array(rows)


def _fitted(
    curves: Mapping[str, Runs], laws: PowerLaws, centre: Array, starts: Array, w: Array | None
) -> Fit:
    return Fit(
        names=tuple(curves),
        runs=tuple(curves.values()),
        laws=laws,
        centre=centre,
        minimum=minimum(laws, starts, w),
    )
