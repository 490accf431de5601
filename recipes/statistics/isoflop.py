"""The best size for each compute budget, and how it grows (arXiv:2203.15556, app. 3.2)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from recipes.statistics.bootstrap import (
    DRAWS,
    Array,
    Interval,
    percentile_interval,
    perturb,
    resample,
)
from recipes.statistics.parabola import vertex
from recipes.statistics.scaling import Runs


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The best size at one compute budget, from a parabola in ln N."""

    compute: float
    size: float  # NaN where the parabola has no lowest point
    loss: float  # there
    size_interval: Interval | None  # None where there is none to be found


@dataclass(frozen=True, kw_only=True)
class IsoFlop:
    """N* grows as C^exponent through the optima of those budgets that have one."""

    budgets: tuple[Budget, ...]  # by compute
    exponent: float
    exponent_interval: Interval


def isoflop(
    budgets: Mapping[float, Runs], *, draws: int = DRAWS, seed: int = 0, sigma: float | None = None
) -> IsoFlop:
    """Optima per budget and the line through them, with 95 % intervals.

    Args:
        budgets: by compute, two or more; x is the parameters, three sizes at least.
        draws, seed: of the bootstrap.
        sigma: the noise of one run, added to each; None: runs are drawn with replacement within
            their budget, which needs several per size or many sizes.

    Raises:
        ValueError: where fewer than two budgets have an optimum, or three sizes.
    """
    if len(budgets) < 2:
        raise ValueError(f"a line needs two budgets at least, got {len(budgets)}")
    points, drawn = [], []
    for i, (compute, runs) in enumerate(sorted(budgets.items())):
        sizes = np.unique(runs.x)
        if len(sizes) < 3:
            raise ValueError(f"budget {compute:g} needs three sizes at least, got {len(sizes)}")
        logs = np.log(runs.x)
        found = vertex(logs, runs.loss)
        many = _vertices(logs, runs, draws, seed + i, sigma)
        known = np.isfinite(found.at) and np.isfinite(many).any()
        points.append(
            Budget(
                compute=compute,
                size=float(np.exp(found.at)),
                loss=float(found.low),
                size_interval=percentile_interval(np.exp(many)) if known else None,
            )
        )
        if known:
            drawn.append(many)
    lowest = [b for b in points if b.size_interval is not None]
    if len(lowest) < 2:
        raise ValueError(
            f"of {len(points)} budgets {len(lowest)} have a size of lowest loss: a line needs two"
        )
    x = np.log([b.compute for b in lowest])
    exponent = _slope(x, np.log([[b.size for b in lowest]]))
    exponents = _slope(x, np.stack(drawn, axis=1))
    return IsoFlop(
        budgets=tuple(points),
        exponent=float(exponent[0]),
        exponent_interval=percentile_interval(exponents),
    )


def _vertices(logs: Array, runs: Runs, draws: int, seed: int, sigma: float | None) -> Array:
    """ln N* of every resample: [draws]."""
    if sigma is not None:
        return vertex(logs, perturb(runs.loss, sigma, draws=draws, seed=seed)).at
    values, of = np.unique(logs, return_inverse=True)
    counts = resample(
        len(logs),
        draws=draws,
        seed=seed,
        clusters=runs.clusters,
        usable=lambda c: (c @ np.eye(len(values))[of] > 0).sum(1) >= 3,
    )
    return vertex(logs, runs.loss, counts).at


def _slope(x: Array, y: Array) -> Array:
    """By least squares: y is [b, n], answers [b]."""
    centred = x - x.mean()
    return (y @ centred) / (centred @ centred)
