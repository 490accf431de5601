"""What the leaves compute: three matmuls of six quantised operands, or a look-up of rows.

Every variant reaches a number format through `linear`, `expert_linear` or `lookup`, and through
nothing else.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.grouped import grouped_linear
from layers.packing.products import packed_fprop, packed_rows, usable
from layers.packing.weight import Packed, PackedWeight
from layers.precision.coded import Coded, encode
from layers.precision.hadamard import signs_of, unrotate
from layers.precision.leaf import Leaf
from layers.precision.operands import OPERANDS, LeafPrecision
from layers.precision.quantize import Quantized, quantize, unclipped
from layers.products import dgrad, fprop, wgrad
from layers.sparse_rows import bag, gather

PACKED = (Packed, PackedWeight)
Weight = Tensor | Packed | PackedWeight


def linear(
    x: Tensor, w: Weight, bias: Tensor | None, leaf: Leaf, expert: int | None = None
) -> Tensor:
    """x: [..., in]; w: [out, in]; bias: [out]. Returns [..., out].

    leaf: whose precision holds; expert: whose scales, where the leaf has some for each expert.
    """
    p = leaf.precision
    dtype = x.dtype if p is None else p.dtype
    bias = None if bias is None else bias.to(dtype)
    if isinstance(w, PACKED):
        y = _packed(x.flatten(0, -2), w, None, leaf, expert).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias
    if p is None or p.is_cast:
        return F.linear(x.to(dtype), w.to(dtype), bias)
    y = _quantized(x.flatten(0, -2), w, None, p, leaf, expert).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def expert_linear(
    x: Tensor, w: Weight, counts: Tensor, leaf: Leaf, backend: str = "auto"
) -> Tensor:
    """x: [N, in], rows sorted by expert; w: [E, out, in]; counts: [E]. Returns [N, out].

    No block and no scale mixes two experts. backend: how the three products run, a row of
    `layers.grouped.BACKENDS`; operands are quantised before, alike for all.
    """
    if isinstance(w, PACKED):
        return _packed(x, w, counts, leaf, backend=backend)
    p = leaf.precision
    if p is None or p.is_cast:
        dtype = x.dtype if p is None else p.dtype
        return grouped_linear(x.to(dtype), w, counts, backend)
    return _quantized(x, w, counts, p, leaf, backend=backend)


def lookup(
    table: Weight, ids: Tensor, weights: Tensor, leaf: Leaf, *, sparse: bool = False
) -> Tensor:
    """table: [M, D]; ids: [T, K] int64; weights: [T, K]. Returns sum_k weights * rows, [T, D].

    Rows are quantised after the gather and each by itself, which equals gathering from a quantised
    table and costs only the rows touched (precision.md section 10).

    sparse: the table's gradient holds only the rows that were read (`layers.sparse_rows`).
    """
    p = leaf.precision
    if isinstance(table, PACKED):
        packed = usable(table, weights, leaf, as_rows=True)
        assert p is not None
        rows = packed_rows(packed, ids.flatten(), p)
        return torch.einsum("tk,tkd->td", weights.to(p.dtype), rows.unflatten(0, ids.shape))
    if p is None or p.fprop_w.is_high:
        rows = table if p is None else table.float()
        y = bag(rows, ids, weights.to(rows), sparse=sparse)
        return y if p is None else y.to(p.dtype)
    rows = gather(table, ids.flatten()) if sparse else F.embedding(ids, table).flatten(0, 1)
    rows = _QuantizedRows.apply(rows, *_state(leaf, None), p, leaf.observer)
    return torch.einsum("tk,tkd->td", weights.to(p.dtype), rows.unflatten(0, ids.shape))


class _State(NamedTuple):
    """The buffers of a leaf that quantisers read, and the peaks that they raise."""

    key: Tensor | None
    scales: Tensor | None
    peaks: Tensor | None


def _state(leaf: Leaf, expert: int | None) -> _State:
    """An evaluation raises no peaks: they are of training alone."""
    scales, peaks = leaf.operand_scales, leaf.operand_peaks
    if not leaf.training:
        peaks = None
    if expert is not None:
        scales, peaks = (None if t is None else t[:, expert] for t in (scales, peaks))
    return _State(leaf.rounding_key, scales, peaks)


def _quantized(
    x: Tensor, w: Tensor, counts: Tensor | None, p: LeafPrecision, leaf: Leaf,
    expert: int | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    y = _QuantizedMatmul.apply(x, w, counts, *_state(leaf, expert), p, leaf.observer, backend)
    assert isinstance(y, Tensor)
    return y


def _packed(
    x: Tensor, w: Packed | PackedWeight, counts: Tensor | None, leaf: Leaf,
    expert: int | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    packed, p = usable(w, x, leaf, as_rows=False), leaf.precision
    assert p is not None
    ends = None if counts is None else counts.cumsum(0)
    q = _Operands(p, _state(leaf, expert), leaf.observer, ends)
    xq = q("fprop_x", x, -1)
    if isinstance(xq, Coded):
        raise ValueError("packed weights have no backend 'hardware': set it to 'emulated'")
    return packed_fprop(xq, packed, counts, p.product_dtype("fprop"), backend).to(p.dtype)


class _Operands:
    """The quantisers of one leaf at one call."""

    def __init__(
        self, p: LeafPrecision, state: _State, observer: Callable[..., None] | None,
        ends: Tensor | None,
    ):  # fmt: skip
        self.p, self.state, self.observer, self.ends = p, state, observer, ends

    def __call__(self, name: str, t: Tensor, axis: int) -> Quantized | Coded:
        """Operand `name` of its matmul, written along `axis`. t: [R, C] or [E, R, C]."""
        number, spec = OPERANDS.index(name), getattr(self.p, name)
        dtype = self.p.product_dtype(name.split("_")[0])
        given = self.given(name, t)
        if self.observer is not None:
            self.observer(name, t, spec, axis, given)
        if spec.scope == "delayed" and self.state.peaks is not None:
            _raise_peak(self.state.peaks[number], t, given["ends"])
        if self.p.backend == "hardware" and not spec.is_high:
            return encode(t, spec, axis=axis, dtype=dtype, operand=number, **given)
        return quantize(t, spec, axis=axis, dtype=dtype, operand=number, **given)

    def given(self, name: str, t: Tensor) -> dict[str, Any]:
        """What `quantize` needs from the leaf: segments, random stream, scale."""
        weight = name.endswith("_w")
        key, scales = self.state.key, self.state.scales
        return {
            "ends": self.ends if t.dim() == 2 and not weight else None,
            "key": None if key is None else key[0 if weight else 1],
            "scale": None if scales is None else scales[OPERANDS.index(name)],
        }

    def signs(self, gemm: str, device: torch.device) -> tuple[int, Tensor]:
        """Width and signs of a matmul's rotation. Both operands share them."""
        first = OPERANDS.index(f"{gemm}_x" if gemm == "fprop" else f"{gemm}_dy")
        spec = getattr(self.p, OPERANDS[first])
        key = None if self.state.key is None else self.state.key[0]
        return spec.hadamard, signs_of(spec.hadamard, spec.signs, key, first // 2, device)


@torch.no_grad()
def _raise_peak(peak: Tensor, t: Tensor, ends: Tensor | None) -> None:
    """Raise a largest magnitude in place; raising it twice changes nothing.

    peak: [] or [E]; t: [R, C], its segments' ends, or [E, R, C].
    """
    if not t.numel():
        return
    if t.dim() == 3:
        found = t.abs().amax((-2, -1))
    elif ends is not None:
        rows = torch.arange(t.shape[0], device=t.device)
        segment = torch.searchsorted(ends, rows, right=True).clamp(max=ends.shape[0] - 1)
        rows_peak = t.abs().amax(-1).float()
        found = torch.zeros_like(peak).scatter_reduce(0, segment, rows_peak, "amax")
    else:
        found = t.abs().amax()
    peak.copy_(torch.maximum(peak, found))


class _QuantizedMatmul(torch.autograd.Function):
    """Three matmuls, each of two operands quantised along the axis that it sums over.

    With counts: for each expert, rows sorted by expert.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, counts: Tensor | None, key: Tensor | None,
        scales: Tensor | None, peaks: Tensor | None, p: LeafPrecision,
        observer: Callable[..., None] | None, backend: str,
    ) -> Tensor:  # fmt: skip
        ends = None if counts is None else counts.cumsum(0)
        ctx.p, ctx.observer, ctx.backend = p, observer, backend
        q = _Operands(p, _State(key, scales, peaks), observer, ends)
        xq, wq = q("fprop_x", x, -1), q("fprop_w", w, -1)
        kept = (x, w) if p.saved == "original" else (_folded(xq), _folded(wq))
        masks = (None, None)
        if p.straight_through == "unclipped":
            masks = tuple(unclipped(t, getattr(p, name), axis=-1, operand=OPERANDS.index(name),
                                    **q.given(name, t))
                          for name, t in (("fprop_x", x), ("fprop_w", w)))  # fmt: skip
        ctx.save_for_backward(*kept, *masks, counts, ends, key, scales)
        ctx.peaks = peaks  # raised in place by every call, so no version of it is kept
        ctx.dtypes, ctx.width = (x.dtype, w.dtype), x.shape[-1]
        return fprop(xq, wq, counts, backend).to(p.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # the decorator hides ctx
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, w, x_mask, w_mask, counts, ends, key, scales = ctx.saved_tensors
        p, dy = ctx.p, grads[0].contiguous()
        q = _Operands(p, _State(key, scales, ctx.peaks), ctx.observer, ends)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = dgrad(q("dgrad_dy", dy, -1), q("dgrad_w", w, -2), counts, ctx.backend)
            dx = _back(dx, x_mask, q, ctx.width).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dyq, xq = q("wgrad_dy", dy, -2), q("wgrad_x", x, -2)
            if ctx.backend == "capacity" and counts is not None:
                shape = counts.shape[0], dy.shape[0] // counts.shape[0]
                dyq, xq = (_even(t, *shape, p.wgrad_dy.hadamard) for t in (dyq, xq))
            dw = wgrad(dyq, xq, counts, ctx.dtypes[1], ctx.backend)
            dw = _back(dw, w_mask, q, ctx.width)
        return dx, dw, *[None] * 7


def _even(q: Quantized | Coded, n_experts: int, each: int, tile: int) -> Quantized | Coded:
    """Rows of equally many for every expert, where a rotation rounded each up to whole tiles.

    It leaves zero rows behind the last, as many as rows that are split unevenly would need.
    """
    if isinstance(q, Coded) or q.ends is None:
        return q
    return q._replace(values=q.values[: n_experts * -(-each // tile) * tile])


def _folded(q: Quantized | Coded) -> Tensor:
    """The values with their scale, in the dtype that holds them."""
    assert isinstance(q, Quantized)  # check_hardware asks for saved "original"
    if q.scale is None:
        return q.values
    scale = q.scale
    if scale.dim() == 1 and q.values.dim() == 3:
        scale = scale[:, None, None]
    elif scale.dim() == 1:
        raise ValueError("saved 'quantized' takes no format with a scale by tensor for experts")
    return q.values.float() * scale


def _back(grad: Tensor, mask: Tensor | None, q: _Operands, width: int) -> Tensor:
    """The gradient of what the forward quantised, masked, rotated back where that was rotated.

    grad: [..., K'] in the rotated space only where the rotated operands were saved.
    """
    grad = grad if mask is None else grad * mask
    if q.p.saved == "quantized" and q.p.fprop_x.hadamard:
        d, signs = q.signs("fprop", grad.device)
        return unrotate(grad.float(), d, signs, width).to(grad.dtype)
    return grad


class _QuantizedRows(torch.autograd.Function):
    """Rows of a table, each with scales of its own; the gradient passes straight through."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, key: Tensor | None, scales: Tensor | None, peaks: Tensor | None,
        p: LeafPrecision, observer: Callable[..., None] | None,
    ) -> Tensor:  # fmt: skip
        ctx.dtype = rows.dtype
        number, spec = OPERANDS.index("fprop_w"), p.row_spec
        ends = torch.arange(1, rows.shape[0] + 1, device=rows.device)
        given = {
            "ends": ends,
            "key": None if key is None else key[0],
            "scale": None if scales is None else scales[number],
        }
        if peaks is not None and spec.scope == "delayed":
            _raise_peak(peaks[number], rows, None)
        if observer is not None:
            observer("fprop_w", rows, spec, -1, given)
        values, scale, _ = quantize(
            rows, spec, axis=-1, dtype=p.product_dtype("fprop"), operand=number, **given
        )
        values = values if scale is None else values * scale.reshape(-1, 1)
        return values.to(p.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].to(ctx.dtype), *[None] * 5
