"""Matmuls over rows sorted by expert: one segment of rows for each matrix of a stack.

N rows, E experts; `counts` [E] int64 says how many consecutive rows belong to each expert. An
expert without rows costs nothing and gets a gradient of exact zeros.

The three products are library operators, so that `torch.compile` keeps them whole and
`FlopCounterMode` counts them exactly (moe.md 14.3, performance.md 3). `backend` is one of

    loop      one `torch.mm(out=slice)` per expert; any dtype; the fastest in training on a CPU;
              reads `counts` on the host, as nothing else here does
    grouped   `F.grouped_mm`; refuses float64 and widths off its 16-byte steps
    batched   a copy of its matrix for each row, one `torch.bmm`: for a few rows
    capacity  `torch.bmm` of [E, N / E, K]: every expert has equally many rows, some of zeros
    auto      by size and device, see `chosen`

But for "capacity", counts may sum to less than N: the rows past that belong to no expert, and what
a product leaves there is not to be read.

The dtype of the rows is the dtype of the matmul: a stack in another dtype is cast one matrix at a
time, just before it is used, so that no copy of the whole stack is written.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from layers.batched import (
    expert_of_rows,
    gathered_mm,
    gathered_mm_dx,
    gathered_wgrad,
    padded_mm,
    padded_wgrad,
)
from layers.names import check_choice

BACKENDS = ("auto", "grouped", "loop", "batched", "capacity")
STEP, EXACT = 16, 64  # a loop multiplies multiples of STEP rows, or up to EXACT as they are

_library = torch.library.Library("moe_zoo", "FRAGMENT")


def grouped_mm(x: Tensor, w: Tensor, counts: Tensor, backend: str = "auto") -> Tensor:
    """Each row times its expert's matrix, transposed: `y[n] = w[e(n)] @ x[n]`.

    x: [N, K]; w: [E, O, K]; counts: [E] int64. Returns [N, O] in x's dtype. Not differentiable:
    see `grouped_linear`.
    """
    return torch.ops.moe_zoo.grouped_mm(x, w, counts, backend)


def grouped_mm_dx(dy: Tensor, w: Tensor, counts: Tensor, backend: str = "auto") -> Tensor:
    """Each row times its expert's matrix: `dx[n] = w[e(n)]^T @ dy[n]`.

    dy: [N, O]; w: [E, O, K]; counts: [E] int64. Returns [N, K] in dy's dtype.
    """
    return torch.ops.moe_zoo.grouped_mm_dx(dy, w, counts, backend)


def grouped_wgrad(
    dy: Tensor,
    x: Tensor,
    counts: Tensor,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The gradient of every expert's matrix: `dw[e] = sum over its rows of dy[n] x[n]^T`.

    dy: [N, O]; x: [N, K], same dtype; counts: [E] int64, whose sum may be less than N: rows past
    it are not read. Returns [E, O, K] in `dtype` (None: that of the rows), exact zeros where an
    expert has no row.
    """
    return torch.ops.moe_zoo.grouped_wgrad(dy, x, counts, dtype or dy.dtype, backend)


