"""MS-EDEN (arXiv:2601.22813): nearest elements, and scales that make up for their bias.

After a random rotation the error of rounding to nearest lies, on average, along the vector itself:
q = c x + something of mean zero. Scales of a rotated tile are therefore multiplied by
sum(x^2) / sum(x q) and rounded to their grid at random, so that no bias is left.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.precision.encoding import Encoded, block_sum
from layers.precision.grids import Grid, to_grid
from layers.precision.nvfp4 import NVFP4_RULES, raw_scale, scaled_by


def eden_nvfp4(
    x: Tensor, dims: tuple[int, ...], grid: Grid, upper: Tensor | None, noise: Tensor, width: int
) -> Encoded:
    """NVFP4 by MS-EDEN (arXiv:2601.22813; precision.md section 12).

    Elements are rounded to nearest against 6 / (17/16 * 0.93); scales reach 255.99 at first, so
    that there is room above, and take one random number each, the noise of their block's first
    element. Zeros, NaN and infinities as in `encode_nvfp4`, but that a NaN spreads over its tile;
    a tile of zeros has the correction 1.

    Args:
        x: float32, rotated; blocks as a view whose axis before `dims` counts them.
        dims: the one axis that lies inside a block.
        grid: of the elements.
        upper: s_enc of the tensor, segment or row, broadcastable to x; None: 1.
        noise: [as x] in (0, 1).
        width: numbers in a rotated tile, which share a correction; a multiple of a block.
    """
    (dim,) = dims
    how = NVFP4_RULES["eden"]
    raw, upper = raw_scale(how, x, dims, grid, upper)
    scale, y = scaled_by(how, x, raw, upper)
    elements = to_grid(y, grid)
    y = torch.where(scale == 0.0, 0.0, y)  # of a block too small for any scale: nothing is left
    n_blocks = width // x.shape[dim]
    whole = _tile_sum(block_sum(y * y, dims), dim - 1, n_blocks)
    kept = _tile_sum(block_sum(y * elements, dims), dim - 1, n_blocks)
    corrected = scale * torch.where(kept == 0.0, 1.0, whole / kept)
    rounded = to_grid(corrected, how.scales, noise.narrow(dim, 0, 1))
    return Encoded(elements, torch.where(corrected.isnan(), corrected, rounded))


def _tile_sum(x: Tensor, axis: int, n: int) -> Tensor:
    """The sum over each n neighbours along a negative axis, in the place of every one of them."""
    length = x.shape[axis]
    short = -length % n  # only behind the last segment's rows, where no tile is
    if short:
        x = F.pad(x, [0, 0] * (-axis - 1) + [0, short])
    tiles = x.unflatten(axis, (-1, n))
    sums = block_sum(tiles, (axis,)).expand(tiles.shape)
    return sums.flatten(axis - 1, axis).narrow(axis, 0, length)
