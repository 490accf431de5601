"""Packed rows to numbers: one torch operator, `moe_zoo::packed_decode`, native for 4-bit codes."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from layers.native import Source
from layers.packing.codes import values_by_code
from layers.packing.storage import Storage
from layers.precision.grids import GRIDS

KERNELS = Source(Path(__file__).with_name("unpack.cpp"), ("-ffp-contract=off",))
DTYPES = (torch.float32, torch.bfloat16)
NUMBERS_PER_THREAD = 1 << 16


class Job(ctypes.Structure):
    """One call: struct MoeZooUnpack of unpack.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "factors", "table", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "k", "row_bytes", "blocks", "block")),
        *((name, ctypes.c_int32) for name in ("half", "threads")),
    )


def decode(codes: Tensor, scales: Tensor, storage: Storage, k: int, dtype: torch.dtype) -> Tensor:
    """What `Storage.decode` defines, to the bit, faster on a CPU; same arguments."""
    return torch.ops.moe_zoo.packed_decode(
        codes, scales, storage.grid.name, storage.scale, storage.block, storage.rows, k, dtype
    )


def _decode(
    codes: Tensor, scales: Tensor, grid: str, scale: str, block: int, rows: int, k: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    storage = Storage(grid=GRIDS[grid], scale=scale, block=block, rows=rows)
    known = storage.bits == 4 and rows == 1 and dtype in DTYPES and codes.device.type == "cpu"
    if not known or not KERNELS.wanted():
        return storage.decode(codes, scales, k, dtype)
    codes = codes.contiguous()
    factors = None if scale == "none" else storage.factors(scales).contiguous()
    out = torch.empty(*codes.shape[:-1], k, dtype=dtype)
    each = 4 if scale == "hif4" else block or k
    job = Job(
        codes.data_ptr(), None if factors is None else factors.data_ptr(),
        values_by_code(storage.grid).data_ptr(), out.data_ptr(),
        codes[..., 0].numel(), k, codes.shape[-1], 0 if factors is None else factors.shape[-1],
        each, dtype is torch.bfloat16,
        min(torch.get_num_threads(), 1 + out.numel() // NUMBERS_PER_THREAD),
    )  # fmt: skip
    KERNELS.call("moe_zoo_unpack", job)
    return out


_library = torch.library.Library("moe_zoo", "FRAGMENT")
_library.define(
    "packed_decode(Tensor codes, Tensor scales, str grid, str scale, int block, int rows, int k, "
    "ScalarType dtype) -> Tensor"
)
_library.impl("packed_decode", _decode, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_zoo::packed_decode", lib=_library)
def _(codes, scales, grid, scale, block, rows, k, dtype):
    return codes.new_empty(*codes.shape[:-1], k, dtype=dtype)
