"""bfloat16 with fewer mantissa bits, E8M3 to E8M7, as arXiv:2405.18710 simulates them."""

from functools import partial

import torch
from torch import Tensor

from layers.precision.grids import INFINITY, SIGN, SIZE, round_bits
from layers.precision.row import Cast

SIMULATED_RULES = ("nearest", "mask")


def simulated(mantissa_bits: int) -> Cast:
    """The cast to E8M`mantissa_bits`, 1 to 7."""
    return partial(_cast, 23 - mantissa_bits)


def _cast(drop: int, x: Tensor, rule: str, noise: Tensor | None) -> Tensor:
    """The last `drop` bits of float32 x rounded away (precision.md section 14); no scale.

    Subnormal numbers keep as many digits of float32's. What rounds beyond the largest number is
    infinite; infinity, NaN and the sign of zero stay.

    Args:
        drop: bits to lose, 16 or more.
        x: float32.
        rule: "nearest", half to even; "mask", digits of the bfloat16 number cut off, toward zero.
        noise: [as x] in (0, 1), for stochastic rounding under "nearest"; None: nearest.
    """
    bits = x.view(torch.int32)
    size = (bits & SIZE).clamp(max=INFINITY)
    if rule == "mask":
        kept = round_bits(size, 16) & -(1 << drop)
    elif noise is None:
        kept = round_bits(size, drop)
    else:
        kept = (size + (noise * 2.0**drop).to(torch.int32)) & -(1 << drop)
    result = (kept | (bits & SIGN)).view(torch.float32)
    return torch.where(x.isnan(), x, result)
