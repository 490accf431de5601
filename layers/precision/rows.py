"""Every number format of this package, a row each; `encode` or `cast` is its definition."""

import torch

from layers.precision.eden import eden_nvfp4
from layers.precision.grids import E1M2, E1M6, E2M1, E2M3, E3M0, E3M2, E4M3, E5M2, Grid
from layers.precision.hif4 import TOP, UNIT, encode_hif4
from layers.precision.hifloat8 import cast_hifloat8
from layers.precision.if4 import IF4_RULES, encode_if4, upper_if4
from layers.precision.mx import MX_RULES, MXFP4_RULES, encode_mx
from layers.precision.nvfp4 import (
    NVFP4_RULES,
    UE5M3_RULES,
    encode_nvfp4,
    encode_ue5m3,
    upper_nvfp4,
    upper_ue5m3,
)
from layers.precision.row import Format
from layers.precision.scaled import SCALED_RULES, encode_scaled, upper_scaled
from layers.precision.simulated import SIMULATED_RULES, simulated

MX_PAPER = "OCP Microscaling Formats v1.0"
TILES = ("1d", "2d")
FLOAT_SCOPES = ("tensor", "row", "block", "static", "delayed")
TWO_LEVEL_SCOPES = ("tensor", "row", "none", "static", "delayed")  # none: block scales alone


# fmt: off
def _scaled(name: str, grid: Grid, paper: str, summary: str, block: int = 128) -> Format:
    bits = 1 + grid.exponent_bits + grid.mantissa_bits
    return Format(
        name=name, bits=bits, grid=grid, block=block, scale_rules=SCALED_RULES, tiles=TILES,
        scopes=FLOAT_SCOPES, encode=encode_scaled, upper=upper_scaled, summary=summary, paper=paper,
    )


def _mx(name: str, grid: Grid) -> Format:
    bits = 1 + grid.exponent_bits + grid.mantissa_bits
    return Format(
        name=name, bits=bits + 8 / 32, grid=grid, block=32, scale_rules=tuple(MX_RULES),
        encode=encode_mx,
        summary=f"{grid.name.upper()}, a power of two per 32", paper=MX_PAPER,
    )


def _simulated(mantissa_bits: int) -> Format:
    return Format(
        name=f"e8m{mantissa_bits}", bits=9 + mantissa_bits, cast=simulated(mantissa_bits),
        scale_rules=SIMULATED_RULES,
        summary=f"bfloat16 with {mantissa_bits} mantissa bits, simulated", paper="arXiv:2405.18710",
    )


FORMATS: tuple[Format, ...] = (
    Format(
        name="fp32", bits=32, dtype=torch.float32, roundings=("nearest",), exact_in_bf16=False,
        summary="IEEE single precision", paper="IEEE 754",
    ),
    Format(
        name="bf16", bits=16, dtype=torch.bfloat16, roundings=("nearest",),
        summary="float32 with 8 significant bits", paper="arXiv:1905.12322",
    ),
    *map(_simulated, range(7, 2, -1)),
    Format(
        name="hifloat8", bits=8, cast=cast_hifloat8,
        summary="8 bits, 3 to 0 of them mantissa as the exponent grows", paper="arXiv:2409.16626",
    ),
    _scaled("fp8_e4m3", E4M3, "arXiv:2209.05433", "E4M3 under float32 scales"),
    _scaled("fp8_e5m2", E5M2, "arXiv:2209.05433", "E5M2 under float32 scales"),
    _scaled("fp4_e3m0", E3M0, "arXiv:2310.16836", "powers of two under float32 scales"),
    _scaled("fp4_e2m1", E2M1, "arXiv:2310.16836", "E2M1 under float32 scales"),
    _scaled("fp4_e1m2", E1M2, "arXiv:2310.16836", "E1M2 under float32 scales"),
    Format(
        name="int4", bits=4, grid=E1M2, block=16, scale_rules=SCALED_RULES, tiles=TILES,
        scopes=("block", "tensor", "row", "static", "delayed"), encode=encode_scaled,
        upper=upper_scaled,
        summary="-7..7 (as E1M2, k / 4), a float32 scale per 16", paper="arXiv:2103.13630",
    ),
    _mx("mxint8", E1M6),  # -127/64..127/64, without the one code below
    _mx("mxfp8_e4m3", E4M3),
    _mx("mxfp8_e5m2", E5M2),
    _mx("mxfp6_e2m3", E2M3),
    _mx("mxfp6_e3m2", E3M2),
    Format(
        name="mxfp4", bits=4.25, grid=E2M1, block=32, scale_rules=MXFP4_RULES,
        inexact_rules=("three_quarters",), encode=encode_mx,
        summary="E2M1, a power of two per 32", paper=MX_PAPER,
    ),
    _mx("mxint4", E1M2),
    Format(
        name="nvfp4", bits=4.5, grid=E2M1, block=16, scale_rules=tuple(NVFP4_RULES), tiles=TILES,
        scopes=TWO_LEVEL_SCOPES, roundings=("nearest", "stochastic", "eden"), encode=encode_nvfp4,
        eden=eden_nvfp4, upper=upper_nvfp4,
        summary="E2M1, an E4M3 scale per 16, a float32 scale per tensor", paper="arXiv:2509.25149",
    ),
    Format(
        name="nvfp4_ue5m3", bits=4.5, grid=E2M1, block=16, scale_rules=tuple(UE5M3_RULES),
        tiles=TILES, scopes=TWO_LEVEL_SCOPES, encode=encode_ue5m3, upper=upper_ue5m3,
        summary="NVFP4 with scales of wider range, UE5M3", paper="arXiv:2509.17791",
    ),
    Format(
        name="nvint4", bits=4.5, grid=E1M2, block=16, scale_rules=("max", "unbiased"), tiles=TILES,
        scopes=TWO_LEVEL_SCOPES, encode=encode_nvfp4, upper=upper_nvfp4,
        summary="NVFP4's scales over -7..7 (as E1M2)", paper="arXiv:2512.02010",
    ),
    Format(
        name="if4", bits=4.5, grid=E2M1, block=16, scale_rules=IF4_RULES, tiles=TILES,
        scopes=TWO_LEVEL_SCOPES, exact_in_bf16=False, encode=encode_if4, upper=upper_if4,
        summary="NVFP4's scales, E2M1 or integers block by block", paper="arXiv:2512.02010",
    ),
    Format(
        name="hif4", bits=4.5, grid=E1M2, block=UNIT, largest_element=TOP, encode=encode_hif4,
        summary="quarters under E6M2 per 64, a doubling per 8 and per 4", paper="arXiv:2602.11287",
    ),
)
# fmt: on
