"""Number formats by name, and the two functions that put a tensor into one.

A format is a row of `FORMATS`; its `encode` is the definition, in torch ops. On the CPU a native
kernel gives the same bits faster.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.names import unknown
from layers.precision import native, ops
from layers.precision.blocks import E2M1, MX_RULES, Grid, encode_mx, encode_nvfp4, tensor_scale
from layers.precision.layout import Blocks, encode_blocks, encode_segments
from layers.precision.spec import QSpec

__all__ = [
    "FORMATS",
    "Format",
    "Quantized",
    "check_spec",
    "fake_quantize",
    "format_of",
    "quantize",
    "storage_bits",
]


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
    tensor_scale: bool = False  # a float32 scale per tensor stays out of the values
    encode: Callable[[Tensor, tuple[int, ...], Grid, str, Tensor | None], Tensor] | None = None
    native: bool = False  # kernels.cpp has it


# fmt: off
FORMATS: tuple[Format, ...] = (
    Format(
        name="fp32", bits=32, dtype=torch.float32,
        summary="IEEE single precision", paper="IEEE 754",
    ),
    Format(
        name="bf16", bits=16, dtype=torch.bfloat16,
        summary="float32 with 8 significant bits", paper="arXiv:1905.12322",
    ),
    Format(
        name="mxfp4", bits=4.25, grid=E2M1, block=32, scale_rules=tuple(MX_RULES),
        encode=encode_mx, native=True,
        summary="E2M1, a power of two per 32", paper="OCP Microscaling Formats v1.0",
    ),
    Format(
        name="nvfp4", bits=4.5, grid=E2M1, block=16, scale_rules=("max",), tiles=("1d", "2d"),
        tensor_scale=True, encode=encode_nvfp4, native=True,
        summary="E2M1, an E4M3 scale per 16, a float32 scale per tensor", paper="arXiv:2509.25149",
    ),
)
# fmt: on


class Quantized(NamedTuple):
    """A tensor on a coarse grid."""

    values: Tensor  # decoded, without the tensor scale
    scale: Tensor | None  # float32, [] or [E]: the tensor scale, to multiply a product by


def format_of(name: str) -> Format:
    """The row of that name. Raises ValueError with the nearest one."""
    for row in FORMATS:
        if row.name == name:
            return row
    raise unknown("format", name, [row.name for row in FORMATS])


def check_spec(spec: QSpec) -> None:
    """Raise ValueError, with the nearest name, unless the format, its rule and its tile exist."""
    _resolve(spec)


def storage_bits(spec: QSpec) -> float:
    """Bits per number in store, block scales included; a tensor's one scale does not count."""
    return format_of(spec.format).bits


def _resolve(spec: QSpec) -> tuple[Format, str]:
    """The row and the scale rule of a spec ("" where there is none); raises on what it lacks."""
    row = format_of(spec.format)
    rule = spec.scale_rule
    if rule is not None and rule not in row.scale_rules:
        raise unknown(f"scale rule of {row.name}", rule, row.scale_rules)
    if spec.tile not in row.tiles:
        raise unknown(f"tile of {row.name}", spec.tile, row.tiles)
    return row, rule or (row.scale_rules[0] if row.scale_rules else "")


def quantize(
    x: Tensor,
    spec: QSpec | str,
    *,
    axis: int,
    dtype: torch.dtype,
    ends: Tensor | None = None,
) -> Quantized:
    """Put one operand of a matmul into a format. No gradient flows through.

    Args:
        x: [R, C], or [E, R, C] where each leading index is a segment. Read as float32.
        spec: the format and its options.
        axis: -1 or -2, the axis that the matmul sums over: blocks lie along it.
        dtype: of the values; every format's values are exact in bfloat16.
        ends: [E] integers, inclusive cumulative row counts of the segments of a 2-D x. No block
            and no tensor scale spans two; empty ones are fine. Rows past the last end are a
            segment of their own, whose scale is not returned.

    Returns:
        The decoded values in the shape of x without the tensor scale, and the scale: [] float32,
        [E] with segments, None for a format that has none. A high format only casts.

    Raises:
        ValueError: unknown format, rule or tile; a shape, axis or type that does not fit.
    """
    spec = QSpec.of(spec)
    row, rule = _resolve(spec)
    _check_float(x)
    if axis not in (-1, -2):
        raise ValueError(f"axis must be -1 or -2, got {axis}")
    if x.dim() != 2 and (x.dim() != 3 or ends is not None):
        raise ValueError(f"x must be [R, C] or, without ends, [E, R, C], got {list(x.shape)}")
    x = x.detach()
    if row.dtype is not None:
        return Quantized(x.to(row.dtype).to(dtype), None)
    values, scale = _encode(x, row, rule, _blocks(row, spec.tile, axis), dtype, ends)
    if scale is not None and x.dim() == 2 and ends is None:
        scale = scale.squeeze(0)
    return Quantized(values, scale)


