"""Fitted laws as values: what they predict, where they reach a loss, how steep they are.

Their coefficients are 0-d arrays, or [b] for as many resamples, of which every answer is one too.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from recipes.statistics.bootstrap import Array


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """l(x) = E + A x^-a, over compute, tokens, parameters or seconds."""

    floor: Array  # E
    log_scale: Array  # ln A
    exponent: Array  # a

    def loss(self, x: ArrayLike) -> Array:
        """The loss at x."""
        return self.floor + self._above(x)

    def reaching(self, loss: ArrayLike) -> Array:
        """The x at which the loss is reached: ((l - E) / A)^(-1/a).

        Infinite at or below the floor, NaN for a curve that does not fall.
        """
        return _solve(np.asarray(loss) - self.floor, self.log_scale, self.exponent)

    def slope(self, x: ArrayLike) -> Array:
        """dl / d ln x, below zero: what a factor e of x is worth in loss."""
        return -self.exponent * self._above(x)

    def formula(self, x: str = "C") -> str:
        """The law with five significant digits; rounding an exponent further moves its term."""
        scale = np.exp(self.log_scale)
        return f"{self.floor:.5g} + {scale:.5g} {x}^-{self.exponent:.5g}"

    def _above(self, x: ArrayLike) -> Array:
        return np.exp(self.log_scale - self.exponent * np.log(np.asarray(x, dtype=np.float64)))


@dataclass(frozen=True, kw_only=True)
class Chinchilla:
    """l(N, D) = E + A N^-alpha + B D^-beta (arXiv:2203.15556, eq. 2)."""

    floor: Array  # E
    log_a: Array  # ln A
    alpha: Array
    log_b: Array  # ln B
    beta: Array

    def loss(self, size: ArrayLike, tokens: ArrayLike) -> Array:
        """The loss of a model of `size` parameters after `tokens`."""
        return self.at_tokens(tokens).loss(size)

    def at_tokens(self, tokens: ArrayLike) -> Frontier:
        """The law over N alone, at a fixed D."""
        rest = np.exp(self.log_b - self.beta * np.log(np.asarray(tokens, dtype=np.float64)))
        return Frontier(floor=self.floor + rest, log_scale=self.log_a, exponent=self.alpha)

    def at_size(self, size: ArrayLike) -> Frontier:
        """The law over D alone, at a fixed N."""
        rest = np.exp(self.log_a - self.alpha * np.log(np.asarray(size, dtype=np.float64)))
        return Frontier(floor=self.floor + rest, log_scale=self.log_b, exponent=self.beta)

    def optimal(self, compute: ArrayLike, flops_per_weight: float = 6.0) -> tuple[Array, Array]:
        """The best N and D for a compute of C = flops_per_weight * N * D (eq. 4 there)."""
        both = self.alpha + self.beta
        ratio = (np.log(self.alpha) + self.log_a - np.log(self.beta) - self.log_b) / both
        budget = np.log(np.asarray(compute, dtype=np.float64) / flops_per_weight)
        log_size = ratio + self.beta / both * budget
        return np.exp(log_size), np.exp(budget - log_size)

    def formula(self) -> str:
        """The law with five significant digits."""
        a, b = np.exp(self.log_a), np.exp(self.log_b)
        return f"{self.floor:.5g} + {a:.5g} N^-{self.alpha:.5g} + {b:.5g} D^-{self.beta:.5g}"


def _solve(gap: Array, log_scale: Array, exponent: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        x = np.exp((log_scale - np.log(gap)) / exponent)
    return np.where(exponent > 0, np.where(gap > 0, x, np.inf), np.nan)
