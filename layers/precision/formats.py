"""Number formats by name: a format is a row of `FORMATS`; its `encode` is the definition."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.names import check_choice, unknown
from layers.precision.encoding import Encoded, Upper
from layers.precision.grids import E2M1, E2M3, E3M2, E4M3, E5M2, Grid
from layers.precision.mx import MX_RULES, encode_mx
from layers.precision.nvfp4 import encode_nvfp4, upper_nvfp4
from layers.precision.scaled import SCALED_RULES, encode_scaled, upper_scaled
from layers.precision.spec import QSpec

Encoder = Callable[
    [Tensor, tuple[int, ...], Grid, str, Tensor | None, Tensor | None], Encoded
]  # blocks, axes inside a block, grid, rule, upper scale, noise


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row: what a number format is and how tensors get there."""

    name: str
    bits: float  # storage per number, block scales included
    summary: str
    paper: str
    dtype: torch.dtype | None = None  # a format that is only a cast
    grid: Grid | None = None  # of the elements
    block: int = 1  # numbers that share a scale, along the contracted axis
    scale_rules: tuple[str, ...] = ()  # the first is the default
    tiles: tuple[str, ...] = ("1d",)  # 2d: block x block numbers share a scale
    scopes: tuple[str, ...] = ()  # what one float32 scale spans; the first is the default
    roundings: tuple[str, ...] = ("nearest", "stochastic")
    exact_in_bf16: bool = True  # the decoded values, without a scale that spans more than a block
    encode: Encoder | None = None
    upper: Callable[[Tensor, Grid, str], Upper] | None = None  # from the largest magnitude
    native: bool = False  # kernels.cpp has it


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
)
# fmt: on


def format_of(name: str) -> Format:
    """The row of that name. Raises ValueError with the nearest one."""
    for row in FORMATS:
        if row.name == name:
            return row
    raise unknown("format", name, [row.name for row in FORMATS])


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A spec with its row, and every option that it left open settled."""

    spec: QSpec
    row: Format
    rule: str  # "" where the row has none
    scope: str  # "" where the row has none

    @property
    def exact_in_bf16(self) -> bool:
        """Whether bfloat16 holds the values that `quantize` returns."""
        own_scale = self.scope == "block" and self.rule != "p2"
        return self.row.exact_in_bf16 and not own_scale

    @property
    def given_scale(self) -> bool:
        """Whether the float32 scale comes from the leaf instead of from the tensor."""
        return self.scope in ("static", "delayed")


def resolve(spec: QSpec) -> Resolved:
    """A spec with its row. Raises ValueError on what the format lacks, with the nearest name."""
    row = format_of(spec.format)
    if spec.scale_rule is not None:
        check_choice(f"scale rule of {row.name}", spec.scale_rule, row.scale_rules)
    check_choice(f"tile of {row.name}", spec.tile, row.tiles)
    check_choice(f"rounding of {row.name}", spec.rounding, row.roundings)
    if spec.scope is not None:
        check_choice(f"scope of {row.name}", spec.scope, row.scopes)
    rule = spec.scale_rule or (row.scale_rules[0] if row.scale_rules else "")
    scope = spec.scope or (row.scopes[0] if row.scopes else "")
    if scope == "row" and spec.tile == "2d":
        raise ValueError(f"{row.name}: a scale by row cannot span the rows of a tile: say tile 1d")
    return Resolved(spec=spec, row=row, rule=rule, scope=scope)


def check_spec(spec: QSpec) -> None:
    """Raise ValueError, with the nearest name, unless the format and all its options exist."""
    resolve(spec)


def storage_bits(spec: QSpec) -> float:
    """Bits per number in store, block scales included; a tensor's one scale does not count."""
    return format_of(spec.format).bits
