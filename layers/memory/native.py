"""The search over product keys in one call of search.cpp, where that builds."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from layers.native import Source

KERNEL = Source(Path(__file__).with_name("search.cpp"))
MOST_KEYS = 1 << 16  # a slot is a 32-bit number there
ROWS_PER_THREAD = 64  # some 0.2 ms of work


class Job(ctypes.Structure):
    """One call: struct MoeZooProductSearch of search.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "cols", "i", "j", "slots")),
        *((name, ctypes.c_int64) for name in ("count", "n", "k", "m", "pairs")),
        ("threads", ctypes.c_int32),
    )


def wanted(scores: Tensor) -> bool:
    """Whether the kernel takes such scores: float32 on a CPU, real ones. Builds it if need be."""
    usable = scores.device.type == "cpu" and scores.dtype == torch.float32
    return usable and scores.shape[-1] < MOST_KEYS and KERNEL.wanted()


@functools.lru_cache(maxsize=64)
def as_places(pairs: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    """Pairs of places as the kernels read them, [2, pairs] int32."""
    return torch.tensor(pairs, dtype=torch.int32, device="cpu")


def product_top_k(
    rows: Tensor, cols: Tensor, k: int, sub_k: int, places: tuple[tuple[int, ...], tuple[int, ...]]
) -> Tensor:
    """As `layers.memory.selection.product_top_k`, for the pairs of places given."""
    shape, n = rows.shape, rows.shape[-1]
    rows, cols = (s.reshape(-1, n).contiguous() for s in (rows, cols))
    ij = as_places(places)
    slots = torch.empty(rows.shape[0], k, dtype=torch.int64)
    job = Job(
        rows.data_ptr(), cols.data_ptr(), ij[0].data_ptr(), ij[1].data_ptr(), slots.data_ptr(),
        rows.shape[0], n, k, sub_k, ij.shape[1],
        min(torch.get_num_threads(), 1 + rows.shape[0] // ROWS_PER_THREAD),
    )  # fmt: skip
    KERNEL.call("moe_zoo_product_search", job)
    return slots.view(*shape[:-1], k)
