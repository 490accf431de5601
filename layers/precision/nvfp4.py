"""NVFP4: an E4M3 scale for each block of E2M1 elements, under one float32 scale."""

import math

import torch
from torch import Tensor

from layers.precision.encoding import Encoded, Upper, per_block, upper_of
from layers.precision.grids import E4M3, FLOAT_MAX, Grid, to_grid, without_negative_zero


def encode_nvfp4(
    x: Tensor, dims: tuple[int, ...], grid: Grid, rule: str, upper: Tensor | None,
    noise: Tensor | None,
) -> Encoded:  # fmt: skip
    """NVFP4 (arXiv:2509.25149, appendix B), float32 in TransformerEngine's order of operations.

    E4M3 scale per block (subnormal ones too) under one float32 scale, which stays out of the
    result. -0.0 becomes +0.0.

    Args:
        x: float32, blocks as a view of any shape.
        dims: the axes that lie inside a block.
        grid: of the elements.
        rule: "max", the block's largest magnitude maps to the grid's largest value.
        upper: s_enc of the tensor, segment or row, broadcastable to x.
        noise: [as x] in (0, 1), for stochastic rounding; None: nearest.
    """
    assert upper is not None
    assert rule == "max"
    s_dec = 1.0 / upper
    peak = x.abs().amax(dims, keepdim=True)
    scale = to_grid(peak * (upper * (1.0 / grid.largest)), E4M3)
    scale = per_block(torch.where(peak.isnan(), math.nan, scale))
    y = x * per_block((1.0 / (scale * s_dec)).clamp(max=FLOAT_MAX))
    return Encoded(to_grid(without_negative_zero(y), grid, noise), scale)


def upper_nvfp4(peak: Tensor, grid: Grid, rule: str) -> Upper:
    """The largest magnitude maps to the largest element under the largest scale, 6 * 448.

    A tensor of zeros decodes by zero; an infinity or NaN makes the scale infinite or NaN, so that
    no value of the tensor looks finite once multiplied.
    """
    del rule
    return upper_of(peak, E4M3.largest * grid.largest)
