"""Products of a token with rows of a table, and the gradient of the table, as operators.

`torch.compile` keeps them whole and `FlopCounterMode` counts them. The rows [T, K, D] are never
written. For float32 on a CPU the products are one native call where it builds (`layers.native`),
which rounds sums otherwise than torch's kernel and takes a third of its time.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from layers.native import Source

KERNEL = Source(Path(__file__).with_name("row_dots.cpp"))
NUMBERS_PER_THREAD = 1 << 18  # some 0.1 ms of reading


class Job(ctypes.Structure):
    """One call: struct MoeZooRowDots of row_dots.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("table", "ids", "x", "y")),
        *((name, ctypes.c_int64) for name in ("tokens", "k", "d", "n_rows")),
        ("threads", ctypes.c_int32),
    )


def row_dots(table: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    """<table[ids[t, k]], x[t]>. table: [M, D]; ids: [T, K] int64; x: [T, D]. Returns [T, K].

    Raises:
        IndexError: an id that is no row, where the native call looks.
    """
    x = x.contiguous()
    if not ids.numel():
        return x.new_zeros(ids.shape)
    if _is_native(table, x):
        return _native(table, ids.contiguous(), x)
    # the gradient that `embedding_bag` has for its weights
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return dots(x, table, *_bags(ids), 0).view_as(ids)


def row_dots_wgrad(g: Tensor, ids: Tensor, x: Tensor, n_rows: int) -> Tensor:
    """The gradient of the table [n_rows, D], dense: of row r the sum of g[t, k] * x[t] over its
    hits. g, ids: [T, K]; x: [T, D].
    """
    if not ids.numel():
        return x.new_zeros(n_rows, x.shape[1])
    flat, starts, bag = _bags(ids)
    sizes, none = torch.full_like(starts, ids.shape[1]), ids.new_empty(0)
    return torch.ops.aten._embedding_bag_dense_backward(
        x.contiguous(), flat, bag, sizes, none, n_rows, False, 0, g.flatten().to(x.dtype)
    )


def _bags(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of T bags in one row; where each bag starts; the bag of each id."""
    t, k = ids.shape
    starts = torch.arange(0, t * k, k, device=ids.device)
    return ids.flatten(), starts, torch.arange(t, device=ids.device).repeat_interleave(k)


def _is_native(table: Tensor, x: Tensor) -> bool:
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (table, x))
    return plain and table.is_contiguous() and KERNEL.wanted()


def _native(table: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    y = x.new_empty(ids.shape)
    job = Job(
        table.data_ptr(), ids.data_ptr(), x.data_ptr(), y.data_ptr(),
        *ids.shape, table.shape[1], table.shape[0],
        min(torch.get_num_threads(), 1 + ids.numel() * table.shape[1] // NUMBERS_PER_THREAD),
    )  # fmt: skip
    if KERNEL.call("moe_zoo_row_dots", job):
        raise IndexError(f"ids must be in [0, {table.shape[0]}), got {ids.min()} to {ids.max()}")
    return y


_library = torch.library.Library("moe_zoo", "FRAGMENT")
_library.define("row_dots(Tensor table, Tensor ids, Tensor x) -> Tensor")
_library.define("row_dots_wgrad(Tensor g, Tensor ids, Tensor x, int n_rows) -> Tensor")
# The same, as gradients of a bag: its sum counts as no matmul, so neither do they.
_library.define("bag_dweights(Tensor table, Tensor ids, Tensor x) -> Tensor")
_library.define("bag_dtable(Tensor g, Tensor ids, Tensor x, int n_rows) -> Tensor")
_library.impl("row_dots", row_dots, "CompositeExplicitAutograd")
_library.impl("bag_dweights", row_dots, "CompositeExplicitAutograd")
_library.impl("row_dots_wgrad", row_dots_wgrad, "CompositeExplicitAutograd")
_library.impl("bag_dtable", row_dots_wgrad, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_zoo::row_dots", lib=_library)
@torch.library.register_fake("moe_zoo::bag_dweights", lib=_library)
def _(table: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(ids.shape)


@torch.library.register_fake("moe_zoo::row_dots_wgrad", lib=_library)
@torch.library.register_fake("moe_zoo::bag_dtable", lib=_library)
def _(g: Tensor, ids: Tensor, x: Tensor, n_rows: int) -> Tensor:
    return x.new_empty(n_rows, x.shape[1])


@register_flop_formula([torch.ops.moe_zoo.row_dots])
def _row_dots_flops(table: torch.Size, ids: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * ids[0] * ids[1] * table[1]


@register_flop_formula([torch.ops.moe_zoo.row_dots_wgrad])
def _row_dots_wgrad_flops(g: torch.Size, ids: torch.Size, x: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * ids[0] * ids[1] * x[1]
