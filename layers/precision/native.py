"""The compiled quantisers of kernels.cpp, called through ctypes (see layers/native.py)."""

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layers.native import Source
from layers.precision.eden import eden_nvfp4
from layers.precision.formats import Format, Resolved
from layers.precision.grids import E4M3
from layers.precision.hadamard import signs_of
from layers.precision.hif4 import encode_hif4
from layers.precision.mx import encode_mx
from layers.precision.nvfp4 import (
    NVFP4_RULES,
    UE5M3_RULES,
    ScaleRule,
    encode_nvfp4,
    encode_ue5m3,
)
from layers.precision.scaled import encode_scaled

# no fused multiply-add: the bits must be those of the torch ops
KERNELS = Source(Path(__file__).with_name("kernels.cpp"), ("-ffp-contract=off",))
# enum Rule of scales.hpp
RULES = ("mx_floor", "mx_rceil", "mx_ceil", "mx_even", "mx_quest", "mx_three_quarters", "two_level",
         "two_level_mse", "two_level_mae", "two_level_abs_max", "two_level_eden", "scaled_max",
         "scaled_p2", "hif4", "rotate")  # fmt: skip
_TWO_LEVEL: dict[Any, dict[str, ScaleRule]] = {encode_nvfp4: NVFP4_RULES, encode_ue5m3: UE5M3_RULES}
_FAMILIES: dict[Any, str] = {encode_mx: "mx", encode_scaled: "scaled", encode_hif4: "hif4"}
LEVELS = {"none": 0, "segment": 1, "row": 2, "column": 3}  # enum Level
ROUNDINGS = ("nearest", "stochastic", "eden")
DTYPES = (torch.float32, torch.bfloat16)  # what kernels.cpp reads and writes
WIDEST = 256  # tile of a rotation
VALUES_PER_THREAD = 1 << 15  # below this another thread costs more than it brings


class Job(ctypes.Structure):
    """One call: struct MoeZooJob of scales.hpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out", "ends", "moved", "scale", "given")),
        *((name, ctypes.c_void_p) for name in ("signs", "key", "signs_key")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "stride", "segments")),
        *((name, ctypes.c_int64) for name in ("out_rows", "out_cols")),
        *((name, ctypes.c_int32) for name in ("block_rows", "block_cols", "axis", "rule", "level")),
        *((name, ctypes.c_int32) for name in ("hadamard", "operand")),
        *((name, ctypes.c_int32) for name in ("mantissa_bits", "min_exponent", "max_exponent")),
        *((name, ctypes.c_int32) for name in ("scale_mantissa_bits", "scale_min_exponent")),
        *((name, ctypes.c_float) for name in ("largest", "scale_largest", "gain", "top")),
        ("rotation", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("x_bf16", "out_bf16", "fold", "threads")),
    )


class Numbers(NamedTuple):
    """What a rule needs to know of its grids."""

    rule: str = "rotate"  # one of RULES
    integers: tuple[int, ...] = (0, 0, 0, 3, -6)  # Job: mantissa_bits to scale_min_exponent
    floats: tuple[float, ...] = (1.0, 448.0, 1.0, 1.0)  # Job: largest to top


def numbers_of(row: Format, rule: str, rounding: str = "nearest") -> Numbers | None:
    """What equals a row's definition under a rule; None where kernels.cpp has nothing."""
    grid = row.grid
    if grid is None or (rounding == "eden" and row.eden is not eden_nvfp4):
        return None
    largest, scales = grid.largest, E4M3
    gain, top = 1.0 / largest, largest
    if row.encode in _TWO_LEVEL:
        how = _TWO_LEVEL[row.encode][rule]
        kind = "eden" if rounding == "eden" else how.measure
        name = f"two_level_{kind}" if kind else "two_level"
        reached, scales = largest * how.reach, how.scales
        gain, top = 1.0 / reached, how.most * reached
    else:
        family = _FAMILIES.get(row.encode, "")
        name = f"{family}_{rule}" if rule else family
    elements = (grid.mantissa_bits, grid.min_exponent, grid.max_exponent)
    found = Numbers(
        name,
        (*elements, scales.mantissa_bits, scales.min_exponent),
        (largest, scales.largest, gain, top),
    )
    return found if name in RULES else None


