"""Elements under float32 scales: FP8 by tensor, row or block, and what else is scaled so."""

import torch
from torch import Tensor

from layers.precision.encoding import Encoded, Upper, per_block, upper_of
from layers.precision.grids import EXPONENT, FLOAT_MAX, Grid, to_grid

SCALED_RULES = ("max", "p2")


def encode_scaled(
    x: Tensor, dims: tuple[int, ...], grid: Grid, rule: str, upper: Tensor | None,
    noise: Tensor | None,
) -> Encoded:  # fmt: skip
    """Elements of `grid` under float32 scales: of a tensor or row, or one of each block.

    Args:
        x: float32, blocks as a view of any shape.
        dims: the axes that lie inside a block.
        grid: of the elements.
        rule: a key of `SCALED_RULES`.
        upper: what to multiply by; None: each block has a scale of its own.
        noise: [as x] in (0, 1), for stochastic rounding; None: nearest.
    """
    if upper is not None:
        return Encoded(_keeping_nan(x * upper, grid, noise), None)
    own = upper_scaled(x.abs().amax(dims, keepdim=True), grid, rule)
    return Encoded(_keeping_nan(x * own.encode, grid, noise), per_block(own.decode))


def _keeping_nan(y: Tensor, grid: Grid, noise: Tensor | None) -> Tensor:
    return torch.where(y.isnan(), y, to_grid(y, grid, noise))


def upper_scaled(peak: Tensor, grid: Grid, rule: str) -> Upper:
    """largest / peak (arXiv:2412.19437, section 3.3), or the power of two at or below it ("p2").

    A tensor of zeros decodes by zero; an infinity or NaN makes the scale infinite or NaN.
    """
    encode = upper_of(peak, grid.largest).encode
    if rule == "p2":
        encode = (encode.view(torch.int32) & EXPONENT).clamp(min=1 << 23).view(torch.float32)
    usable = (peak > 0) & (peak <= FLOAT_MAX)
    return Upper(encode, torch.where(usable, 1.0 / encode, peak))