def fake_quantize(
    x: Tensor,
    format: QSpec | str,
    *,
    scale_rule: str | None = None,
    tile: str | None = None,
) -> Tensor:
    """What a format makes of x: decoded values, tensor scale included, blocks along the last axis.

    Args:
        x: any shape and floating type, computed in float32. One tensor scale for all of it.
        format: a name of `FORMATS`, or a spec.
        scale_rule: how a block's scale is chosen; None: the spec's, else the format's first.
        tile: "2d": square tiles of the last two axes share a scale; None: the spec's.

    Returns:
        The shape and type of x. A short last block sees zeros behind it. The gradient goes
        straight through, clipped values included.

    Raises:
        ValueError: unknown format, rule or tile; a tile on fewer than two axes.
    """
    spec = QSpec.of(format)
    row, rule = _resolve(
        QSpec(
            format=spec.format,
            scale_rule=scale_rule or spec.scale_rule,
            tile=tile or spec.tile,  # pyright: ignore[reportArgumentType]
        )
    )
    tile = tile or spec.tile
    _check_float(x)
    if tile == "2d" and x.dim() < 2:
        raise ValueError(f"tile 2d needs at least two axes, got {list(x.shape)}")
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, row, rule, tile)
    return _fake(x, row, rule, tile)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, row: Format, rule: str, tile: str) -> Tensor:
        return _fake(x, row, rule, tile)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], None, None, None


def _fake(x: Tensor, row: Format, rule: str, tile: str) -> Tensor:
    if row.dtype is not None:
        return x.to(row.dtype).to(x.dtype)
    if x.numel() == 0:
        return x.clone()
    matrices = x.reshape(-1, *x.shape[-2:]) if tile == "2d" else x.reshape(1, -1, _last(x))
    n_rows = matrices.shape[1]
    if (pad := -n_rows % row.block) and len(matrices) > 1:  # no tile crosses a matrix
        matrices = F.pad(matrices, (0, 0, 0, pad))
    blocks = _blocks(row, tile, -1)
    values, _ = _encode(matrices.flatten(0, 1), row, rule, blocks, x.dtype, None, fold=True)
    return values.view(matrices.shape)[:, :n_rows].reshape(x.shape)


def _last(x: Tensor) -> int:
    return x.shape[-1] if x.dim() else 1


def _blocks(row: Format, tile: str, axis: int) -> Blocks:
    if tile == "2d":
        return Blocks(row.block, row.block)
    return Blocks(1, row.block) if axis == -1 else Blocks(row.block, 1)


def _check_float(x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point, got {x.dtype}")


def _encode(
    x: Tensor, row: Format, rule: str, blocks: Blocks, dtype: torch.dtype, ends: Tensor | None,
    fold: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """x: [R, C] or [E, R, C]. Returns values and scales [E]; fold: the values times the scale."""
    if row.native and x.device.type == "cpu" and native.wanted():
        grid = row.grid
        assert grid is not None
        x = x if x.dtype in native.DTYPES else x.float()
        inner = dtype if dtype in native.DTYPES else torch.float32
        values, scale = ops.quantize(x, grid.name, rule, *blocks, inner, ends, fold)
        return values.to(dtype), scale if row.tensor_scale else None
    values, peaks = _define(x.float(), row, rule, blocks, ends)
    if peaks is None:
        return values.to(dtype), None
    assert row.grid is not None
    scale = tensor_scale(peaks, row.grid)
    return (values * scale if fold else values).to(dtype), scale


def _define(
    x: Tensor, row: Format, rule: str, blocks: Blocks, ends: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The definition in torch ops. Returns values and the largest magnitudes [E], or None."""
    if x.numel() == 0:
        n = x.shape[0] if x.dim() == 3 else 1 if ends is None else ends.shape[0]
        return x.clone(), x.new_zeros(n) if row.tensor_scale else None

    def encode(view: Tensor, dims: tuple[int, ...], peak: Tensor | None) -> Tensor:
        assert row.encode is not None
        assert row.grid is not None
        return row.encode(view, dims, row.grid, rule, peak)

    if ends is not None:
        return encode_segments(x, blocks, encode, ends.to(torch.int64), row.tensor_scale)
    segments = x if x.dim() == 3 else x[None]
    peaks = segments.abs().amax((-2, -1)) if row.tensor_scale else None
    per_segment = None if peaks is None else peaks[:, None]
    return encode_blocks(segments, blocks, encode, per_segment).reshape(x.shape), peaks
