"""Loss against tokens, FLOPs or seconds: time to a target, area between curves (comparison.md 6.5).

A trace is x and loss of one run's evaluations, x increasing; between them it is straight in ln x.
"""

import numpy as np
from numpy.typing import ArrayLike

from recipes.statistics.bootstrap import Array


def time_to(target: float, x: ArrayLike, loss: ArrayLike) -> float:
    """The first x at which the loss is down to the target; infinite where it never is.

    Args:
        target: declared before the runs.
        x, loss: [n]; a target already met at the first evaluation gives its x.
    """
    logs, losses = _trace(x, loss)
    reached = np.flatnonzero(losses <= target)
    if not reached.size:
        return float("inf")
    i = int(reached[0])
    if i == 0:
        return float(np.exp(logs[0]))
    part = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(np.exp(logs[i - 1] + part * (logs[i] - logs[i - 1])))


def area_between(x: ArrayLike, loss: ArrayLike, base_x: ArrayLike, base_loss: ArrayLike) -> float:
    """Mean of loss - baseline over ln x, in the range that both have; below zero is better.

    The area between the curves divided by the width of that range, so in the losses' unit.

    Raises:
        ValueError: where the ranges do not overlap.
    """
    logs, losses = _trace(x, loss)
    base_logs, base_losses = _trace(base_x, base_loss)
    low, high = max(logs[0], base_logs[0]), min(logs[-1], base_logs[-1])
    if low >= high:
        raise ValueError(f"the traces share no range, they start and end at {np.exp([low, high])}")
    knots = np.unique(np.concatenate([logs, base_logs, [low, high]]))
    knots = knots[(knots >= low) & (knots <= high)]
    gap = np.interp(knots, logs, losses) - np.interp(knots, base_logs, base_losses)
    return float(np.trapezoid(gap, knots) / (high - low))


def _trace(x: ArrayLike, loss: ArrayLike) -> tuple[Array, Array]:
    given, losses = np.asarray(x, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    if given.shape != losses.shape or given.ndim != 1 or len(given) < 2:
        raise ValueError(f"a trace is two evaluations at least, got {given.shape}, {losses.shape}")
    if not (given[0] > 0 and (np.diff(given) > 0).all()):
        raise ValueError("x of a trace must be positive and increase")
    return np.log(given), losses
