"""Products of a token with rows gathered for it: <table[ids], x>, the incoming half of a neuron.

A weighted bag y = sum_k w_k table[ids_k] has <table[ids_k], dy> as the gradient of w_k and w_k dy
as that of the row, so the two backward kernels of `embedding_bag` are the product and its weight
gradient, and the rows [T, K, D] are never written: four times faster on a CPU than gathering them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from layers.linear import ValueTable
from layers.matmul import lookup
from layers.sparse_rows import row_gradient


class InputTable(ValueTable):
    """g_k = <weight[ids_k], x>: the incoming weights of neurons. Weight [M, D].

    A low format is that of the rows, each by itself, as in a `ValueTable`; x only casts: a gather
    is bound by reading rows, and a low x would save nothing.
    """

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """ids: [T, K] int64; x: [T, D]. Returns [T, K]."""
        p = self.precision
        table = self.weight
        if isinstance(table, Tensor) and (p is None or p.fprop_w.is_high):
            dots = _RowDots.apply(table if p is None else table.float(), ids, x, self.sparse)
            assert isinstance(dots, Tensor)
            return dots if p is None else dots.to(p.dtype)
        one = x.new_ones(ids.numel(), 1)
        rows = lookup(table, ids.reshape(-1, 1), one, self, sparse=self.sparse)
        rows = rows.unflatten(0, ids.shape)
        return torch.einsum("tkd,td->tk", rows, x.to(rows.dtype))


class _RowDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, x: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(table, ids, x)
        ctx.sparse = sparse
        return torch.ops.moe_zoo.row_dots(table, ids, x.to(table.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # the decorator hides ctx
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        table, ids, x = ctx.saved_tensors
        g = grads[0].contiguous()
        dtable = dx = None
        if ctx.needs_input_grad[0] and ctx.sparse:
            dtable = row_gradient(ids, g, x.to(table.dtype), table.shape[0])
        elif ctx.needs_input_grad[0]:
            wgrad = torch.ops.moe_zoo.row_dots_wgrad
            dtable = wgrad(g, ids, x.to(table.dtype), table.shape[0])
        if ctx.needs_input_grad[2]:
            dx = F.embedding_bag(ids, table, per_sample_weights=g, mode="sum").to(x.dtype)
        return dtable, None, dx, None


def _bags(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of T bags in one row; where each bag starts; the bag of each id."""
    t, k = ids.shape
    starts = torch.arange(0, t * k, k, device=ids.device)
    return ids.flatten(), starts, torch.arange(t, device=ids.device).repeat_interleave(k)


def _row_dots(table: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    if not ids.numel():
        return x.new_zeros(ids.shape)
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return backward(x.contiguous(), table, *_bags(ids), 0).view_as(ids)


def _row_dots_wgrad(g: Tensor, ids: Tensor, x: Tensor, n_rows: int) -> Tensor:
    if not ids.numel():
        return x.new_zeros(n_rows, x.shape[1])
    flat, starts, bag = _bags(ids)
    sizes, none = torch.full_like(starts, ids.shape[1]), ids.new_empty(0)
    return torch.ops.aten._embedding_bag_dense_backward(
        x.contiguous(), flat, bag, sizes, none, n_rows, False, 0, g.flatten().to(x.dtype)
    )


# Operators, so that `torch.compile` keeps them whole and `FlopCounterMode` counts them.

_library = torch.library.Library("moe_zoo", "FRAGMENT")
_library.define("row_dots(Tensor table, Tensor ids, Tensor x) -> Tensor")
_library.define("row_dots_wgrad(Tensor g, Tensor ids, Tensor x, int n_rows) -> Tensor")
_library.impl("row_dots", _row_dots, "CompositeExplicitAutograd")
_library.impl("row_dots_wgrad", _row_dots_wgrad, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_zoo::row_dots", lib=_library)
def _(table: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(ids.shape)


@torch.library.register_fake("moe_zoo::row_dots_wgrad", lib=_library)
def _(g: Tensor, ids: Tensor, x: Tensor, n_rows: int) -> Tensor:
    return x.new_empty(n_rows, x.shape[1])


@register_flop_formula([torch.ops.moe_zoo.row_dots])
def _row_dots_flops(table: torch.Size, ids: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * ids[0] * ids[1] * table[1]


@register_flop_formula([torch.ops.moe_zoo.row_dots_wgrad])
def _row_dots_wgrad_flops(g: torch.Size, ids: torch.Size, x: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * ids[0] * ids[1] * x[1]
