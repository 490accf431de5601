"""The lowest point of a parabola through measured losses."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from recipes.statistics.bootstrap import Array


@dataclass(frozen=True, kw_only=True)
class Vertex:
    """The lowest point of y = low + curvature (x - at)^2, for each of a batch of fits.

    NaN where the parabola has no lowest point.
    """

    at: Array
    low: Array
    curvature: Array


def vertex(x: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> Vertex:
    """Least squares, for many sets of losses or weights at once.

    Args:
        x: [n]; three different values at least.
        y: [n] or [b, n].
        weights: None, [n] or [b, n]; a fit with fewer than three different x is NaN.
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    w = np.ones_like(ys) if weights is None else np.asarray(weights, dtype=np.float64)
    ys, w = np.broadcast_arrays(ys, w)
    centre, scale = xs.mean(), np.ptp(xs) / 2 or 1.0
    u = (xs - centre) / scale
    design = np.stack([np.ones_like(u), u, u**2], axis=-1)  # [n, 3]
    values, of = np.unique(xs, return_inverse=True)
    distinct = ((w > 0).astype(float) @ np.eye(len(values))[of] > 0).sum(-1)
    normal = (w[..., None] * design).swapaxes(-1, -2) @ design  # [b, 3, 3]
    right = ((w * ys)[..., None] * design).sum(-2)
    c, b, a = np.moveaxis((np.linalg.pinv(normal) @ right[..., None])[..., 0], -1, 0)
    convex = (a > 1e-12 * np.abs(ys).max(-1)) & (distinct >= 3)
    a = np.where(convex, a, np.nan)
    return Vertex(
        at=np.asarray(centre - scale * b / (2 * a)),
        low=np.asarray(c - b**2 / (4 * a)),
        curvature=np.asarray(a / scale**2),
    )
