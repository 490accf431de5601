"""Every number format of this package, a row each; `encode` or `cast` is its definition."""

import torch

from layers.precision.grids import E1M2, E2M1, E2M3, E3M2, E4M3, E5M2
from layers.precision.hif4 import TOP, UNIT, encode_hif4
from layers.precision.mx import MX_RULES, encode_mx
from layers.precision.nvfp4 import encode_nvfp4, upper_nvfp4
from layers.precision.row import Format
from layers.precision.scaled import SCALED_RULES, encode_scaled, upper_scaled

FLOAT_SCOPES = ("tensor", "row", "block", "static", "delayed")

# fmt: off
FORMATS: tuple[Format, ...] = (
    Format(
        name="fp32", bits=32, dtype=torch.float32, roundings=("nearest",), exact_in_bf16=False,
        summary="IEEE single precision", paper="IEEE 754",
    ),
    Format(
        name="bf16", bits=16, dtype=torch.bfloat16, roundings=("nearest",),
        summary="float32 with 8 significant bits", paper="arXiv:1905.12322",
    ),
    Format(
        name="fp8_e4m3", bits=8, grid=E4M3, block=128, scale_rules=SCALED_RULES,
        tiles=("1d", "2d"), scopes=FLOAT_SCOPES, encode=encode_scaled, upper=upper_scaled,
        summary="E4M3 under float32 scales", paper="arXiv:2209.05433",
    ),
    Format(
        name="fp8_e5m2", bits=8, grid=E5M2, block=128, scale_rules=SCALED_RULES,
        tiles=("1d", "2d"), scopes=FLOAT_SCOPES, encode=encode_scaled, upper=upper_scaled,
        summary="E5M2 under float32 scales", paper="arXiv:2209.05433",
    ),
    Format(
        name="mxfp8_e4m3", bits=8.25, grid=E4M3, block=32, scale_rules=tuple(MX_RULES),
        encode=encode_mx, native=True,
        summary="E4M3, a power of two per 32", paper="OCP Microscaling Formats v1.0",
    ),
    Format(
        name="mxfp8_e5m2", bits=8.25, grid=E5M2, block=32, scale_rules=tuple(MX_RULES),
        encode=encode_mx, native=True,
        summary="E5M2, a power of two per 32", paper="OCP Microscaling Formats v1.0",
    ),
    Format(
        name="mxfp6_e2m3", bits=6.25, grid=E2M3, block=32, scale_rules=tuple(MX_RULES),
        encode=encode_mx, native=True,
        summary="E2M3, a power of two per 32", paper="OCP Microscaling Formats v1.0",
    ),
    Format(
        name="mxfp6_e3m2", bits=6.25, grid=E3M2, block=32, scale_rules=tuple(MX_RULES),
        encode=encode_mx, native=True,
        summary="E3M2, a power of two per 32", paper="OCP Microscaling Formats v1.0",
    ),
    Format(
        name="mxfp4", bits=4.25, grid=E2M1, block=32, scale_rules=tuple(MX_RULES),
        encode=encode_mx, native=True,
        summary="E2M1, a power of two per 32", paper="OCP Microscaling Formats v1.0",
    ),
    Format(
        name="nvfp4", bits=4.5, grid=E2M1, block=16, scale_rules=("max",), tiles=("1d", "2d"),
        scopes=("tensor", "row", "static", "delayed"), encode=encode_nvfp4, upper=upper_nvfp4,
        native=True,
        summary="E2M1, an E4M3 scale per 16, a float32 scale per tensor", paper="arXiv:2509.25149",
    ),
    Format(
        name="hif4", bits=4.5, grid=E1M2, block=UNIT, largest_element=TOP, encode=encode_hif4,
        summary="quarters under E6M2 per 64, a doubling per 8 and per 4", paper="arXiv:2602.11287",
    ),
)
# fmt: on
