"""Numbers of a small grid as integer codes in bytes, and the codes of block scales.

Everything is exact both ways: what is encoded must lie on its grid. A code is the sign bit, then
exponent, then mantissa (precision.md section 1); the scales are those of its section 2.
"""

import functools
import math

import torch
from torch import Tensor

from layers.names import check_choice
from layers.precision.grids import NAN, TINIEST_SCALE, Grid

# Grids whose codes torch has a dtype for; four bits: two codes a byte.
NATIVE = {
    "e2m1": torch.float4_e2m1fn_x2,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e8m0": torch.float8_e8m0fnu,
    "ue4m3": torch.float8_e4m3fn,
}


def code_bits(grid: Grid) -> int:
    """Bits of one code of a grid, the sign included."""
    return 1 + grid.exponent_bits + grid.mantissa_bits


@functools.cache
def values_by_code(grid: Grid) -> Tensor:
    """[2^bits] float32, the number that each code stands for; NaN for codes past the largest."""
    half = 1 << (code_bits(grid) - 1)
    sizes = torch.tensor(grid.magnitudes(), dtype=torch.float64).float()
    table = torch.full((half,), math.nan)
    table[: len(sizes)] = sizes
    if grid.name == "e5m2":
        table[len(sizes)] = math.inf
    return torch.cat((table, -table))


def encode_elements(values: Tensor, grid: Grid) -> Tensor:
    """The codes of numbers that lie on a grid.

    Args:
        values: any shape, floating point. NaN becomes the grid's last code where that is none of
            its numbers (E4M3, E5M2).
        grid: of the numbers.

    Returns:
        uint8, the shape of values. The sign of zero stays.

    Raises:
        ValueError: for a number that is not on the grid.
    """
    values = values.float()
    half = 1 << (code_bits(grid) - 1)
    sizes = values_by_code(grid)[:half].to(values.device)
    known = int((~sizes.isnan()).sum())
    code = torch.bucketize(values.abs().contiguous(), sizes[:known])
    found = sizes[code.clamp(max=known - 1)] == values.abs()
    if known < half:
        found |= values.isnan()
        code = torch.where(values.isnan(), half - 1, code)
    _check_found(found, values, f"the grid {grid.name}")
    return (code + half * values.signbit()).to(torch.uint8)


def decode_elements(codes: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of codes. codes: uint8, any shape, below 2^bits. Returns that shape in dtype."""
    return values_by_code(grid).to(codes.device, dtype)[codes.to(torch.int32)]


def row_bytes(n: int, bits: int) -> int:
    """Bytes that a row of n codes takes: 4 bits two a byte, 6 bits four in three bytes."""
    return {4: (n + 1) // 2, 6: (n + 3) // 4 * 3, 8: n}[bits]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes close together, row by row.

    Args:
        codes: [..., n] uint8, each below 2^bits.
        bits: 4: the low nibble holds the even index; 6: value i of four at bit 6 i of three bytes,
            little-endian; 8: as they are. A row that ends inside a byte is filled with zeros.

    Returns:
        [..., row_bytes(n, bits)] uint8.
    """
    _check_bits(bits)
    if bits == 8:
        return codes.contiguous()
    group = 2 if bits == 4 else 4
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % group))
    parts = codes.unflatten(-1, (-1, group)).unbind(-1)
    if bits == 4:
        return parts[0] | (parts[1] << 4)
    a, b, c, d = parts
    return torch.stack((a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)), -1).flatten(-2)


def unpack_codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """What `pack_codes` packed. packed: [..., row_bytes(n, bits)] uint8. Returns [..., n] uint8."""
    _check_bits(bits)
    if packed.shape[-1] != row_bytes(n, bits):
        raise ValueError(
            f"{n} codes of {bits} bits take {row_bytes(n, bits)} bytes a row, "
            f"got {packed.shape[-1]}"
        )
    if bits == 8:
        return packed
    if bits == 4:
        codes = torch.stack((packed & 15, packed >> 4), -1)
    else:
        a, b, c = packed.unflatten(-1, (-1, 3)).unbind(-1)
        codes = torch.stack(
            (a & 63, (a >> 6) | ((b & 15) << 2), (b >> 4) | ((c & 3) << 4), c >> 2), -1
        )
    return codes.flatten(-2)[..., :n]


@functools.cache
def scales_by_code(kind: str) -> Tensor:
    """[256] float32, rising: the scale that each byte stands for, NaN where it is none.

    kind: "e8m0", 2^(c - 127); "ue4m3", E4M3 without a sign; "ue5m3", bias 15, its last code NaN
    and all others numbers (up to 114688); "e6m2", HiF4's, bias 48 with a hidden one always.
    """
    check_choice("kind of scale", kind, SCALES)
    table = torch.full((256,), math.nan)
    if kind == "e8m0":
        exponents = torch.arange(255, dtype=torch.float64) - 127
        table[:255] = exponents.exp2().float()
    elif kind == "e6m2":
        code = torch.arange(255)
        table[:255] = ((code >> 2).double() - 48).exp2().float() * (1 + (code & 3) / 4)
    else:
        bias, count = (7, 127) if kind == "ue4m3" else (15, 255)
        code = torch.arange(count)
        exponent, mantissa = code >> 3, (code & 7).double() / 8
        table[:count] = (
            (exponent.clamp(min=1) - bias).double().exp2() * ((exponent > 0) + mantissa)
        ).float()
    return table


SCALES = ("e8m0", "ue4m3", "ue5m3", "e6m2")


def encode_scales(scales: Tensor, kind: str) -> Tensor:
    """The bytes of block scales that `kind` can say.

    Args:
        scales: any shape, float32. NaN becomes the last code (E4M3's: 127).
        kind: of SCALES.

    Returns:
        uint8, the shape of scales.

    Raises:
        ValueError: an unknown kind, or a scale that it cannot say.
    """
    table = scales_by_code(kind).to(scales.device)
    known = int((~table.isnan()).sum())
    code = torch.bucketize(scales.contiguous(), table[:known])
    found = (table[code.clamp(max=known - 1)] == scales) | scales.isnan()
    _check_found(found, scales, f"the scales {kind}")
    return torch.where(scales.isnan(), known, code).to(torch.uint8)


def decode_scales(codes: Tensor, kind: str) -> Tensor:
    """The float32 scales of bytes, from bits, so that it fuses: `scales_by_code` says the same.

    codes: uint8, any shape; kind: of SCALES.
    """
    check_choice("kind of scale", kind, SCALES)
    code = codes.to(torch.int32)
    if kind == "e8m0":
        bits = (code << 23).clamp(min=TINIEST_SCALE)
    elif kind == "e6m2":
        bits = (code + (79 << 2)) << 21
    else:  # the product moves the bias, of subnormal numbers too
        power = 2.0 ** (120 if kind == "ue4m3" else 112)
        bits = ((code << 20).view(torch.float32) * power).view(torch.int32)
    last = 127 if kind == "ue4m3" else 255
    return torch.where(code == last, NAN, bits).view(torch.float32)


def _check_bits(bits: int) -> None:
    if bits not in (4, 6, 8):
        raise ValueError(f"codes of 4, 6 or 8 bits can be packed, got {bits}")


def _check_found(found: Tensor, values: Tensor, what: str) -> None:
    if not bool(found.all()):
        stray = values[~found].flatten()[0].item()
        raise ValueError(f"{what} cannot say {stray}: quantise first, pack then")
