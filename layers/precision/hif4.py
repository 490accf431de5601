"""HiF4, also HiFloat4 (arXiv:2602.11287): 64 elements under three levels of scale.

A unit holds a scale E6M2, one doubling for each eight numbers (E1_8) and one for each four (E1_16):
value = E6M2 * 2^(E1_8 + E1_16) * k / 4, k = -7..7. No float32 scale is needed above it.
"""

import math

import torch
from torch import Tensor

from layers.precision.encoding import Encoded, per_block
from layers.precision.grids import FLOAT_MAX, INFINITY, SIGN, SIZE, Grid, float_bits, round_bits

UNIT = 64
SEVENTH = 0.142578125  # bf16(1 / 7)
LEAST, MOST = 2.0**-48, 49152.0  # of E6M2: 0x00 and 0xFE
TOP = 7.0  # largest element: 2^2 * 7 / 4


def bfloat16_bits(x: Tensor) -> Tensor:
    """Float32 bits of positive x rounded to bfloat16, half to even.

    In integers, for a compiler may drop a cast there and back.
    """
    return round_bits((x.view(torch.int32) & SIZE).clamp(max=INFINITY), 16)


def e6m2(peak: Tensor) -> Tensor:
    """The scale of a unit from its largest magnitude; NaN where that is infinite or NaN."""
    bits = bfloat16_bits(peak * SEVENTH).clamp(float_bits(LEAST), float_bits(MOST))
    return torch.where(peak <= FLOAT_MAX, round_bits(bits, 21).view(torch.float32), math.nan)


def encode_hif4(
    x: Tensor, dims: tuple[int, ...], grid: Grid, rule: str, upper: Tensor | None,
    noise: Tensor | None,
) -> Encoded:  # fmt: skip
    """HiF4 (arXiv:2602.11287, algorithm 1; precision.md section 5).

    Only the scale before its rounding and the scale's inverse are rounded to bfloat16; products
    are float32. Nearest means half away from zero. Values above 7 scales saturate, by up to 12%
    of the largest; and so do those between 7 and 8 quarters in a four that is not doubled. There
    stochastic rounding is biased towards zero, which no choice of scales avoids.

    An infinity or a NaN makes its unit NaN, for the format has no infinity. A zero keeps its sign;
    a unit of zeros has the scale 2^-48. Numbers below 2^-51 become zero.

    Args:
        x: float32, units of 64 as a view of any shape.
        dims: the one axis that lies inside a unit.
        grid: of the elements, k / 4.
        rule: not read; there is one.
        upper: not read; HiF4 has no scale above its units.
        noise: [as x] in (0, 1), for stochastic rounding; None: nearest.

    Returns:
        Elements k / 4 * 2^(E1_8 + E1_16), at most 7, and the scale E6M2.
    """
    del grid, rule, upper
    (dim,) = dims
    axis = dim % x.dim()
    fours = (8, 2, 4)
    parts = x.unflatten(axis, fours)
    size = parts.abs()
    peak_4 = size.amax(axis + 2, keepdim=True)
    peak_8 = peak_4.amax(axis + 1, keepdim=True)
    scale = per_block(e6m2(peak_8.amax(axis, keepdim=True)))
    inverse = per_block(bfloat16_bits(1.0 / scale).view(torch.float32))
    double_8 = torch.where(peak_8 * inverse >= 4.0, 2.0, 1.0)
    half_8 = 1.0 / double_8
    double_4 = torch.where(peak_4 * inverse * half_8 >= 2.0, 2.0, 1.0)
    quarter = per_block(double_8 * double_4 * 0.25)  # what one k stands for
    shift = 0.5 if noise is None else noise.unflatten(axis, fours)
    k = (size * inverse * (1.0 / quarter) + shift).floor()
    k = (k.view(torch.int32) & SIZE).clamp(max=float_bits(7.0)).view(torch.float32)
    elements = ((k * quarter).view(torch.int32) | (parts.view(torch.int32) & SIGN)).view(
        torch.float32
    )
    return Encoded(elements.flatten(axis, axis + 2), scale.flatten(axis, axis + 2))
