"""What the encoders of the formats share: their result, scales above blocks, one inductor hint."""

from typing import NamedTuple

import torch
from torch import Tensor

from layers.precision.grids import FLOAT_MAX


class Encoded(NamedTuple):
    """Blocks on a coarse grid; a value is elements * scale."""

    elements: Tensor  # float32, on the element grid, in the shape of the blocks
    scale: Tensor | None  # float32, broadcastable: of each block; None: 1


class Upper(NamedTuple):
    """The float32 scale above the blocks' own, for a tensor, segment or row; broadcastable."""

    encode: Tensor  # values are multiplied by it before they meet the grid
    decode: Tensor  # and their product by it afterwards


def per_block(x: Tensor) -> Tensor:
    """x itself. Inductor stores what an as_strided reads, so that it works a scale out once for a
    block; otherwise it would do so again for every element and part the loops.
    """
    return x.as_strided(x.shape, x.stride())


def block_sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sums over blocks, one value a block, added up in an order that belongs to the definition.

    The second half of an axis onto the first until one is left; rows of a tile before its columns,
    after the tile and its transpose are averaged, so that both have the same sum to the bit.

    Args:
        x: float32, blocks of powers of two as a view.
        dims: the axes that lie inside a block; they stay, with length 1.
    """
    if len(dims) == 2:
        x = (x + x.transpose(*dims)) * 0.5
    for dim in dims:
        while (n := x.shape[dim]) > 1:
            x = x.narrow(dim, 0, n // 2) + x.narrow(dim, n // 2, n // 2)
    return x


def upper_of(peak: Tensor, largest: float) -> Upper:
    # a tensor, for a number divided by a tensor would be the product with its rounded inverse
    top = torch.full_like(peak, largest)
    usable = (peak > 0) & (peak <= FLOAT_MAX)
    encode = torch.where(usable, (top / peak).clamp(max=FLOAT_MAX), 1.0)
    return Upper(per_block(encode), peak / largest)