def run(
    x: Tensor, out: Tensor, numbers: Numbers, *, block: tuple[int, int] = (1, 1), axis: int = -1,
    level: str = "none",
    ends: Tensor | None = None, scale: Tensor | None = None, given: Tensor | None = None,
    moved: Tensor | None = None, key: Tensor | None = None, rounding: str = "nearest",
    operand: int = 0, hadamard: int = 0, signs: str = "none", fold: bool = False,
) -> None:  # fmt: skip
    """Write the decoded values of x into out, and the scales above its blocks into scale.

    Args:
        x: [R, C] float32 or bfloat16 on the CPU, rows contiguous, any row stride.
        out: [R', C'] float32 or bfloat16, contiguous; other sizes than x's only with `hadamard`.
        numbers: the rule and its grids.
        block: rows and columns of one block: (1, b), (b, 1) or (b, b).
        axis: -1 or -2, along which tiles are rotated and rows have scales.
        level: one of LEVELS, what one scale above the blocks spans.
        ends: [E] int64, inclusive cumulative row counts; no block crosses one. None: one segment.
        scale: [E], [R'] or [E, C'] float32, written by the level.
        given: [E] float32, decoding scales of level segment that are not found here.
        moved: [E] int64, written: the ends in out, where a rotation along the rows pads segments.
        key: [] int64, of the random streams, read where rounding or signs are random.
        rounding: one of ROUNDINGS.
        operand: which stream.
        hadamard: width of the rotated tiles, 0: none.
        signs: of the rotation, as in `QSpec`.
        fold: multiply the values by the scale above them.

    Raises:
        ValueError: ends that fall or leave the rows.
    """
    rows, cols = x.shape
    if ends is None:
        ends = torch.tensor([rows])
    drawn = hadamard > 0 and signs == "step"
    integers, floats = numbers.integers, numbers.floats
    job = Job(
        x=x.data_ptr(), out=out.data_ptr(), ends=ends.data_ptr(), moved=_at(moved),
        scale=_at(scale), given=_at(given), key=_at(key) if rounding != "nearest" else None,
        signs_key=_at(key), signs=None if drawn else ctypes.addressof(_signs(hadamard, signs)),
        rows=rows, cols=cols, stride=x.stride(0), segments=ends.shape[0], out_rows=out.shape[0],
        out_cols=out.shape[1], block_rows=block[0], block_cols=block[1], axis=axis,
        rule=RULES.index(numbers.rule), level=LEVELS[level], hadamard=hadamard, operand=operand,
        mantissa_bits=integers[0], min_exponent=integers[1], max_exponent=integers[2],
        scale_mantissa_bits=integers[3], scale_min_exponent=integers[4], largest=floats[0],
        scale_largest=floats[1], gain=floats[2], top=floats[3],
        rotation=hadamard**-0.5 if hadamard else 1.0,
        x_bf16=x.dtype == torch.bfloat16, out_bf16=out.dtype == torch.bfloat16, fold=fold,
        threads=min(torch.get_num_threads(), 1 + x.numel() // VALUES_PER_THREAD),
    )  # fmt: skip
    if (code := KERNELS.call("moe_zoo_quantize", job)) == 1:
        raise ValueError(f"ends must rise from 0 to at most {rows} rows, got {ends.tolist()}")
    assert code == 0, f"kernels.cpp refused block {block} or rotation {hadamard}"


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


@functools.cache
def _signs(d: int, kind: str) -> ctypes.Array[ctypes.c_float]:
    """The signs that no key decides."""
    signs = signs_of(d, kind, None, 0, torch.device("cpu")).tolist() if d else []
    return (ctypes.c_float * d)(*signs)


def has(r: Resolved) -> bool:
    """Whether kernels.cpp has what a spec asks for."""
    plain = r.spec.rounding in ROUNDINGS and r.spec.hadamard <= WIDEST
    return plain and numbers_of(r.row, r.rule, r.spec.rounding) is not None


def wanted() -> bool:
    """Whether CPU tensors take the native kernels. Builds them when first asked."""
    return KERNELS.wanted()


# What torch.compiler.assume_constant_result does, without importing torch._dynamo (1.4 s) for it.
wanted._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
