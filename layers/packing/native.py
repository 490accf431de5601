"""Packed matrices times a few rows: kernels.cpp as one torch operator, torch ops where it is not.

`moe_zoo::packed_multiply` reads the codes once, where they lie; nothing of the matrix is written.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from layers.native import Source
from layers.packing import bits
from layers.packing.codes import values_by_code
from layers.packing.storage import Storage
from layers.precision.grids import GRIDS

KERNELS = Source(Path(__file__).with_name("kernels.cpp"), ("-ffp-contract=fast",))
ELEMENTS = {"e4m3": 1, "e5m2": 2}  # enum Element of kernels.cpp; 4-bit grids: 0 and their table
# enum Scale of kernels.cpp, with the block that it stands for; by bits of an element
SCALES = {
    4: {("none", 0): 0, ("e8m0", 32): 1, ("ue4m3", 16): 2, ("ue5m3", 16): 3, ("hif4", 64): 4},
    8: {("none", 0): 0, ("e8m0", 32): 1},
}
NUMBERS_PER_THREAD = 1 << 22  # of the matrix, some 0.1 ms of reading


class Job(ctypes.Structure):
    """One call: struct MoeZooPacked of kernels.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "x", "which", "table", "y")),
        *((name, ctypes.c_int64) for name in ("matrices", "n", "k", "t")),
        *((name, ctypes.c_int64) for name in ("row_bytes", "row_scales")),
        *((name, ctypes.c_int32) for name in ("element", "scale", "half", "threads")),
    )


def multiply(
    x: Tensor, codes: Tensor, scales: Tensor, storage: Storage, which: Tensor | None = None
) -> Tensor:
    """y[t] = W[which[t]] x[t], straight from codes, summed in float32.

    Args:
        x: [T, K] float32 or bfloat16.
        codes: [N, row_bytes] or [E, N, row_bytes] uint8, contiguous.
        scales: [..., row_scales], as `storage` says, contiguous.
        storage: how the matrix is packed.
        which: [T] int64, the matrix of each row; None: there is one.

    Returns:
        [T, N] float32, without the tensor scale.

    Raises:
        ValueError: a matrix that does not exist.
    """
    return torch.ops.moe_zoo.packed_multiply(
        x, codes, scales, storage.grid.name, storage.scale, storage.block, storage.rows, which
    )


def _multiply(
    x: Tensor, codes: Tensor, scales: Tensor, grid: str, scale: str, block: int, rows: int,
    which: Tensor | None,
) -> Tensor:  # fmt: skip
    storage = Storage(grid=GRIDS[grid], scale=scale, block=block, rows=rows)
    known = storage.bits == 4 or grid in ELEMENTS
    kind = SCALES[storage.bits].get((scale, block)) if known else None
    if kind is None or x.device.type != "cpu" or not KERNELS.wanted():
        return bits.multiply(x, codes, scales, storage, which)
    x = x.contiguous() if x.dtype is torch.bfloat16 else x.float().contiguous()
    which = None if which is None else which.to(torch.int64).contiguous()
    y = torch.empty(x.shape[0], codes.shape[-2])
    table = values_by_code(storage.grid)
    numbers = x.shape[0] * codes.shape[-2] * x.shape[1]
    job = Job(
        codes.data_ptr(), scales.data_ptr(), x.data_ptr(),
        None if which is None else which.data_ptr(), table.data_ptr(), y.data_ptr(),
        codes.shape[0] if codes.dim() == 3 else 1, codes.shape[-2], x.shape[1], x.shape[0],
        codes.shape[-1], scales.shape[-1] if scales.numel() else 0,
        ELEMENTS.get(grid, 0), kind, x.dtype is torch.bfloat16,
        min(torch.get_num_threads(), 1 + numbers // NUMBERS_PER_THREAD),
    )  # fmt: skip
    code = KERNELS.call("moe_zoo_packed_multiply", job)
    if code == 1:
        raise ValueError(f"matrices must be in [0, {job.matrices}), got {which}")
    assert code == 0, f"kernels.cpp refused {grid} under {scale}"
    return y


_library = torch.library.Library("moe_zoo", "FRAGMENT")
_library.define(
    "packed_multiply(Tensor x, Tensor codes, Tensor scales, str grid, str scale, int block, "
    "int rows, Tensor? which) -> Tensor"
)
_library.impl("packed_multiply", _multiply, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_zoo::packed_multiply", lib=_library)
def _(x, codes, scales, grid, scale, block, rows, which):
    return x.new_empty(x.shape[0], codes.shape[-2], dtype=torch.float32)


@register_flop_formula(torch.ops.moe_zoo.packed_multiply)
def _flops(x, codes, *_, **__) -> int:
    return 2 * x[0] * x[1] * codes[-2]
