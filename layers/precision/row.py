"""What a number format is: the row that a table of formats holds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.precision.encoding import Encoded, Upper
from layers.precision.grids import Grid

Encoder = Callable[
    [Tensor, tuple[int, ...], Grid, str, Tensor | None, Tensor | None], Encoded
]  # blocks, axes inside a block, grid, rule, upper scale, noise
Eden = Callable[
    [Tensor, tuple[int, ...], Grid, Tensor | None, Tensor, int], Encoded
]  # blocks, axes inside a block, grid, upper scale, noise, width of a rotated tile
Cast = Callable[[Tensor, str, Tensor | None], Tensor]  # float32 numbers, rule, noise


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row: what a number format is and how tensors get there.

    Either `dtype` (only a cast), or `cast` (each number by itself), or `grid` and `encode`
    (blocks under scales).
    """

    name: str
    bits: float  # storage per number, one-byte block scales included, float32 scales not
    summary: str
    paper: str
    dtype: torch.dtype | None = None  # a format that is only a cast
    cast: Cast | None = None  # a format without scales
    grid: Grid | None = None  # of the elements
    block: int = 1  # numbers that share a scale, along the contracted axis
    scale_rules: tuple[str, ...] = ()  # the first is the default
    tiles: tuple[str, ...] = ("1d",)  # 2d: block x block numbers share a scale
    scopes: tuple[str, ...] = ()  # what one float32 scale spans; the first is the default
    roundings: tuple[str, ...] = ("nearest", "stochastic")
    exact_in_bf16: bool = True  # the decoded values, without a scale that spans more than a block
    inexact_rules: tuple[str, ...] = ()  # those under which they are not
    largest_element: float | None = None  # None: the grid's
    encode: Encoder | None = None
    eden: Eden | None = None  # rounding "eden"
    upper: Callable[[Tensor, Grid, str], Upper] | None = None  # from the largest magnitude

    def __post_init__(self) -> None:
        ways = [self.dtype is not None, self.cast is not None, self.encode is not None]
        if sum(ways) != 1 or (self.grid is None) != (self.encode is None):
            raise ValueError(f"format {self.name!r} needs dtype, or cast, or grid and encode")
        if ("eden" in self.roundings) != (self.eden is not None):
            raise ValueError(f"format {self.name!r}: rounding eden and `eden` go together")
        spans = set(self.scopes) - {"block", "none"}
        if spans and self.upper is None:
            raise ValueError(f"format {self.name!r}: scopes {sorted(spans)} need `upper`")

    @property
    def top(self) -> float:
        """The largest magnitude of an element; infinite for a format without scales."""
        if self.largest_element is not None:
            return self.largest_element
        return float("inf") if self.grid is None else self.grid.largest
