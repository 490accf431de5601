"""The compiled quantisers of kernels.cpp, called through ctypes (see layers/native.py)."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layers.native import Source
from layers.precision.formats import Resolved
from layers.precision.hadamard import signs_of
from layers.precision.hif4 import encode_hif4
from layers.precision.mx import encode_mx
from layers.precision.nvfp4 import encode_nvfp4
from layers.precision.scaled import encode_scaled

# no fused multiply-add: the bits must be those of the torch ops
KERNELS = Source(Path(__file__).with_name("kernels.cpp"), ("-ffp-contract=off",))
# enum Rule of kernels.cpp, and which definition it equals
RULES = ("mx_floor", "mx_rceil", "mx_ceil", "mx_even", "nvfp4_max", "scaled_max", "scaled_p2",
         "hif4", "rotate")  # fmt: skip
_FAMILIES: dict[Any, str] = {
    encode_mx: "mx", encode_nvfp4: "nvfp4", encode_scaled: "scaled", encode_hif4: "hif4",
}  # fmt: skip
LEVELS = {"none": 0, "segment": 1, "row": 2, "column": 3}  # enum Level
ROUNDINGS = ("nearest", "stochastic")
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
        *((name, ctypes.c_int32) for name in ("mantissa_bits", "min_exponent", "max_exponent")),
        *((name, ctypes.c_int32) for name in ("hadamard", "operand")),
        *((name, ctypes.c_float) for name in ("largest", "rotation")),
        *((name, ctypes.c_int32) for name in ("x_bf16", "out_bf16", "fold", "threads")),
    )


def run(
    x: Tensor, out: Tensor, *, rule: str, block: tuple[int, int] = (1, 1), axis: int = -1,
    grid: tuple[int, int, int] = (0, 0, 0), largest: float = 1.0, level: str = "none",
    ends: Tensor | None = None, scale: Tensor | None = None, given: Tensor | None = None,
    moved: Tensor | None = None, key: Tensor | None = None, rounding: str = "nearest",
    operand: int = 0, hadamard: int = 0, signs: str = "none", fold: bool = False,
) -> None:  # fmt: skip
    """Write the decoded values of x into out, and the scales above its blocks into scale.

    Args:
        x: [R, C] float32 or bfloat16 on the CPU, rows contiguous, any row stride.
        out: [R', C'] float32 or bfloat16, contiguous; other sizes than x's only with `hadamard`.
        rule: one of RULES.
        block: rows and columns of one block: (1, b), (b, 1) or (b, b).
        axis: -1 or -2, along which tiles are rotated and rows have scales.
        grid: of the elements: mantissa bits, exponents of the smallest and the largest normal.
        largest: of the elements.
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
    job = Job(
        x=x.data_ptr(), out=out.data_ptr(), ends=ends.data_ptr(), moved=_at(moved),
        scale=_at(scale), given=_at(given), key=_at(key) if rounding == "stochastic" else None,
        signs_key=_at(key), signs=None if drawn else ctypes.addressof(_signs(hadamard, signs)),
        rows=rows, cols=cols, stride=x.stride(0), segments=ends.shape[0], out_rows=out.shape[0],
        out_cols=out.shape[1], block_rows=block[0], block_cols=block[1], axis=axis,
        rule=RULES.index(rule), level=LEVELS[level], mantissa_bits=grid[0], min_exponent=grid[1],
        max_exponent=grid[2], hadamard=hadamard, operand=operand, largest=largest,
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


def rule_of(r: Resolved) -> str | None:
    """The rule of kernels.cpp that equals a row's definition, or None."""
    family = _FAMILIES.get(r.row.encode, "")
    rule = f"{family}_{r.rule}" if r.rule else family
    return rule if rule in RULES else None


def has(r: Resolved) -> bool:
    """Whether kernels.cpp has what a spec asks for."""
    plain = r.spec.rounding in ROUNDINGS and r.spec.hadamard <= WIDEST
    return plain and rule_of(r) is not None


def wanted() -> bool:
    """Whether CPU tensors take the native kernels. Builds them when first asked."""
    return KERNELS.wanted()


# What torch.compiler.assume_constant_result does, without importing torch._dynamo (1.4 s) for it.
wanted._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
