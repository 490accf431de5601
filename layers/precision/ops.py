"""The native kernels as torch operators, so that compiled graphs, modes and fakes see them.

They take CPU tensors only; every other device runs the definitions in torch ops.
"""

import torch
from torch import Tensor

from layers.precision import native
from layers.precision.formats import Resolved

_library = torch.library.Library("moe_zoo", "DEF")
_library.define(
    "quantize(Tensor x, str rule, int[] integers, float[] floats, int[] block, int axis, "
    "str scope, ScalarType dtype, Tensor? ends, Tensor? key, str rounding, int operand, "
    "int hadamard, str signs, Tensor? scale, bool fold) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_GIVEN = ("static", "delayed")
_WITHOUT = ("", "block", "none")


def _level(scope: str, axis: int) -> str:
    if scope in _WITHOUT:
        return "none"
    if scope == "row":
        return "row" if axis == -1 else "column"
    return "segment"


def _shapes(
    x: Tensor, axis: int, level: str, ends: Tensor | None, hadamard: int, scale: Tensor | None
) -> tuple[list[int], list[int], list[int]]:
    """Of the values, their scales above the blocks, and the moved ends; [0] for what is not."""
    shape, moved = list(x.shape), [0]
    if hadamard and axis == -2 and ends is not None:
        shape[0] = (x.shape[0] // hadamard + ends.shape[0]) * hadamard
        moved = [ends.shape[0]]
    elif hadamard:
        shape[axis] = (x.shape[axis] + hadamard - 1) // hadamard * hadamard
    n = x.shape[0] if x.dim() == 3 else 1 if ends is None else ends.shape[0]
    if level == "none":
        found = [0]
    elif level == "segment":
        found = [scale.numel() if scale is not None and ends is None else n]
    elif level == "row":
        found = [*shape[:-1], 1] if x.dim() == 3 or ends is not None else [1, shape[0], 1]
    else:
        found = [n, 1, shape[-1]]
    return shape, found, moved


def _quantize(
    x: Tensor, rule: str, integers: list[int], floats: list[float], block: list[int], axis: int,
    scope: str, dtype: torch.dtype, ends: Tensor | None, key: Tensor | None, rounding: str,
    operand: int, hadamard: int, signs: str, scale: Tensor | None, fold: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x: [R, C], or [E, R, C] where each leading index is a segment.

    Returns values, scales above the blocks and moved ends; the last two empty where there are none.
    """
    level = _level(scope, axis)
    given = scale if scope in _GIVEN else None
    shape, found, moved = _shapes(x, axis, level, ends, hadamard, given)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    new_ends = torch.zeros(moved, dtype=torch.int64, device=x.device)
    ends = _ends(x, ends)
    n = ends.shape[0]
    if given is None:
        scales = torch.zeros(found, device=x.device)
    else:
        given = given.float().reshape(-1).expand(n).contiguous()
        scales = torch.empty(n, device=x.device)
    native.run(
        _rows(x), _rows(out), native.Numbers(rule, tuple(integers), tuple(floats)),
        block=(block[0], block[1]), axis=axis, level=level, ends=ends, scale=scales,
        given=given, moved=new_ends if moved[0] else None, key=key, rounding=rounding,
        operand=operand, hadamard=hadamard, signs=signs, fold=fold,
    )  # fmt: skip
    return out, scales if given is None else scales[: found[0]].clone(), new_ends


def _ends(x: Tensor, ends: Tensor | None) -> Tensor:
    if x.dim() == 3:
        return torch.arange(1, x.shape[0] + 1, device=x.device) * x.shape[1]
    if ends is None:
        return torch.tensor([x.shape[0]], device=x.device)
    return ends.to(torch.int64).contiguous()


def _rows(x: Tensor) -> Tensor:
    """[R, C] of [E, R, C], the numbers of a row side by side."""
    if x.dim() == 3:
        x = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
    return x if x.stride(1) == 1 else x.contiguous()


def _fake(
    x, rule, integers, floats, block, axis, scope, dtype, ends, key, rounding, operand, hadamard,
    signs, scale, fold,
):  # fmt: skip
    given = scale if scope in _GIVEN else None
    shape, found, moved = _shapes(x, axis, _level(scope, axis), ends, hadamard, given)
    return (
        x.new_empty(shape, dtype=dtype),
        x.new_empty(found, dtype=torch.float32),
        x.new_empty(moved, dtype=torch.int64),
    )


_library.impl("quantize", _quantize, "CPU")
torch.library.register_fake("moe_zoo::quantize", _fake, lib=_library)


def quantize(
    x: Tensor, r: Resolved, block: tuple[int, int], axis: int, dtype: torch.dtype,
    ends: Tensor | None, key: Tensor | None, operand: int, scale: Tensor | None, fold: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Values, the scale above the blocks, moved ends: what `native.has` says kernels.cpp has.

    The arguments are those of `layers.precision.quantize.quantize`, blocks and folding as there.
    """
    numbers = native.numbers_of(r.row, r.rule, r.spec.rounding)
    assert numbers is not None
    x = x if x.dtype in native.DTYPES else x.float()
    inner = dtype if dtype in native.DTYPES else torch.float32
    values, found, moved = torch.ops.moe_zoo.quantize.default(
        x, numbers.rule, list(numbers.integers), list(numbers.floats), list(block), axis, r.scope,
        inner, ends,
        key if r.spec.is_random else None, r.spec.rounding, operand, r.spec.hadamard, r.spec.signs,
        scale if r.given_scale else None, fold,
    )  # fmt: skip
    has_moved = r.spec.hadamard > 0 and axis == -2 and ends is not None
    return (
        values.to(dtype),
        None if r.scope in _WITHOUT else found,
        moved if has_moved else None,
    )


def rotate(x: Tensor, d: int, signs: str, axis: int, ends: Tensor | None, key: Tensor | None,
           gemm: int) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The rotation alone, float32, and moved ends: for what kernels.cpp does not have beside it."""
    x, numbers = x if x.dtype in native.DTYPES else x.float(), native.Numbers()
    values, _, moved = torch.ops.moe_zoo.quantize.default(
        x, numbers.rule, list(numbers.integers), list(numbers.floats), [1, 1], axis, "",
        torch.float32, ends,
        key if signs == "step" else None, "nearest", 2 * gemm, d, signs, None, False,
    )  # fmt: skip
    return values, moved if axis == -2 and ends is not None else None
