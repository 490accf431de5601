"""Number grids in torch ops: the definition of rounding that every kernel must equal.

Written for any device and for `torch.compile`: exponents come from float32 bits, rounding from
adding a power of two; no gather, no `log2`, no float64. Everything is float32 inside.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIGN, SIZE, EXPONENT = -0x80000000, 0x7FFFFFFF, 0x7F800000  # fields of a float32
INFINITY, NAN, TINIEST_SCALE = 0x7F800000, 0x7FC00000, 0x00400000  # the last is 2^-127
FLOAT_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A small float: a sign bit, `exponent_bits`, `mantissa_bits`; subnormals and signed zero.

    `largest` is named because some grids give their top code to NaN (E4M3: 448).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal; below it the step stays."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """floor(log2(largest)), what MX calls emax."""
        return math.frexp(self.largest)[1] - 1

    def magnitudes(self) -> tuple[float, ...]:
        """Every value without its sign, by code, up to `largest`."""
        step = 2.0**-self.mantissa_bits
        found = []
        for code in range(2 ** (self.exponent_bits + self.mantissa_bits)):
            exponent, mantissa = divmod(code, 2**self.mantissa_bits)
            normal = exponent > 0
            found.append(2.0 ** (max(exponent, 1) - self.bias) * (normal + mantissa * step))
        return tuple(value for value in found if value <= self.largest)


E3M0 = Grid(name="e3m0", exponent_bits=3, mantissa_bits=0, bias=3, largest=16.0)
E2M1 = Grid(name="e2m1", exponent_bits=2, mantissa_bits=1, bias=1, largest=6.0)
E1M2 = Grid(name="e1m2", exponent_bits=1, mantissa_bits=2, bias=1, largest=1.75)  # k / 4
E1M6 = Grid(name="e1m6", exponent_bits=1, mantissa_bits=6, bias=1, largest=127 / 64)  # k / 64
E2M3 = Grid(name="e2m3", exponent_bits=2, mantissa_bits=3, bias=1, largest=7.5)
E3M2 = Grid(name="e3m2", exponent_bits=3, mantissa_bits=2, bias=3, largest=28.0)
E4M3 = Grid(name="e4m3", exponent_bits=4, mantissa_bits=3, bias=7, largest=448.0)
E5M2 = Grid(name="e5m2", exponent_bits=5, mantissa_bits=2, bias=15, largest=57344.0)
GRIDS = {grid.name: grid for grid in (E3M0, E2M1, E1M2, E1M6, E2M3, E3M2, E4M3, E5M2)}
# of scales, without a sign; the top exponent belongs to numbers, but for the code of NaN
UE5M3 = Grid(name="ue5m3", exponent_bits=5, mantissa_bits=3, bias=15, largest=114688.0)


def float_bits(value: float) -> int:
    """The float32 bits of a positive power of two times a short mantissa."""
    mantissa, exponent = math.frexp(value)
    return ((exponent + 126) << 23) + int((2 * mantissa - 1) * 2**23)


def round_bits(size: Tensor, drop: int) -> Tensor:
    """Float32 bits of positive numbers, their last `drop` bits rounded away, half to even.

    size: int32, at most INFINITY. What rounds beyond the largest float32 becomes infinite.
    """
    half = (1 << (drop - 1)) - 1
    return (size + half + ((size >> drop) & 1)) & -(1 << drop)


def to_grid(y: Tensor, grid: Grid, noise: Tensor | None = None) -> Tensor:
    """A value of `grid` next to y, too large ones clamped to +-largest.

    The nearest one, ties to the even code; with noise u in (0, 1) the stochastic one,
    floor(|y| / step + u) * step, whose mean is y (precision.md section 8).

    Without mantissa bits (E3M0) half a step always goes up: 1.5 steps are nearest to the even
    number 2 of them, as with round(|y| / step) * step of arXiv:2310.16836.

    y: float32. The sign of zero stays. NaN clamps like infinity: a NaN must reach the result
    through its block's scale.
    """
    bits = y.view(torch.int32)
    size = (bits & SIZE).clamp(max=float_bits(grid.largest))
    step = (size & EXPONENT).clamp(min=(127 + grid.min_exponent) << 23)
    if noise is None:
        # 2^23 steps: adding it leaves no bit below one step, and the addition rounds half to even
        magic = (step + ((23 - grid.mantissa_bits) << 23)).view(torch.float32)
        rounded = (size.view(torch.float32) + magic) - magic
    else:
        step = step - (grid.mantissa_bits << 23)
        inverse = ((254 << 23) - step).view(torch.float32)  # exact: a power of two
        steps = (size.view(torch.float32) * inverse + noise).floor()
        rounded = steps * step.view(torch.float32)
    return (rounded.view(torch.int32) | (bits & SIGN)).view(torch.float32)


def without_negative_zero(y: Tensor) -> Tensor:
    """y, float32, its zeros all positive."""
    bits = y.view(torch.int32)
    signed = (bits & SIZE).clamp(max=1)  # 0 for a zero: its sign goes
    return (bits & -signed).view(torch.float32)