def scale_rows_(y: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
    """Multiply each expert's rows by its number, in place, rounding once. Not differentiable.

    y: [N, F]; scale: [E] float32; counts: [E] int64. Returns y.
    """
    torch.ops.moe_zoo.scale_rows_(y, scale, counts)
    return y


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, counts: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x, w, counts)
        ctx.backend = backend
        return grouped_mm(x, w, counts, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # the decorator hides ctx
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, w, counts = ctx.saved_tensors
        dy = grads[0].contiguous()  # a sum's gradient has stride 0, which grouped kernels refuse
        dx = grouped_mm_dx(dy, w, counts, ctx.backend) if ctx.needs_input_grad[0] else None
        dw = grouped_wgrad(dy, x, counts, w.dtype, ctx.backend) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None


def grouped_linear(x: Tensor, w: Tensor, counts: Tensor, backend: str = "auto") -> Tensor:
    """`grouped_mm` with gradients for x and w.

    x: [N, K], rows sorted by expert; w: [E, O, K]; counts: [E] int64, sums to N.
    Returns [N, O] in x's dtype, or autocast's where that is on, as a linear layer would; w's
    gradient comes in w's dtype.
    """
    if backend != "auto":
        check_choice("grouped matmul backend", backend, BACKENDS)
    x = x.to(matmul_dtype(x))
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        y = _GroupedLinear.apply(x, w, counts, backend)
        assert isinstance(y, Tensor)
        return y
    return grouped_mm(x, w, counts, backend)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply x: autocast's where on, else x's own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


# The operators. Each walks its experts or hands the segments to F.grouped_mm.


def chosen(rows: Tensor, backend: str, w: tuple[int, int, int]) -> str:
    """Which products run: `backend` itself, or for "auto" the fastest by measured size.

    On a CPU that is the loop, but "batched" for the few rows whose matrices take less time to copy
    than many experts take to walk through (measured on one thread in fp32 and bf16, N 1 to 2048,
    E 4 to 256, widths 32 to 512: 1.1 to 6 times as fast there; from 0.8 to 0.9 at worst, where 2
    rows meet 64 experts). `F.grouped_mm` never is: it meets a new number of rows at each call,
    for which oneDNN builds a kernel, and its gradient of the weights writes them twice.

    rows: [N, K]; w: E and the widths of one expert's matrix.

    Raises:
        ValueError: where "grouped" is asked for what `F.grouped_mm` does not take.
    """
    e, *widths = w
    aligned = all(width * rows.element_size() % 16 == 0 for width in widths)
    if backend == "grouped" and (rows.dtype is torch.float64 or not aligned):
        raise ValueError(
            "backend 'grouped' takes no float64, and widths whose rows are multiples of 16 bytes; "
            f"got {rows.dtype} and {widths[0]} x {widths[1]}: choose 'loop' or 'auto'"
        )
    if backend != "auto":
        return backend
    if rows.is_cuda:  # elsewhere than in bf16 F.grouped_mm is a loop of its own
        return "grouped" if rows.dtype is torch.bfloat16 and aligned else "loop"
    n, numbers = rows.shape[0], widths[0] * widths[1]
    few = numbers <= 4096 and n * numbers <= 300 * e + 3000 * min(n, e)
    return "batched" if e >= 64 and few else "loop"


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)  # grouped_mm takes no other integer


