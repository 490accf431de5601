"""IF4 (code of arXiv:2512.02010's authors): each block picks its elements, E2M1 or integers.

The sign bit of a block's E4M3 scale, which NVFP4 leaves unused, says which. Integers n = -7..7
stand for n * 6/7, so that both kinds reach 6.
"""

import torch
from torch import Tensor

from layers.precision.encoding import Encoded, Upper, per_block
from layers.precision.grids import E1M2, Grid, to_grid
from layers.precision.nvfp4 import (
    MEASURES,
    NVFP4_RULES,
    raw_scale,
    scaled_by,
    upper_nvfp4,
)

IF4_RULES = tuple(MEASURES)
QUARTERS = 24 / 7  # elements k/4 of E1M2 times this are k * 6/7


def encode_if4(
    x: Tensor, dims: tuple[int, ...], grid: Grid, rule: str, upper: Tensor | None,
    noise: Tensor | None,
) -> Encoded:  # fmt: skip
    """IF4: NVFP4's scales, and the kind of elements with the smaller error; E2M1 on ties.

    Zeros, NaN and infinities as in `encode_nvfp4`. With noise the choice, made after rounding,
    leaves a bias.

    Args:
        x: float32, blocks as a view of any shape.
        dims: the axes that lie inside a block.
        grid: E2M1.
        rule: how errors are compared, a key of `MEASURES`: mean square, mean size, largest.
        upper: s_enc of the tensor, segment or row, broadcastable to x; None: 1.
        noise: [as x] in (0, 1), for stochastic rounding; None: nearest.

    Returns:
        Elements of E2M1 or n * 6/7 in float32, and the scale without its sign bit.
    """
    how, bad = NVFP4_RULES["max"], MEASURES[rule]
    raw, upper = raw_scale(how, x, dims, grid, upper)
    scale, y = scaled_by(how, x, raw, upper)
    floats = to_grid(y, grid, noise)
    whole = to_grid(y * (1.0 / QUARTERS), E1M2, noise) * QUARTERS
    target = x * upper
    worse = bad(target - floats * scale, dims)
    whole_is_better = per_block(bad(target - whole * scale, dims) < worse)
    return Encoded(torch.where(whole_is_better, whole, floats), scale)


def upper_if4(peak: Tensor, grid: Grid, rule: str) -> Upper:
    """As of NVFP4 under "max"; `rule` is about elements."""
    del rule
    return upper_nvfp4(peak, grid, "max")
