"""The two functions that put a tensor into a format: an operand of a matmul, or any tensor.

On the CPU a native kernel gives the bits of the definition faster.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.precision import native, ops
from layers.precision.define import blocks_of, define, define_parts
from layers.precision.formats import Resolved, resolve
from layers.precision.hadamard import rotate, signs_of, spread_rows
from layers.precision.random import uniform
from layers.precision.simulated import simulated
from layers.precision.spec import QSpec

__all__ = ["Quantized", "fake_quantize", "quantize"]


class Quantized(NamedTuple):
    """A tensor on a coarse grid."""

    values: Tensor  # decoded, without the float32 scale that spans more than a block
    scale: (
        Tensor | None
    )  # that scale, float32: [] or [E] of tensor or segment; else by row, see below
    ends: Tensor | None = None  # [E] of the values, where rotation added rows to segments


def quantize(
    x: Tensor,
    spec: QSpec | str,
    *,
    axis: int,
    dtype: torch.dtype,
    ends: Tensor | None = None,
    key: Tensor | None = None,
    operand: int = 0,
    scale: Tensor | None = None,
) -> Quantized:
    """Put one operand of a matmul into a format. No gradient flows through.

    Args:
        x: [R, C], or [E, R, C] where each leading index is a segment. Read as float32.
        spec: the format and its options.
        axis: -1 or -2, the axis that the matmul sums over: blocks lie along it.
        dtype: of the values; most formats' values are exact in bfloat16.
        ends: [E] integers, inclusive cumulative row counts of the segments of a 2-D x. No block
            and no scale spans two; empty ones are fine. Rows past the last end are a segment of
            their own, whose scale is not returned.
        key: [] int64, of the random stream; only read where the spec is random.
        operand: 0 to 5, as in `OPERANDS`: which stream of that key; signs go by operand // 2.
        scale: [] or [E] float32, the decoding scale; read where the scope is static or delayed.

    Returns:
        The decoded values without the scale of scopes tensor, row, static and delayed, and that
        scale to multiply a product by: [] float32, [E] with segments; by row it has the shape of
        the values with length 1 along `axis` (axis -2 with ends: [E, 1, C]); None for a format
        that has none. A high format only casts. With `hadamard`, the values of the rotated x:
        `axis` is rounded up to whole tiles, each segment's rows where ends are given, and
        `Quantized.ends` then says where segments lie now.

    Raises:
        ValueError: unknown format or option; a shape, axis or type that does not fit; no key or
            scale where one is needed.
    """
    spec = QSpec.of(spec)
    r = resolve(spec)
    _check(x, r, axis, ends, key, scale)
    x = x.detach()
    if r.row.dtype is not None:
        return Quantized(_cast(x, r.row.dtype, dtype), None)
    values, upper, moved = _encode(x, r, axis, dtype, ends, key, operand, scale)
    if upper is not None and x.dim() == 2 and ends is None:
        upper = upper.squeeze(0)
    return Quantized(values, upper, moved)


def fake_quantize(x: Tensor, format: QSpec | str, **options) -> Tensor:
    """What a format makes of x: decoded values, all scales included, blocks along the last axis.

    Args:
        x: any shape and floating type, computed in float32. One tensor scale for all of it; tiles
            ("2d") lie on the last two axes.
        format: a name of `FORMATS`, or a spec.
        options: fields of `QSpec` to set: scale_rule, tile, scope; and `key`, [] int64, for a
            rounding that is random.

    Returns:
        The shape and type of x. A short last block sees zeros behind it. The gradient goes
        straight through, clipped values included.

    Raises:
        ValueError: unknown format or option; a tile on fewer than two axes; a rotation, which
            needs a second operand to cancel.
    """
    key = options.pop("key", None)
    said = {name: value for name, value in options.items() if value is not None}
    r = resolve(QSpec.of(format).but(**said))
    _check_float(x)
    if r.spec.tile == "2d" and x.dim() < 2:
        raise ValueError(f"tile 2d needs at least two axes, got {list(x.shape)}")
    if r.spec.hadamard or r.given_scale:
        what = "hadamard" if r.spec.hadamard else f"scope {r.scope}"
        raise ValueError(f"fake_quantize takes no {what}: it belongs to an operand of a matmul")
    _check_key(r.spec, key)
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, r, key)
    return _fake(x, r, key)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, r: Resolved, key: Tensor | None) -> Tensor:
        return _fake(x, r, key)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], None, None


def _fake(x: Tensor, r: Resolved, key: Tensor | None) -> Tensor:
    if r.row.dtype is not None:
        return _cast(x, r.row.dtype, x.dtype)
    if x.numel() == 0:
        return x.clone()
    tiled = r.spec.tile == "2d"
    matrices = x.reshape(-1, *x.shape[-2:]) if tiled else x.reshape(1, -1, _last(x))
    n_rows = matrices.shape[1]
    if (pad := -n_rows % r.row.block) and len(matrices) > 1:  # no tile crosses a matrix
        matrices = F.pad(matrices, (0, 0, 0, pad))
    rows = matrices.flatten(0, 1)
    values = _encode(rows, r, -1, x.dtype, None, key, 0, None, fold=True)[0]
    return values.view(matrices.shape)[:, :n_rows].reshape(x.shape)


_round_to_bf16 = simulated(7)


def _cast(x: Tensor, to: torch.dtype, dtype: torch.dtype) -> Tensor:
    """x rounded to one type and held in another."""
    if to is torch.bfloat16 and dtype is not torch.bfloat16:
        # by its bits, for inductor drops a cast to bfloat16 and back
        return _round_to_bf16(x.float(), "nearest", None).to(dtype)
    return x.to(to).to(dtype)


def _last(x: Tensor) -> int:
    return x.shape[-1] if x.dim() else 1


def _check_float(x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point, got {x.dtype}")


def _check_key(spec: QSpec, key: Tensor | None) -> None:
    if spec.is_random and key is None:
        what = "signs by step" if spec.rounding == "nearest" else f"rounding {spec.rounding}"
        raise ValueError(
            f"{what} needs a key: a [] int64 tensor, from zoo.seed_rounding on a model"
        )


def _check(
    x: Tensor, r: Resolved, axis: int, ends: Tensor | None, key: Tensor | None,
    scale: Tensor | None,
) -> None:  # fmt: skip
    _check_float(x)
    if axis not in (-1, -2):
        raise ValueError(f"axis must be -1 or -2, got {axis}")
    if x.dim() != 2 and (x.dim() != 3 or ends is not None):
        raise ValueError(f"x must be [R, C] or, without ends, [E, R, C], got {list(x.shape)}")
    _check_key(r.spec, key)
    if r.given_scale and scale is None:
        raise ValueError(f"scope {r.scope} needs a scale, which the leaf holds in operand_scales")


def _takes_kernels(x: Tensor) -> bool:
    return x.device.type == "cpu" and native.wanted()


def rotated(
    x: Tensor, spec: QSpec, axis: int, ends: Tensor | None, key: Tensor | None, gemm: int
) -> tuple[Tensor, Tensor | None]:
    """The rotated x in float32, and where its segments end now, if rows were added to them."""
    d, moved = spec.hadamard, None
    if d <= native.WIDEST and _takes_kernels(x):
        return ops.rotate(x, d, spec.signs, axis, ends, key, gemm)
    signs = signs_of(d, spec.signs, key, gemm, x.device)
    x = x.float()
    if axis == -2 and ends is not None:
        x, moved = spread_rows(x, ends.to(torch.int64), d)
    return rotate(x, d, signs, axis), moved


def _encode(
    x: Tensor, r: Resolved, axis: int, dtype: torch.dtype, ends: Tensor | None,
    key: Tensor | None, operand: int, scale: Tensor | None, fold: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """x: [R, C] or [E, R, C]. Returns values, their scale, and ends where a rotation moved them.

    fold: the values times the scale.
    """
    blocks, moved = blocks_of(r, axis), None
    if native.has(r) and _takes_kernels(x):
        return ops.quantize(x, r, blocks, axis, dtype, ends, key, operand, scale, fold)
    if r.spec.hadamard:
        x, moved = rotated(x, r.spec, axis, ends, key, operand // 2)
        ends = ends if moved is None else moved
    x = x.float()
    noise = None
    if r.spec.rounding != "nearest":
        assert key is not None
        noise = uniform(key, operand, x.shape)
    values, found = define(x, r, blocks, axis, ends, noise, scale)
    if fold and found is not None:
        values = values * found
    return values.to(dtype), found, moved


def unclipped(
    x: Tensor, spec: QSpec, *, axis: int, ends: Tensor | None, key: Tensor | None, operand: int,
    scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """Which of the (rotated) values `quantize` did not clip: bool, in the shape of its values."""
    r = resolve(spec)
    x, moved = x.detach().float(), None
    if spec.hadamard:
        x, moved = rotated(x, spec, axis, ends, key, operand // 2)
    ends = ends if moved is None else moved
    out, upper = define_parts(x, r, blocks_of(r, axis), axis, ends, None, scale)
    decoded = out.elements if out.scale is None else out.elements * out.scale
    at_top = out.elements.abs() >= r.row.top
    if upper is not None:
        raise ValueError(f"straight_through 'unclipped' takes no scale above blocks: {r.row.name}")
    return ~(at_top & (x.abs() > decoded.abs()))
