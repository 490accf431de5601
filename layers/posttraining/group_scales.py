"""FP4 weights in groups along the input, with scales that FP8 can shift by (ZeroQuant-FP).

arXiv:2307.09782; precision.md 13.2. A scale that is a power of two lets FP4 be cast to FP8 by
moving exponent bits. M1 makes every scale one; M2 only their ratios within a group of rows, so one
real factor is left for the whole group.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from layers.names import check_choice, check_positive
from layers.posttraining.gptq import Fit
from layers.posttraining.real_bias import SmallFloat

CONSTRAINTS = ("free", "m1", "m2", "m2_up")
ROWS = 128  # that M2 ties together, where nothing else is said; the paper's number was not found


def fit_scales(
    columns: Tensor, grid: SmallFloat, constraint: str = "free", rows: int = ROWS
) -> Tensor:
    """One scale for each row of a group of columns.

    Free: S_i = max |w| / largest value of the grid. M1: 2^ceil(log2 S_i). M2, as the paper writes
    it: S_max / 2^ceil(log2(S_max / S_i)), at most S_i, so large weights clip. "m2_up" rounds that
    exponent down, so that nothing clips.

    Args:
        columns: [N, g].
        grid: of the elements.
        constraint: one of CONSTRAINTS.
        rows: consecutive rows that share S_max, for M2.

    Returns:
        [N, 1], above zero: a row of zeros has the largest scale of its rows, or one.
    """
    check_choice("constraint on scales", constraint, CONSTRAINTS)
    check_positive(rows=rows)
    free = columns.abs().amax(1, keepdim=True) / grid.standard_largest
    if constraint == "m1":
        return torch.where(free > 0, torch.exp2(ceil_log2(free)), 1.0)
    if constraint == "free":
        return torch.where(free > 0, free, 1.0)
    tops = [part.amax().expand(len(part), 1) for part in free.split(rows)]
    top = torch.cat(tops)
    ratio = torch.where(free > 0, top / free, 1.0)
    exponent = ceil_log2(ratio) if constraint == "m2" else -ceil_log2(1 / ratio)
    return torch.where(top > 0, top * torch.exp2(-exponent), 1.0)


def ceil_log2(x: Tensor) -> Tensor:
    """ceil(log2 x), exact. x: above zero, any floating type; zero gives zero."""
    mantissa, exponent = torch.frexp(x)  # mantissa in [0.5, 1)
    return (exponent - (mantissa == 0.5).to(exponent.dtype)).to(x.dtype)


def group_fit(grid: SmallFloat, constraint: str = "free", rows: int = ROWS) -> Fit:
    """For `gptq` and `round_groups`: round a group to `grid` under the scales of `fit_scales`."""

    def fit(columns: Tensor) -> Callable[[Tensor], Tensor]:
        scale = fit_scales(columns, grid, constraint, rows)
        return lambda part: grid.round_to(part, scale)

    return fit