def _rounded(size: int) -> int:
    """Rows to multiply for `size` rows: the next multiple of STEP, but up to EXACT as they are.

    oneDNN builds a kernel for every new number of rows, 0.5 to 0.9 ms each: as much as a small
    expert's product takes, and experts meet a new number in every batch. Small numbers come again
    soon, and rounding them costs a tenth of the time.
    """
    return size if size <= EXACT else -(-size // STEP) * STEP


def _caster(w: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Room for one matrix of `w` in `dtype`, or None when it needs no cast."""
    return None if w.dtype == dtype else w.new_empty(w.shape[1:], dtype=dtype)


def _grouped_mm(x: Tensor, w: Tensor, counts: Tensor, backend: str) -> Tensor:
    x, w = x.detach(), w.detach()
    how = chosen(x, backend, (w.shape[0], w.shape[1], w.shape[2]))
    if how == "capacity":
        return padded_mm(x, w)
    if how == "batched":
        return gathered_mm(x, w, counts)
    if how == "grouped":
        return F.grouped_mm(
            x.contiguous(), w.to(x.dtype).contiguous().transpose(-2, -1), offs=_ends(counts)
        )
    return _loop(x, w, counts, x.new_empty(x.shape[0], w.shape[1]), transposed=True)


def _grouped_mm_dx(dy: Tensor, w: Tensor, counts: Tensor, backend: str) -> Tensor:
    dy, w = dy.detach(), w.detach()
    how = chosen(dy, backend, (w.shape[0], w.shape[1], w.shape[2]))
    if how == "capacity":
        return padded_mm(dy, w.mT)
    if how == "batched":
        return gathered_mm_dx(dy, w, counts)
    if how == "grouped":
        return F.grouped_mm(dy.contiguous(), w.to(dy.dtype).contiguous(), offs=_ends(counts))
    return _loop(dy, w, counts, dy.new_empty(dy.shape[0], w.shape[2]), transposed=False)


def _loop(x: Tensor, w: Tensor, counts: Tensor, out: Tensor, *, transposed: bool) -> Tensor:
    """out[rows of e] = x[rows of e] @ w[e], or @ w[e]^T, expert by expert in their order.

    Rounded numbers of rows reach into the next experts' rows: what is written there is written
    anew by theirs, which come later. At the very end there are none to reach into.
    """
    cast, start, sizes = _caster(w, x.dtype), 0, counts.tolist()
    for size, matrix in zip(sizes, w.unbind(0), strict=True):
        if not size:
            continue
        matrix = matrix if cast is None else cast.copy_(matrix)
        matrix = matrix.t() if transposed else matrix
        end, wide = start + size, start + _rounded(size)
        if wide <= x.shape[0]:
            torch.mm(x[start:wide], matrix, out=out[start:wide])
        else:
            room = x.new_empty(wide - start, x.shape[1])
            out[start:end] = torch.mm(_widened(x[start:end], room), matrix)[:size]
        start = end
    return out


def _grouped_wgrad(
    dy: Tensor, x: Tensor, counts: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    dy, x = dy.detach(), x.detach()
    how = chosen(dy, backend, (counts.shape[0], dy.shape[1], x.shape[1]))
    if how == "capacity":
        return padded_wgrad(dy, x, counts.shape[0], dtype)
    if how == "batched":
        return gathered_wgrad(dy, x, counts, dtype)
    if how == "grouped":
        dw = F.grouped_mm(dy.contiguous().t(), x.contiguous(), offs=_ends(counts))
        # An empty segment is summed over nothing; no kernel promises to write those zeros.
        return dw.masked_fill_((counts == 0)[:, None, None], 0).to(dtype)
    dw = dy.new_empty(counts.shape[0], dy.shape[1], x.shape[1], dtype=dtype)
    product = _caster(dw, dy.dtype)
    sizes = counts.tolist()
    parts = [*sizes, dy.shape[0] - sum(sizes)]  # rows past the last expert's are zeros of padding
    wide_dy, wide_x = (rows.new_empty(_rounded(max(sizes)), rows.shape[1]) for rows in (dy, x))
    pieces = zip(dy.split(parts), x.split(parts), strict=True)
    for size, dw_e, (dy_e, x_e) in zip(sizes, dw.unbind(0), pieces, strict=False):
        if not size:
            dw_e.zero_()
            continue
        pair = _widened(dy_e, wide_dy).t(), _widened(x_e, wide_x)
        if product is None:
            torch.mm(*pair, out=dw_e)
        else:
            dw_e.copy_(torch.mm(*pair, out=product))
    return dw


def _widened(rows: Tensor, room: Tensor) -> Tensor:
    """The rows with zeros behind them, up to a rounded number: they add nothing to a product."""
    size, wide = rows.shape[0], _rounded(rows.shape[0])
    if wide == size:
        return rows
    room[:size].copy_(rows)
    room[size:wide].zero_()
    return room[:wide]


def _scale_rows_(y: Tensor, scale: Tensor, counts: Tensor) -> None:
    if y.is_cuda:  # no host read
        y.mul_(scale[expert_of_rows(counts, y.shape[0])][:, None])
        return
    sizes = counts.tolist()
    parts = y.split([*sizes, y.shape[0] - sum(sizes)])
    for y_e, scale_e in zip(parts, scale.unbind(0), strict=False):
        y_e.mul_(scale_e)  # a number, which is multiplied in float32 without a cast of y


_library.define("scale_rows_(Tensor(a!) y, Tensor scale, Tensor counts) -> ()")
_library.impl("scale_rows_", _scale_rows_, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_zoo::scale_rows_", lib=_library)
def _(y: Tensor, scale: Tensor, counts: Tensor) -> None:
    return None


_ROWS_SCHEMA = "(Tensor rows, Tensor w, Tensor counts, str backend) -> Tensor"
_library.define(f"grouped_mm{_ROWS_SCHEMA}")
_library.define(f"grouped_mm_dx{_ROWS_SCHEMA}")
_library.define(
    "grouped_wgrad(Tensor dy, Tensor x, Tensor counts, ScalarType dtype, str backend) -> Tensor"
)
_library.impl("grouped_mm", _grouped_mm, "CompositeExplicitAutograd")
_library.impl("grouped_mm_dx", _grouped_mm_dx, "CompositeExplicitAutograd")
_library.impl("grouped_wgrad", _grouped_wgrad, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_zoo::grouped_mm", lib=_library)
def _(x: Tensor, w: Tensor, counts: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@torch.library.register_fake("moe_zoo::grouped_mm_dx", lib=_library)
def _(dy: Tensor, w: Tensor, counts: Tensor, backend: str) -> Tensor:
    return dy.new_empty(dy.shape[0], w.shape[2])


@torch.library.register_fake("moe_zoo::grouped_wgrad", lib=_library)
def _(dy: Tensor, x: Tensor, counts: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return dy.new_empty(counts.shape[0], dy.shape[1], x.shape[1], dtype=dtype)


@register_flop_formula([torch.ops.moe_zoo.grouped_mm, torch.ops.moe_zoo.grouped_mm_dx])
def _rows_flops(rows: torch.Size, w: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * w[1] * w[2]


@register_flop_formula(torch.ops.moe_zoo.grouped_wgrad)
def _wgrad_flops(dy: torch.Size, x: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * dy[0] * dy[1] * x[1]
