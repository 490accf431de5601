"""Number grids and block quantisers in torch ops: the definition that every kernel must equal.

Written for any device and for `torch.compile`: exponents come from float32 bits, rounding from
adding a power of two; no gather, no `log2`, no float64. Everything is float32 inside.
"""

import math
from collections.abc import Callable
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


E2M1 = Grid(name="e2m1", exponent_bits=2, mantissa_bits=1, bias=1, largest=6.0)
E4M3 = Grid(name="e4m3", exponent_bits=4, mantissa_bits=3, bias=7, largest=448.0)
GRIDS = {grid.name: grid for grid in (E2M1, E4M3)}


def float_bits(value: float) -> int:
    """The float32 bits of a positive power of two times a short mantissa."""
    mantissa, exponent = math.frexp(value)
    return ((exponent + 126) << 23) + int((2 * mantissa - 1) * 2**23)


def to_grid(y: Tensor, grid: Grid) -> Tensor:
    """The nearest value of `grid`, ties to the even code, too large ones clamped to +-largest.

    y: float32. The sign of zero stays. NaN clamps like infinity: a NaN must reach the result
    through its block's scale.
    """
    bits = y.view(torch.int32)
    size = (bits & SIZE).clamp(max=float_bits(grid.largest))
    # 2^23 steps: adding it leaves no bit below one step, and the addition rounds half to even
    magic = (size & EXPONENT).clamp(min=(127 + grid.min_exponent) << 23)
    magic = (magic + ((23 - grid.mantissa_bits) << 23)).view(torch.float32)
    rounded = (size.view(torch.float32) + magic) - magic
    return (rounded.view(torch.int32) | (bits & SIGN)).view(torch.float32)


def _per_block(x: Tensor) -> Tensor:
    """x itself. Inductor stores what an as_strided reads, so that it works a scale out once for a
    block; otherwise it would do so again for every element and part the loops.
    """
    return x.as_strided(x.shape, x.stride())


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


def encode_mx(
    x: Tensor, dims: tuple[int, ...], grid: Grid, rule: str, tensor_peak: Tensor | None = None
) -> Tensor:
    """Microscaling (OCP MX v1.0): elements of `grid` times one power of two per block.

    A block with a NaN becomes NaN as a whole. An infinity counts as 2^128 and decodes to
    infinity; its finite neighbours keep what is left of them under that scale. A zero keeps its
    sign. Values so near the float32 maximum that they round up to 2^128 become infinite.

    Args:
        x: float32, blocks as a view of any shape.
        dims: the axes that lie inside a block.
        grid: of the elements.
        rule: a key of `MX_RULES`.
        tensor_peak: not read; MX has no tensor scale.

    Returns:
        The decoded values, in the shape of x.
    """
    del tensor_peak
    peak = x.abs().amax(dims, keepdim=True).view(torch.int32) & SIZE  # of NaN: above INFINITY
    code = MX_RULES[rule](peak.clamp(max=INFINITY), grid).clamp(0, 254)
    scale = _per_block(torch.where(peak > INFINITY, math.nan, power_of_two(code)))
    inverse = _per_block(1.0 / scale)  # exact
    return to_grid(x * inverse, grid) * scale


def encode_nvfp4(
    x: Tensor, dims: tuple[int, ...], grid: Grid, rule: str, tensor_peak: Tensor | None = None
) -> Tensor:
    """NVFP4 (arXiv:2509.25149, appendix B), float32 in TransformerEngine's order of operations.

    E4M3 scale per block (subnormal ones too) under one float32 scale per tensor, which stays out
    of the result: multiply by `tensor_scale(tensor_peak)`. -0.0 becomes +0.0. An infinity or NaN
    makes that scale infinite or NaN, so that no value of the tensor looks finite once multiplied.

    Args:
        x: float32, blocks as a view of any shape.
        dims: the axes that lie inside a block.
        grid: of the elements.
        rule: "max", the block's largest magnitude maps to the grid's largest value.
        tensor_peak: largest magnitude of the tensor (segment) of each block, broadcastable to x.

    Returns:
        The decoded values without the tensor scale, exact in bfloat16 and float16.
    """
    assert tensor_peak is not None
    assert rule == "max"
    # a tensor, for a number divided by a tensor would be the product with its rounded inverse
    top = torch.full_like(tensor_peak, E4M3.largest * grid.largest)
    usable = (tensor_peak > 0) & (tensor_peak <= FLOAT_MAX)
    s_enc = _per_block(torch.where(usable, (top / tensor_peak).clamp(max=FLOAT_MAX), 1.0))
    s_dec = 1.0 / s_enc
    peak = x.abs().amax(dims, keepdim=True)
    scale = to_grid(peak * (s_enc * (1.0 / grid.largest)), E4M3)
    scale = _per_block(torch.where(peak.isnan(), math.nan, scale))
    y = x * _per_block((1.0 / (scale * s_dec)).clamp(max=FLOAT_MAX))
    bits = y.view(torch.int32)
    signed = (bits & SIZE).clamp(max=1)  # 0 for a zero: its sign goes
    return to_grid((bits & -signed).view(torch.float32), grid) * scale


def tensor_scale(tensor_peak: Tensor, grid: Grid) -> Tensor:
    """What the values of `encode_nvfp4` are to be multiplied by. Zero for a tensor of zeros."""
    return tensor_peak / (E4M3.largest * grid.largest)
