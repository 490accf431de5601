"""Microscaling (OCP MX v1.0): one power of two, E8M0, for each block of elements."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from layers.precision.encoding import Encoded, per_block
from layers.precision.grids import INFINITY, SIZE, TINIEST_SCALE, Grid, to_grid


def power_of_two(code: Tensor) -> Tensor:
    """2^(code - 127) in float32 for E8M0 codes 0..254. code: int32."""
    return (code << 23).clamp(min=TINIEST_SCALE).view(torch.float32)


def _floor(peak: Tensor, grid: Grid) -> Tensor:
    return (peak >> 23) - grid.max_exponent


def _rceil(peak: Tensor, grid: Grid) -> Tensor:
    ratio = (peak.view(torch.float32) * (1.0 / grid.largest)).view(torch.int32)
    # carry into the exponent unless the mantissa is zero; a subnormal, unless at most 2^-127
    carry = ((ratio >> 23).clamp(max=1) << 22) + 0x3FFFFF
    return (ratio + carry) >> 23


def _ceil(peak: Tensor, grid: Grid) -> Tensor:
    return ((peak + 0x7FFFFF) >> 23) - grid.max_exponent


def _even(peak: Tensor, grid: Grid) -> Tensor:
    return ((peak + (1 << (22 - grid.mantissa_bits))) >> 23) - grid.max_exponent


# name -> E8M0 code before clamping, from the bits of the block's largest magnitude
MX_RULES: dict[str, Callable[[Tensor, Grid], Tensor]] = {
    "floor": _floor,
    "rceil": _rceil,
    "ceil": _ceil,
    "even": _even,
}


def e8m0(peak: Tensor, grid: Grid, rule: str) -> Tensor:
    """The power of two of each block, float32; NaN where the block holds one.

    peak: float32, the largest magnitude of each block; rule: a key of MX_RULES.
    """
    bits = peak.view(torch.int32) & SIZE  # of NaN: above INFINITY
    code = MX_RULES[rule](bits.clamp(max=INFINITY), grid).clamp(0, 254)
    return torch.where(bits > INFINITY, math.nan, power_of_two(code))


def encode_mx(
    x: Tensor, dims: tuple[int, ...], grid: Grid, rule: str, upper: Tensor | None,
    noise: Tensor | None,
) -> Encoded:  # fmt: skip
    """Microscaling (OCP MX v1.0): elements of `grid` times one power of two per block.

    A block with a NaN becomes NaN as a whole. An infinity counts as 2^128 and decodes to
    infinity; its finite neighbours keep what is left of them under that scale. A zero keeps its
    sign. Values so near the float32 maximum that they round up to 2^128 become infinite.

    Args:
        x: float32, blocks as a view of any shape.
        dims: the axes that lie inside a block.
        grid: of the elements.
        rule: a key of `MX_RULES`.
        upper: not read; MX has no scale above its blocks.
        noise: [as x] in (0, 1), for stochastic rounding; None: nearest.
    """
    del upper
    scale = per_block(e8m0(x.abs().amax(dims, keepdim=True), grid, rule))
    inverse = per_block(1.0 / scale)  # exact
    return Encoded(to_grid(x * inverse, grid, noise), scale)
