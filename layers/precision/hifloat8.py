"""HiFloat8 (arXiv:2409.16626): eight bits whose mantissa shrinks as the exponent leaves zero."""

import torch
from torch import Tensor

from layers.precision.grids import INFINITY, SIGN, SIZE, float_bits

LEAST, LARGEST, OVERFLOW = 2.0**-22, 2.0**15, 40960.0  # the last: half-way to the code of infinity


def cast_hifloat8(x: Tensor, rule: str, noise: Tensor | None) -> Tensor:
    """The nearest HiFloat8, half away from zero (precision.md section 5).

    Three mantissa bits while |exponent| <= 3, two to 7, one to 15; below 2^-15 powers of two down
    to 2^-22. From 40960 on infinite; what lies between 2^15 and that is 2^15. 2^-23 and less
    becomes zero. There is no negative zero; NaN stays.

    Args:
        x: float32.
        rule: not read; there is one.
        noise: [as x] in (0, 1), for stochastic rounding; None: nearest.
    """
    del rule
    bits = x.view(torch.int32)
    size = bits & SIZE
    exponent = (size >> 23).clamp(127 - 22, 127 + 15) - 127
    away = exponent.abs()
    mantissa = 3 - (away > 3).to(torch.int32) - (away > 7).to(torch.int32)
    mantissa = torch.where(exponent < -15, 0, mantissa)
    step = ((exponent - mantissa + 127) << 23).view(torch.float32)
    inverse = ((127 - exponent + mantissa) << 23).view(torch.float32)
    finite = size.clamp(max=float_bits(LARGEST)).view(torch.float32)
    rounded = (finite * inverse + (0.5 if noise is None else noise)).floor() * step
    if noise is None:
        rounded = torch.where(size <= float_bits(LEAST / 2), 0.0, rounded)
    rounded = torch.where(size >= float_bits(OVERFLOW), torch.inf, rounded).view(torch.int32)
    signed = rounded | (bits & SIGN & -rounded.clamp(max=1))
    return torch.where(size > INFINITY, x, signed.view(torch.float32))
