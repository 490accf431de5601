"""Fitting power laws: many starts at once, the best of them polished by L-BFGS.

Levenberg-Marquardt steps bring every start, or every resample, near its minimum in some dozens of
batched iterations; scipy's L-BFGS-B, with the analytic gradient and in
float64, ends what is reported.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from recipes.statistics.bootstrap import Array
from recipes.statistics.powerlaw import PowerLaws

SCREENED = 128  # starts that are followed; all others start worse
ROUGH = 40  # iterations that all of these get
POLISHED = 8  # starts that are followed to the end
ITERATIONS = 300
STRAIGHT = 0.05  # curvature given to a residual on Huber's straight part, of a reweighted one's
GAIN = 1e-10  # of the value: what gains less has converged
SAME = 1e-3  # parameters closer than this agree


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """Where the fit ended."""

    theta: Array  # [P]
    value: float
    agreed: int  # of the best `of` starts, how many ended at these parameters
    of: int


def minimum(laws: PowerLaws, starts: Array, weights: Array | None = None) -> Minimum:
    """The best fit from many starts.

    Args:
        laws: the runs.
        starts: [s, P].
        weights: [n], or None for one each. Their scale does not matter.
    """
    w = np.ones(len(laws.group)) if weights is None else weights / weights.max()
    order = laws.value(starts, w).argsort(kind="stable")[:SCREENED]
    rough, values = descend(laws, starts[order], w, iterations=ROUGH)
    found, _ = descend(laws, rough[values.argsort(kind="stable")[:POLISHED]], w)
    ends = [_polish(laws, theta, w) for theta in found]
    theta, value = min(ends, key=lambda end: end[1])
    known = [_comparable(laws, end) for end, _ in ends]
    agreed = sum(bool(np.abs(k - _comparable(laws, theta)).max() < SAME) for k in known)
    return Minimum(theta=theta, value=value, agreed=agreed, of=len(ends))


def _comparable(laws: PowerLaws, theta: Array) -> Array:
    """The parameters, E as a share of the losses: where it vanishes, any ln E is as good."""
    return np.concatenate([[np.exp(theta[0] - laws.log_loss.min())], theta[1:]])


def _polish(laws: PowerLaws, theta: Array, weights: Array) -> tuple[Array, float]:
    def objective(x: Array) -> tuple[float, Array]:
        value, gradient = laws.value_and_gradient(x[None], weights)
        return float(value[0]), gradient[0]

    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-10}
    end = minimize(objective, theta, jac=True, method="L-BFGS-B", options=options)
    start = objective(theta)[0]
    return (end.x, float(end.fun)) if end.fun <= start else (theta, start)


def descend(
    laws: PowerLaws, starts: Array, weights: Array, *, iterations: int = ITERATIONS
) -> tuple[Array, Array]:
    """Each start's own minimum: parameters [b, P] and values [b].

    Between least squares reweighted for Huber's loss, which always descend but slowly, and its own
    curvature, which is none where residuals are large: STRAIGHT lies near the second, and damping
    refuses steps that do not descend. What has converged leaves.

    Args:
        laws: its log_loss may be [b, n].
        starts: [b, P].
        weights: [n] or [b, n].
        iterations: at most.
    """
    theta, n = starts.copy(), len(laws.group)
    weights = np.broadcast_to(weights, (len(theta), n))
    losses = np.broadcast_to(laws.log_loss, (len(theta), n))
    values = laws.value(theta, weights)
    damping = np.full(len(theta), 1e-2)
    live = np.arange(len(theta))
    for _ in range(iterations):
        if not live.size:
            break
        some, w = replace(laws, log_loss=losses[live]), weights[live]
        moved = theta[live] + _step(some, theta[live], w, damping[live])
        new = some.value(moved, w)
        better = new <= values[live]  # NaN is not
        gain = np.where(better, values[live] - new, np.inf)
        tried = live[better]
        theta[tried], values[tried] = moved[better], new[better]
        damping[live] = np.where(better, damping[live] / 5, damping[live] * 4)
        done = (gain <= GAIN * (values[live] + 1e-6)) | (damping[live] > 1e12)
        live = live[~done]
    return theta, values


def _step(laws: PowerLaws, theta: Array, weights: Array, damping: Array) -> Array:
    r, j = laws.jacobian(theta)
    size = np.abs(r)
    curved = weights * np.where(size <= 1, 1.0, STRAIGHT / np.maximum(size, 1.0))
    normal = (curved[..., None] * j).swapaxes(-1, -2) @ j  # [b, P, P]
    gradient = ((weights * np.clip(r, -1, 1))[..., None] * j).sum(-2)
    scale = np.einsum("bpp->bp", normal)
    scale = np.maximum(scale, 1e-9 * scale.max(-1, keepdims=True) + 1e-30)
    damped = np.maximum(damping, 1e-12)[:, None] * scale
    normal = normal + damped[..., None] * np.eye(theta.shape[1])
    # a step too far sends E to 0, whence no gradient leads back
    return -np.linalg.solve(normal, gradient[..., None])[..., 0].clip(-1, 1)
