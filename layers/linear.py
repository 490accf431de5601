"""The leaves: the only matmuls and look-ups that a precision policy applies to."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.grouped import (
    grouped_linear,
    grouped_mm,
    grouped_mm_dx,
    grouped_wgrad,
    scale_rows_,
)
from layers.names import check_positive
from layers.precision.formats import quantize
from layers.precision.leaf import Leaf
from layers.precision.policy import LeafPrecision


class Linear(Leaf):
    """y = x w^T (+ bias), every operand in the format that the policy gives its role.

    Weight [out, in], normal(0, 1 / sqrt(in)); bias [out], zero, only where asked for.
    """

    def __init__(self, d_in: int, d_out: int, *, role: str, bias: bool = False):
        super().__init__()
        check_positive(d_in=d_in, d_out=d_out)
        self.role = role
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=fan_in_std(self.weight))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out], in the policy's compute dtype (else the input's)."""
        return linear(x, self.weight, self.bias, self.precision)

    def extra_repr(self) -> str:
        d_out, d_in = self.weight.shape
        return f"{d_in}, {d_out}, role={self.role!r}"


class ExpertLinear(Leaf):
    """y_n = x_n w_e^T for each row n of expert e. Weight [E, out, in], as `Linear`'s."""

    def __init__(self, n_experts: int, d_in: int, d_out: int, *, role: str):
        super().__init__()
        check_positive(n_experts=n_experts, d_in=d_in, d_out=d_out)
        self.role = role
        self.weight = nn.Parameter(torch.empty(n_experts, d_out, d_in))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=fan_in_std(self.weight))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x: [N, in], rows sorted by expert; counts: [E] int64, rows of each. Returns [N, out]."""
        return expert_linear(x, self.weight, counts, self.precision)

    def extra_repr(self) -> str:
        n_experts, d_out, d_in = self.weight.shape
        return f"{n_experts}, {d_in}, {d_out}, role={self.role!r}"


class ValueTable(Leaf):
    """y_t = sum over k of weights[t, k] * weight[ids[t, k]]. Weight [M, D], normal(0, 1 / sqrt(D)).

    A low format is applied after the gather and row by row, which equals gathering from a quantised
    table and costs only the rows touched (precision.md section 10).
    """

    def __init__(self, n_rows: int, d_out: int, *, role: str):
        super().__init__()
        check_positive(n_rows=n_rows, d_out=d_out)
        self.role = role
        self.weight = nn.Parameter(torch.empty(n_rows, d_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.normal_(self.weight, std=fan_in_std(self.weight))

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        """ids: [T, K] int64; weights: [T, K]. Returns [T, D]."""
        p = self.precision
        if p is None or p.fprop_w.is_high:
            table = self.weight if p is None else self.weight.float()
            y = F.embedding_bag(ids, table, per_sample_weights=weights.to(table), mode="sum")
            return y if p is None else y.to(p.dtype)
        rows = _QuantizedRows.apply(F.embedding(ids, self.weight).flatten(0, 1), p)
        return torch.einsum("tk,tkd->td", weights.to(p.dtype), rows.unflatten(0, ids.shape))

    def extra_repr(self) -> str:
        n_rows, d_out = self.weight.shape
        return f"{n_rows}, {d_out}, role={self.role!r}"


def fan_in_std(weight: Tensor) -> float:
    """1 / sqrt(in): outputs start with the variance of their inputs, whatever the width.

    The papers' fixed 0.02 is this at a width of 2500; at the widths of a laptop it starts every
    FFN near zero. One rule for every variant, each factor by its own fan-in (comparison.md 3).
    """
    return weight.shape[-1] ** -0.5


def linear(x: Tensor, w: Tensor, bias: Tensor | None, p: LeafPrecision | None) -> Tensor:
    """x: [..., in]; w: [out, in]; bias: [out]. Returns [..., out]."""
    dtype = x.dtype if p is None else p.dtype
    bias = None if bias is None else bias.to(dtype)
    if p is None or p.is_cast:
        return F.linear(x.to(dtype), w.to(dtype), bias)
    y = _QuantizedLinear.apply(x.flatten(0, -2), w, p).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def expert_linear(x: Tensor, w: Tensor, counts: Tensor, p: LeafPrecision | None) -> Tensor:
    """x: [N, in], rows sorted by expert; w: [E, out, in]; counts: [E]. Returns [N, out]."""
    if p is None or p.is_cast:
        dtype = x.dtype if p is None else p.dtype
        return grouped_linear(x.to(dtype), w, counts)
    return _QuantizedExperts.apply(x, w, counts, p)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The product of two tensor scales, either of which a format may not have."""
    return b if a is None else a if b is None else a * b


