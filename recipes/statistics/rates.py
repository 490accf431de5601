"""Learning rates: where the best one lies, and how much it matters (comparison.md, section 3).

A sweep maps a peak learning rate to the loss that it ended in; one that diverged is NaN or
infinite, and counts as tried.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite, sqrt
from typing import Literal

import numpy as np

from layers.names import check_positive
from recipes.statistics.parabola import vertex

Sweep = Mapping[float, float]  # learning rate: loss
LEAST_POINTS, MOST_POINTS = 3, 5
FINEST = 2**0.25  # steps below are not worth another run

Place = Literal["interior", "lower edge", "upper edge", "beside divergence"]


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best learning rate of a sweep."""

    lr: float  # the parabola's lowest point, or the best tried where there is none
    loss: float  # there
    tried: float  # the best of the sweep
    place: Place  # of the best tried; "beside divergence": the next larger one diverged
    fitted: tuple[float, ...]  # the learning rates that the parabola goes through; () without one
    misfit: float  # root mean square of its residuals; 0.0 through three points
    next_lrs: tuple[float, ...]  # what to try next; () where the optimum is settled

    @property
    def interior(self) -> bool:
        """Whether larger and smaller rates were tried, and both were worse."""
        return self.place == "interior"


def optimum(sweep: Sweep, *, points: int = MOST_POINTS) -> Optimum:
    """A parabola in log2(lr) through the 3 to 5 best neighbours.

    The points grow from the best one towards whichever side is lower, so that they never jump
    over a worse one. An optimum at an edge is no optimum: `next_lrs` then names the rate beyond.

    Args:
        sweep: three rates or more, one of which did not diverge.
        points: how many the parabola goes through at most, 3 to 5.

    Raises:
        ValueError: for too few rates, a rate that is not positive, or a sweep that all diverged.
    """
    if not LEAST_POINTS <= points <= MOST_POINTS:
        raise ValueError(f"points must be {LEAST_POINTS} to {MOST_POINTS}, got {points}")
    lrs, losses = _checked(sweep)
    best = min(range(len(lrs)), key=lambda i: losses[i])
    place = _place(losses, best)
    ratio = min(b / a for a, b in pairwise(lrs))
    chosen = _neighbours(losses, best, points)
    if place != "interior":
        beyond = {
            "lower edge": lrs[best] / ratio,
            "upper edge": lrs[best] * ratio,
            "beside divergence": sqrt(lrs[best] * lrs[min(best + 1, len(lrs) - 1)]),
        }[place]
        return _unfitted(lrs, losses, best, place, (beyond,))
    x, y = np.log2([lrs[i] for i in chosen]), np.array([losses[i] for i in chosen])
    found = vertex(x, y)
    lowest = float(2**found.at)
    if not lrs[best - 1] <= lowest <= lrs[best + 1]:  # flat, or bent by the outer points
        return _unfitted(lrs, losses, best, place, _between(lrs, best))
    residuals = y - (found.low + found.curvature * (x - found.at) ** 2)
    return Optimum(
        lr=lowest,
        loss=float(found.low),
        tried=lrs[best],
        place=place,
        fitted=tuple(lrs[i] for i in chosen),
        misfit=float(np.sqrt(np.mean(residuals**2))) if len(chosen) > LEAST_POINTS else 0.0,
        next_lrs=(),
    )


def _checked(sweep: Sweep) -> tuple[list[float], list[float]]:
    """Rates in order, and their losses, infinite where they diverged."""
    if len(sweep) < LEAST_POINTS:
        raise ValueError(f"a sweep needs {LEAST_POINTS} learning rates at least, got {len(sweep)}")
    check_positive(**{f"lr {lr}": lr for lr in sweep})
    lrs = sorted(sweep)
    losses = [sweep[lr] if isfinite(sweep[lr]) else inf for lr in lrs]
    if not any(map(isfinite, losses)):
        raise ValueError(f"all of {len(lrs)} learning rates diverged: try lower than {lrs[0]:g}")
    return lrs, losses


def _place(losses: list[float], best: int) -> Place:
    if best == 0:
        return "lower edge"
    if best == len(losses) - 1:
        return "upper edge"
    return "interior" if isfinite(losses[best + 1]) else "beside divergence"


def _neighbours(losses: list[float], best: int, points: int) -> list[int]:
    """A run of indices around the best, one on each side of it at least, none that diverged."""
    low, high = max(best - 1, 0), min(best + 1, len(losses) - 1)
    while high - low + 1 < points:
        below = losses[low - 1] if low > 0 else inf
        above = losses[high + 1] if high + 1 < len(losses) else inf
        if not isfinite(min(below, above)):
            break
        low, high = (low - 1, high) if below <= above else (low, high + 1)
    return list(range(low, high + 1))


def _between(lrs: list[float], best: int) -> tuple[float, ...]:
    """Half-way to both neighbours, unless that is nearer than a rate can be told."""
    steps = ((lrs[best - 1], lrs[best]), (lrs[best], lrs[best + 1]))
    return tuple(sqrt(a * b) for a, b in steps if b / a > FINEST**2)


def _unfitted(
    lrs: list[float], losses: list[float], best: int, place: Place, next_lrs: tuple[float, ...]
) -> Optimum:
    return Optimum(
        lr=lrs[best],
        loss=losses[best],
        tried=lrs[best],
        place=place,
        fitted=(),
        misfit=0.0,
        next_lrs=next_lrs,
    )


def sensitivity(sweep: Sweep, initial: float) -> float:
    """LR sensitivity (arXiv:2309.14322, sec. 2.2): E[min(l(lr), l_0) - l*] over the sweep.

    0 where every rate does equally well; a rate that diverged counts as no training at all.

    Args:
        sweep: loss by learning rate, over the same grid for everything compared.
        initial: l_0, the loss before training.
    """
    _, losses = _checked(sweep)
    best = min(losses)
    return float(np.mean([min(loss, initial) - min(best, initial) for loss in losses]))


def shared_rates(sweeps: Iterable[Sweep]) -> tuple[float, ...]:
    """The learning rates that every sweep tried, the smallest first: the grid of `sensitivity`."""
    grids = [set(sweep) for sweep in sweeps]
    return tuple(sorted(set.intersection(*grids))) if grids else ()
