"""Adam's and Adagrad's update of some rows of a table: in one native call, else by torch.

Both compute the equations of `recipes.row_optim` and differ by the rounding of their sums. The
native one is taken for float32 on a CPU where it builds (`layers.native`).
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from layers.native import Source

KERNEL = Source(Path(__file__).with_name("row_rules.cpp"))
NUMBERS_PER_THREAD = 1 << 18  # some 0.2 ms of work
PIECE = 1 << 17  # numbers; a step of 8192 rows of 128 takes 0.63 of the time of one piece


class Job(ctypes.Structure):
    """One call: struct MoeZooRows of row_rules.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("table", "state", "rows", "g")),
        *((name, ctypes.c_void_p) for name in ("keep", "m_keep", "v_keep", "step", "v_scale")),
        *((name, ctypes.c_int64) for name in ("count", "d")),
        *((name, ctypes.c_float) for name in ("m_new", "v_new", "lr", "eps")),
        *((name, ctypes.c_int32) for name in ("by_row", "threads")),
    )


class AdamFactors(NamedTuple):
    """What Adam multiplies a row's numbers by, [U] each, in the table's dtype."""

    keep: Tensor  # weights, by weight decay
    m_keep: Tensor
    v_keep: Tensor
    step: Tensor  # learning rate over m's bias correction
    v_scale: Tensor  # one over v's bias correction


def adam(
    table: Tensor, moments: Tensor, rows: Tensor, g: Tensor, factors: AdamFactors,
    betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """m and v, then the weights, of the rows, in place.

    table: [M, D]; moments: [M, 2 D], m beside v, or [M, D + 1], one v a row; rows: [U], each once;
    g: [U, D].
    """
    d, by_row = table.shape[1], moments.shape[1] < 2 * table.shape[1]
    m_new, v_new = (1 - beta for beta in betas)
    if _is_native(table, moments, rows, g):
        _call("moe_zoo_adam_rows", table, moments, rows, g, factors, m_new, v_new, 0.0, eps, by_row)
        return
    for at in _pieces(rows, d, table):
        keep, m_keep, v_keep, step, v_scale = (f[at, None] for f in factors)
        both = moments.index_select(0, rows[at])
        m, v, square = both[:, :d], both[:, d:], g[at].square()
        m.mul_(m_keep).add_(g[at], alpha=m_new)
        v.mul_(v_keep).add_(square.mean(1, keepdim=True) if by_row else square, alpha=v_new)
        moments.index_copy_(0, rows[at], both)
        root = (v * v_scale).sqrt_().add_(eps)
        weights = table.index_select(0, rows[at]).mul_(keep)
        table.index_copy_(0, rows[at], weights.sub_((m * step).div_(root)))


def adagrad(
    table: Tensor, sums: Tensor, rows: Tensor, g: Tensor, keep: Tensor, lr: float, eps: float
) -> None:
    """The sum of squares, then the weights, of the rows, in place.

    table: [M, D]; sums: [M, D] or [M, 1]; rows: [U], each once; g: [U, D]; keep: [U], what weight
    decay leaves of the weights.
    """
    by_row = sums.shape[1] != table.shape[1]
    if _is_native(table, sums, rows, g):
        factors = AdamFactors(*[keep] * 5)  # only keep is read
        _call("moe_zoo_adagrad_rows", table, sums, rows, g, factors, 0.0, 0.0, lr, eps, by_row)
        return
    for at in _pieces(rows, table.shape[1], table):
        a, square = sums.index_select(0, rows[at]), g[at].square()
        a += square.mean(1, keepdim=True) if by_row else square
        sums.index_copy_(0, rows[at], a)
        weights = table.index_select(0, rows[at]).mul_(keep[at, None])
        table.index_copy_(0, rows[at], weights.sub_((g[at] * lr).div_(a.sqrt_().add_(eps))))


def _is_native(table: Tensor, state: Tensor, rows: Tensor, g: Tensor) -> bool:
    numbers = (table, state, g)
    return (
        all(t.device.type == "cpu" and t.dtype == torch.float32 for t in numbers)
        and all(t.is_contiguous() for t in (*numbers, rows))
        and KERNEL.wanted()
    )


def _call(
    function: str, table: Tensor, state: Tensor, rows: Tensor, g: Tensor, factors: AdamFactors,
    m_new: float, v_new: float, lr: float, eps: float, by_row: bool,
) -> None:  # fmt: skip
    factors = AdamFactors(*(f.contiguous() for f in factors))
    KERNEL.call(function, Job(
        table.data_ptr(), state.data_ptr(), rows.data_ptr(), g.data_ptr(),
        *(f.data_ptr() for f in factors), *g.shape, m_new, v_new, lr, eps, by_row,
        min(torch.get_num_threads(), 1 + g.numel() // NUMBERS_PER_THREAD),
    ))  # fmt: skip


def _pieces(rows: Tensor, width: int, table: Tensor) -> Iterator[slice]:
    """Some rows at a time on a CPU, so that what an update writes between stays in its cache."""
    n = max(1, PIECE // width) if table.device.type == "cpu" else len(rows)
    for start in range(0, len(rows), n):
        yield slice(start, start + n)