def _scaled(y: Tensor, scale: Tensor | None) -> Tensor:
    """The epilogue, in place: the tensor scales that the decoded operands were left without."""
    return y if scale is None else y.mul_(scale)


class _QuantizedLinear(torch.autograd.Function):
    """Three matmuls, each of two operands quantised along the axis that it sums over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, p: LeafPrecision) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.p = p
        xq, xs = quantize(x, p.fprop_x, axis=-1, dtype=p.dtype)
        wq, ws = quantize(w, p.fprop_w, axis=-1, dtype=p.dtype)
        return _scaled(xq @ wq.T, _product(xs, ws))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, w = ctx.saved_tensors
        p, dy = ctx.p, dy.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dyq, dys = quantize(dy, p.dgrad_dy, axis=-1, dtype=p.dtype)
            wq, ws = quantize(w, p.dgrad_w, axis=-2, dtype=p.dtype)
            dx = _scaled(dyq @ wq, _product(dys, ws)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dyq, dys = quantize(dy, p.wgrad_dy, axis=-2, dtype=p.dtype)
            xq, xs = quantize(x, p.wgrad_x, axis=-2, dtype=p.dtype)
            dw = _scaled((dyq.T @ xq).to(w.dtype), _product(dys, xs))
        return dx, dw, None


class _QuantizedExperts(torch.autograd.Function):
    """As `_QuantizedLinear` for each expert: no block and no tensor scale mixes two of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, counts: Tensor, p: LeafPrecision) -> Tensor:
        ends = counts.cumsum(0)
        ctx.save_for_backward(x, w, counts, ends)
        ctx.p = p
        xq, xs = quantize(x, p.fprop_x, axis=-1, dtype=p.dtype, ends=ends)
        wq, ws = quantize(w, p.fprop_w, axis=-1, dtype=p.dtype)
        return _scaled_rows(grouped_mm(xq, wq, counts), _product(xs, ws), counts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, w, counts, ends = ctx.saved_tensors
        p, dy = ctx.p, dy.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dyq, dys = quantize(dy, p.dgrad_dy, axis=-1, dtype=p.dtype, ends=ends)
            wq, ws = quantize(w, p.dgrad_w, axis=-2, dtype=p.dtype)
            dx = _scaled_rows(grouped_mm_dx(dyq, wq, counts), _product(dys, ws), counts)
            dx = dx.to(x.dtype)
        if ctx.needs_input_grad[1]:
            dyq, dys = quantize(dy, p.wgrad_dy, axis=-2, dtype=p.dtype, ends=ends)
            xq, xs = quantize(x, p.wgrad_x, axis=-2, dtype=p.dtype, ends=ends)
            scale = _product(dys, xs)
            scale = None if scale is None else scale[:, None, None]
            dw = _scaled(grouped_wgrad(dyq, xq, counts, w.dtype), scale)
        return dx, dw, None, None


def _scaled_rows(y: Tensor, scale: Tensor | None, counts: Tensor) -> Tensor:
    """The epilogue with one scale per expert, in place. y: [N, F]; scale, counts: [E]."""
    return y if scale is None else scale_rows_(y, scale, counts)


class _QuantizedRows(torch.autograd.Function):
    """Rows of a table, each with scales of its own; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, p: LeafPrecision) -> Tensor:
        ctx.dtype = rows.dtype
        ends = torch.arange(1, rows.shape[0] + 1, device=rows.device)
        values, scale = quantize(rows, p.fprop_w, axis=-1, dtype=p.dtype, ends=ends)
        return values if scale is None else values * scale[:, None].to(p.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return grad.to(ctx.dtype), None
