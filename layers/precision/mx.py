"""Microscaling (OCP MX v1.0): one power of two, E8M0, for each block of elements."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from layers.precision.encoding import Encoded, block_sum, per_block
from layers.precision.grids import FLOAT_MAX, INFINITY, SIZE, TINIEST_SCALE, Grid, to_grid

QUEST_SQUARED = (2.92247856 / 6.0) ** 2


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
MXFP4_RULES = (*MX_RULES, "quest", "three_quarters")


def _floor_code(peak: Tensor, grid: Grid) -> Tensor:
    return _floor((peak.view(torch.int32) & SIZE).clamp(max=INFINITY), grid)


def e8m0(peak: Tensor, grid: Grid, rule: str) -> Tensor:
    """The power of two of each block, float32; NaN where the block holds one, or an infinity that
    no element could say: integers times 2^127 are finite.

    peak: float32, the largest magnitude of each block; rule: a key of MX_RULES.
    """
    bits = peak.view(torch.int32) & SIZE  # of NaN: above INFINITY
    code = MX_RULES[rule](bits.clamp(max=INFINITY), grid).clamp(0, 254)
    largest = INFINITY if grid.max_exponent > 0 else INFINITY - 1
    return torch.where(bits > largest, math.nan, power_of_two(code))


def _quest(x: Tensor, dims: tuple[int, ...], peak: Tensor, grid: Grid) -> Tensor:
    """2^floor(log2(c * std(block))), with c the best clip of a Gaussian on E2M1, 2.92247856 / 6.

    Computed on the block brought near 1, so that no square overflows or vanishes. A block of equal
    numbers has no spread, an infinite one none that is a number: there "floor" takes over.
    """
    floor = _floor_code(peak, grid)
    exponent = (peak.view(torch.int32) & SIZE).clamp(max=INFINITY - 1) >> 23
    near_one = x * per_block(power_of_two(254 - exponent))
    share = 1.0 / math.prod([x.shape[dim] for dim in dims])
    mean = block_sum(near_one, dims) * share
    variance = block_sum(near_one * near_one, dims) * share - mean * mean
    spread = ((variance * QUEST_SQUARED).view(torch.int32) >> 23) - 127
    code = exponent + (spread >> 1)  # the exponent of a root is half, rounded down
    return torch.where((variance > 0.0) & (peak <= FLOAT_MAX), code, floor).clamp(0, 254)


def _scale(x: Tensor, dims: tuple[int, ...], grid: Grid, rule: str) -> Tensor:
    peak = x.abs().amax(dims, keepdim=True)
    if rule == "quest":
        return torch.where(peak.isnan(), peak, power_of_two(_quest(x, dims, peak, grid)))
    return e8m0(peak, grid, "floor" if rule == "three_quarters" else rule)


def encode_mx(
    x: Tensor, dims: tuple[int, ...], grid: Grid, rule: str, upper: Tensor | None,
    noise: Tensor | None,
) -> Encoded:  # fmt: skip
    """Microscaling (OCP MX v1.0): elements of `grid` times one power of two per block.

    A block with a NaN becomes NaN as a whole. An infinity counts as 2^128 and decodes to
    infinity; its finite neighbours keep what is left of them under that scale. (Integers cannot
    say so: there an infinity makes its block NaN.) A zero keeps its sign. Values so near the
    float32 maximum that they round up to 2^128 become infinite.

    Args:
        x: float32, blocks as a view of any shape.
        dims: the axes that lie inside a block.
        grid: of the elements.
        rule: a key of `MX_RULES`, or one of `MXFP4_RULES`. "quest" (Quartet, arXiv:2505.14669):
            by the block's standard deviation, clipping what lies far out. "three_quarters"
            (arXiv:2502.20586): elements of 3/4 x under the scale of "floor", which never clip;
            the scale that decodes has the 4/3, so that stochastic rounding leaves x unbiased.
        upper: not read; MX has no scale above its blocks.
        noise: [as x] in (0, 1), for stochastic rounding; None: nearest.
    """
    del upper
    scale = per_block(_scale(x, dims, grid, rule))
    inverse = per_block(1.0 / scale)  # exact
    if rule == "three_quarters":
        return Encoded(to_grid(x * 0.75 * inverse, grid, noise), scale * (4.0 / 3.0))
    return Encoded(to_grid(x * inverse, grid, noise), scale)
