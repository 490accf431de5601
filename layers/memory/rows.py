"""Products of a token with rows gathered for it: <table[ids], x>, the incoming half of a neuron.

A weighted bag y = sum_k w_k table[ids_k] has <table[ids_k], dy> as the gradient of w_k and w_k dy
as that of the row, so the products and their weight gradient are a bag's two gradients
(`layers.row_dots`), and the rows [T, K, D] are never written.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.linear import ValueTable
from layers.matmul import lookup
from layers.sparse_rows import table_gradient


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
        if ctx.needs_input_grad[0]:
            x_ = x.to(table.dtype)
            dtable = table_gradient(ids, g, x_, table.shape[0], sparse=ctx.sparse)
        if ctx.needs_input_grad[2]:
            dx = F.embedding_bag(ids, table, per_sample_weights=g, mode="sum").to(x.dtype)
        return dtable, None, dx, None
