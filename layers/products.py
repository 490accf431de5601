"""The three matmuls of a linear layer, of operands already quantised, plain or by expert.

M rows, K in, O out. A format's float32 scales stay out of its values; they multiply the product,
which is exact where folding them into an operand would round it (precision.md section 4).
"""

import torch
from torch import Tensor

from layers.batched import expert_of_rows
from layers.grouped import grouped_mm, grouped_mm_dx, grouped_wgrad, scale_rows_
from layers.precision import hardware
from layers.precision.coded import Coded
from layers.precision.quantize import Quantized


def fprop(
    x: Quantized | Coded, w: Quantized | Coded, counts: Tensor | None, backend: str = "auto"
) -> Tensor:
    """y = x w^T. x: [M, K]; w: [O, K] or [E, O, K]. Returns [M, O].

    backend: of products by expert, a row of `layers.grouped.BACKENDS`.
    """
    if isinstance(x, Coded) and isinstance(w, Coded):
        _check_by_expert(backend)
        return hardware.fprop(x, w, counts)
    assert isinstance(x, Quantized)
    assert isinstance(w, Quantized)
    if counts is None:
        y = x.values @ w.values.mT
    else:
        y = grouped_mm(x.values, w.values, counts, backend)
    return epilogue(y, x.scale, w.scale, counts)


def epilogue(
    y: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, counts: Tensor | None
) -> Tensor:
    """y of `fprop`, times the scales that its operands were left without, in place."""
    if counts is None:
        return _scaled(y, x_scale, _transposed(w_scale))
    return _scaled_rows(y, x_scale, _transposed(w_scale), counts)


def dgrad(
    dy: Quantized | Coded, w: Quantized | Coded, counts: Tensor | None, backend: str = "auto"
) -> Tensor:
    """dx = dy w. dy: [M, O']; w: [O', K] or [E, O', K]. Returns [M, K]."""
    if isinstance(dy, Coded) and isinstance(w, Coded):
        return hardware.dgrad(dy, w, counts)
    assert isinstance(dy, Quantized)
    assert isinstance(w, Quantized)
    if counts is None:
        return _scaled(dy.values @ w.values, dy.scale, w.scale)
    dx = grouped_mm_dx(dy.values, w.values, counts, backend)
    return _scaled_rows(dx, dy.scale, w.scale, counts)


def wgrad(
    dy: Quantized | Coded, x: Quantized | Coded, counts: Tensor | None, dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """dw = dy^T x. dy: [M', O]; x: [M', K]. Returns [O, K] or [E, O, K] in dtype."""
    if isinstance(dy, Coded) and isinstance(x, Coded):
        return hardware.wgrad(dy, x, counts, dtype)
    assert isinstance(dy, Quantized)
    assert isinstance(x, Quantized)
    if counts is None:
        return _scaled((dy.values.mT @ x.values).to(dtype), _transposed(dy.scale), x.scale)
    if dy.ends is not None:
        counts = torch.diff(dy.ends, prepend=dy.ends.new_zeros(1))
    dw = grouped_wgrad(dy.values, x.values, counts, dtype, backend)
    by_expert = [s for s in (dy.scale, x.scale) if s is not None and s.dim() == 1]
    if len(by_expert) == 2:  # one number for each expert, multiplied first as a single layer's are
        return dw.mul_((by_expert[0] * by_expert[1])[:, None, None])
    return _scaled(dw, _transposed(_widened(dy.scale)), _widened(x.scale))


def _check_by_expert(backend: str) -> None:
    if backend not in ("auto", "loop"):
        raise ValueError(
            "the precision's backend 'hardware' multiplies expert by expert: set the experts' "
            f"backend to 'auto' or 'loop', got {backend!r}"
        )


def _widened(scale: Tensor | None) -> Tensor | None:
    return scale[:, None, None] if scale is not None and scale.dim() == 1 else scale


def _transposed(scale: Tensor | None) -> Tensor | None:
    return scale.mT if scale is not None and scale.dim() >= 2 else scale


def _scaled(y: Tensor, *scales: Tensor | None) -> Tensor:
    """The epilogue, in place: the float32 scales that the decoded operands were left without."""
    given = [scale for scale in scales if scale is not None]
    if len(given) == 2 and given[0].dim() == given[1].dim() == 0:
        return y.mul_(given[0] * given[1])
    for scale in given:
        y = y.mul_(scale)
    return y


def _scaled_rows(y: Tensor, x: Tensor | None, w: Tensor | None, counts: Tensor) -> Tensor:
    """The epilogue for rows sorted by expert, in place.

    y: [N, F]; x: [E], [N, 1] or None; w: [E], [E, 1, F] or None; counts: [E].
    """
    by_expert = [s for s in (x, w) if s is not None and s.dim() == 1]
    if by_expert:
        y = scale_rows_(y, by_expert[0] if len(by_expert) == 1 else x * w, counts)  # pyright: ignore
    if x is not None and x.dim() == 2:
        y = y.mul_(x)
    if w is not None and w.dim() == 3:
        y = y.mul_(w[:, 0][expert_of_rows(counts, y.shape[0])])
    return y
