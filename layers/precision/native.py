"""The compiled block quantisers of kernels.cpp, called through ctypes (see layers/native.py)."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from layers.native import Source
from layers.precision.formats import Resolved
from layers.precision.grids import Grid

# no fused multiply-add: the bits must be those of blocks.py
KERNELS = Source(Path(__file__).with_name("kernels.cpp"), ("-ffp-contract=off",))
RULES = {"floor": 0, "rceil": 1, "ceil": 2, "even": 3, "max": 4}  # enum Rule of kernels.cpp
DTYPES = (torch.float32, torch.bfloat16)  # what kernels.cpp reads and writes
VALUES_PER_THREAD = 1 << 15  # below this another thread costs more than it brings


class Job(ctypes.Structure):
    """One call: struct MoeZooJob of kernels.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out", "ends", "scale")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "stride", "segments")),
        *((name, ctypes.c_int32) for name in ("block_rows", "block_cols", "rule")),
        *((name, ctypes.c_int32) for name in ("mantissa_bits", "min_exponent", "max_exponent")),
        ("largest", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("x_bf16", "out_bf16", "fold", "threads")),
    )


def quantize_rows(
    x: Tensor, out: Tensor, scale: Tensor, ends: Tensor, block: tuple[int, int], grid: Grid,
    rule: str, fold: bool,
) -> None:  # fmt: skip
    """Write the decoded values of x into out, and the tensor scales into scale.

    Args:
        x: [R, C] float32 or bfloat16 on the CPU, rows contiguous, any row stride.
        out: [R, C] float32 or bfloat16, contiguous.
        scale: [E] float32, written where the rule has a tensor scale.
        ends: [E] int64, inclusive cumulative row counts; no block crosses one.
        block: rows and columns of one block: (1, b), (b, 1) or (b, b).
        grid: of the elements.
        rule: a key of RULES.
        fold: multiply the values by their tensor scale.

    Raises:
        ValueError: ends that fall or leave the rows.
    """
    rows, cols = x.shape
    job = Job(
        x=x.data_ptr(), out=out.data_ptr(), ends=ends.data_ptr(), scale=scale.data_ptr(),
        rows=rows, cols=cols, stride=x.stride(0), segments=ends.shape[0],
        block_rows=block[0], block_cols=block[1], rule=RULES[rule],
        mantissa_bits=grid.mantissa_bits, min_exponent=grid.min_exponent,
        max_exponent=grid.max_exponent, largest=grid.largest,
        x_bf16=x.dtype == torch.bfloat16, out_bf16=out.dtype == torch.bfloat16, fold=fold,
        threads=min(torch.get_num_threads(), 1 + x.numel() // VALUES_PER_THREAD),
    )  # fmt: skip
    if (code := KERNELS.call("moe_zoo_quantize", job)) == 1:
        raise ValueError(f"ends must rise from 0 to at most {rows} rows, got {ends.tolist()}")
    assert code == 0, f"kernels.cpp refused block {block} or rule {rule}"


def has(r: Resolved) -> bool:
    """Whether kernels.cpp has what a spec asks for, rotation aside."""
    plain = r.spec.rounding == "nearest" and r.scope in ("", "tensor")
    return r.row.native and plain and r.rule in RULES


def wanted() -> bool:
    """Whether CPU tensors take the native kernels. Builds them when first asked."""
    return KERNELS.wanted()


# What torch.compiler.assume_constant_result does, without importing torch._dynamo (1.4 s) for it.
wanted._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
