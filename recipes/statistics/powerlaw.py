"""Sums of power laws: l = E + sum_j A_j x_j^-p_j, and how badly they fit (arXiv:2203.15556, eq. 3).

Everything is batched, so that many starts or resamples are fitted at once. Parameters are rows
(e, a_11, ..., a_GJ, p_11, ..., p_GJ) with E = exp(e), A = exp(a): G groups (variants) have terms
of their own and one E together; the irreducible loss does not depend on the architecture.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from recipes.statistics.bootstrap import Array

DELTA = 1e-3  # of Huber's loss, in ln(loss)


@dataclass(frozen=True, kw_only=True)
class PowerLaws:
    """The runs that are fitted; n of them, J inputs, G groups."""

    logs: Array  # [n, J], ln x_j, each less its mean: the fit is better conditioned around it
    log_loss: Array  # [n], or [b, n] for losses that differ between resamples
    group: NDArray[np.int64]  # [n], 0 to G - 1
    delta: float = DELTA

    @cached_property
    def member(self) -> Array:
        """[n, G], which group a run is of."""
        return np.eye(int(self.group.max()) + 1)[self.group]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return 1 + 2 * self.member.shape[1] * self.logs.shape[1]

    def split(self, theta: Array) -> tuple[Array, Array, Array]:
        """[b, P] -> e [b, 1], a [b, G, J], p [b, G, J]."""
        shape = (len(theta), self.member.shape[1], self.logs.shape[1])
        half = shape[1] * shape[2]
        return (
            theta[:, :1],
            theta[:, 1 : 1 + half].reshape(shape),
            theta[:, 1 + half :].reshape(shape),
        )

    def terms(self, theta: Array) -> tuple[Array, Array]:
        """ln of the fitted loss of each run [b, n], and each term's share of it [1 + J, b, n]."""
        e, a, p = self.split(theta)
        by_run = (a[:, self.group] - p[:, self.group] * self.logs).transpose(2, 0, 1)
        terms = np.concatenate([np.broadcast_to(e, by_run.shape[1:])[None], by_run])
        top = terms.max(0)
        shares = np.exp(terms - top)  # log-sum-exp over the leading axis, the fast one to reduce
        total = shares.sum(0)
        return top + np.log(total), shares / total

    def value(self, theta: Array, weights: Array) -> Array:
        """sum_i w_i Huber_delta(ln l^_i - ln l_i) / delta^2: [b]. A sum, not a mean.

        Averaging makes an optimiser's absolute tolerances bite too early (arXiv:2404.10102, sec.
        3.4), and so does leaving the tiny delta^2 in.
        """
        return self._huber((self.terms(theta)[0] - self.log_loss) / self.delta, weights)

    def jacobian(self, theta: Array) -> tuple[Array, Array]:
        """Residuals in delta [b, n], and their derivatives by the parameters [b, n, P]."""
        predicted, shares = self.terms(theta)
        powers = shares[1:].transpose(1, 2, 0)[:, :, None] * self.member[:, :, None]  # [b, n, G, J]
        flat = (*predicted.shape, -1)
        slopes = -powers * self.logs[:, None, :]
        parts = [shares[0][..., None], powers.reshape(flat), slopes.reshape(flat)]
        return (predicted - self.log_loss) / self.delta, np.concatenate(parts, -1) / self.delta

    def value_and_gradient(self, theta: Array, weights: Array) -> tuple[Array, Array]:
        """The value [b] and its gradient [b, P]."""
        r, j = self.jacobian(theta)
        pull = weights * np.clip(r, -1, 1)
        return self._huber(r, weights), (pull[..., None] * j).sum(-2)

    @staticmethod
    def _huber(r: Array, weights: Array) -> Array:
        size = np.abs(r)
        return (weights * np.where(size <= 1, r**2 / 2, size - 0.5)).sum(-1)
