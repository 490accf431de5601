"""Small floats with a real exponent bias (LLM-FP4, arXiv:2310.16836; precision.md 13.1).

E{e}M{m} with bias b holds 2^-b times what it holds with bias 0, so the bias is a scale. The
quantiser here takes either; no power is taken of an integer tensor, which torch rounds to zero.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BINADES = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF << 52)}


@dataclass(frozen=True)
class SmallFloat:
    """A sign bit, e = bits - 1 - m exponent bits and m mantissa bits; no infinity, no NaN.

    Zero and subnormals as usual, so at most 2^bits - 1 different values.
    """

    bits: int
    mantissa_bits: int

    def __post_init__(self) -> None:
        if self.bits not in range(3, 9):
            raise ValueError(f"bits must be 3 to 8, got {self.bits}")
        if self.mantissa_bits not in range(self.bits - 1):
            raise ValueError(
                f"mantissa_bits must be 0 to bits - 2 = {self.bits - 2}, got {self.mantissa_bits}"
            )

    @property
    def exponent_bits(self) -> int:
        """e, at least one."""
        return self.bits - 1 - self.mantissa_bits

    @property
    def name(self) -> str:
        """E.g. "fp4_e2m1", as the rows of `layers.precision.formats.FORMATS` are called."""
        return f"fp{self.bits}_e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def standard_bias(self) -> int:
        """The integer bias at which the scale is one: 2^(e-1) - 1, and 1 for a single bit."""
        return max(2 ** (self.exponent_bits - 1) - 1, 1)

    @property
    def standard_largest(self) -> float:
        """The largest value at the standard bias: 6 for E2M1."""
        return (2 - 2.0**-self.mantissa_bits) * 2.0 ** (
            2**self.exponent_bits - 1 - self.standard_bias
        )

    def largest(self, bias: Tensor) -> Tensor:
        """(2 - 2^-m) 2^(2^e - 1 - b)."""
        return self.standard_largest * self.scale_of(bias)

    def bias_of(self, largest: Tensor) -> Tensor:
        """b such that the format ends at `largest`: 2^e - log2(max) + log2(2 - 2^-m) - 1.

        Zero, which no bias gives, is answered with infinity.
        """
        top = 2**self.exponent_bits - 1 + math.log2(2 - 2.0**-self.mantissa_bits)
        return top - largest.log2()

    def scale_of(self, bias: Tensor) -> Tensor:
        """2^(standard_bias - b): one for the standard bias. An infinite bias is one too."""
        scale = torch.exp2(self.standard_bias - bias)
        return torch.where(bias.isposinf(), 1.0, scale)

    def quantize(self, x: Tensor, bias: Tensor) -> Tensor:
        """The nearest values of the format with that bias; larger ones clamp.

        Args:
            x: float32 or float64, finite.
            bias: broadcastable to x, in its dtype.
        """
        return self.round_to(x, self.scale_of(bias))

    def round_to(self, x: Tensor, scale: Tensor) -> Tensor:
        """The nearest of scale times the values at the standard bias.

        Ties go to the even multiple of the step: the even code, and between two powers of two of
        a format without mantissa bits the larger one.

        Args:
            x: float32 or float64, finite.
            scale: above zero, broadcastable to x, in its dtype.
        """
        y = x / scale
        integer, mask = BINADES[x.dtype]
        binade = (y.view(integer) & mask).view(x.dtype)  # 2^floor(log2|y|), from the bits
        step = binade.clamp(min=2.0 ** (1 - self.standard_bias)) * 2.0**-self.mantissa_bits
        rounded = (y / step).round_().mul_(step)
        return rounded.clamp_(-self.standard_largest, self.standard_largest).mul_(scale)


def formats(bits: int) -> tuple[SmallFloat, ...]:
    """Every format of that many bits, m = 0 .. bits - 2: for 4 bits E3M0, E2M1, E1M2."""
    return tuple(SmallFloat(bits, m) for m in range(bits - 1))
