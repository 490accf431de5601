"""Weighted bags of a table's rows, and its gradient as the rows that were read.

A bag y_t = sum_k w_tk V[i_tk] gives row r the gradient

    dV[r] = sum over the hits (t, k) of r of w_tk dy_t

which is a weighted bag itself: of dy, over the hits sorted by row. On a CPU it takes half the time
of the backward kernel of `embedding_bag` given as few rows, and nothing in it has M rows. The
gradient is a sparse COO tensor [M, D] whose rows ascend, each once; autograd adds two of them up
row by row, so tables read by several layers and gradients accumulated over micro-batches stay
compact (on a GPU it concatenates them, and `merged` puts them together).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import layers.row_dots  # noqa: F401 # registers the operators


def bag(table: Tensor, ids: Tensor, weights: Tensor, *, sparse: bool) -> Tensor:
    """sum over k of weights[t, k] * table[ids[t, k]], the table's gradient compact or dense.

    table: [M, D]; ids: [T, K] int64; weights: [T, K], the table's dtype. Returns [T, D].
    """
    if not torch.is_grad_enabled():
        return F.embedding_bag(ids, table, per_sample_weights=weights, mode="sum")
    y = _Bag.apply(table, ids, weights, sparse)
    assert isinstance(y, Tensor)
    return y


def gather(table: Tensor, ids: Tensor) -> Tensor:
    """table[ids], with a compact gradient. table: [M, D]; ids: [N] int64. Returns [N, D]."""
    rows = _Gather.apply(table, ids)
    assert isinstance(rows, Tensor)
    return rows


def table_gradient(
    ids: Tensor, weights: Tensor, dy: Tensor, n_rows: int, *, sparse: bool
) -> Tensor:
    """The gradient of a table of n_rows rows: of row r, the sum of weights[t, k] * dy[t]."""
    if sparse:
        return row_gradient(ids, weights, dy, n_rows)
    return torch.ops.moe_zoo.row_dots_wgrad(weights, ids, dy, n_rows)


def row_gradient(ids: Tensor, weights: Tensor | None, dy: Tensor, n_rows: int) -> Tensor:
    """`table_gradient` as a compact one.

    ids: [T, K] int64; weights: [T, K], None: 1; dy: [T, D], the dtype that is summed in. A hit
    that adds nothing, of weight zero or of a token without gradient (padding), touches no row.

    Returns:
        [n_rows, D] sparse COO, coalesced.
    """
    touching = (dy != 0).any(1)[:, None].expand(ids.shape)
    if weights is not None:
        touching = touching & (weights != 0)
    hits = touching.flatten().nonzero().squeeze(1)
    rows, order = ids.flatten()[hits].sort(stable=True)
    hits = hits[order]
    scale = None if weights is None else weights.flatten()[hits].to(dy.dtype)
    tokens = torch.div(hits, ids.shape[1], rounding_mode="floor") if ids.shape[1] > 1 else hits
    return _summed(rows, tokens, dy, scale, n_rows)


def merged(grad: Tensor) -> Tensor:
    """A sparse gradient [M, D] with each row once and ascending; itself where it is so already."""
    if grad.is_coalesced():
        return grad
    rows = grad._indices()[0]
    if bool((rows[1:] > rows[:-1]).all()):  # autograd forgets the mark when it hands a gradient on
        return grad._coalesced_(True)
    rows, order = rows.sort(stable=True)
    return _summed(rows, order, grad._values(), None, grad.shape[0])


def _summed(
    rows: Tensor, sources: Tensor, values: Tensor, scale: Tensor | None, n_rows: int
) -> Tensor:
    """The gradient whose row r is the sum of scale[i] * values[sources[i]] over rows[i] = r.

    rows: [N] ascending; sources, scale: [N]; values: [S, D].
    """
    is_first = torch.ones_like(rows, dtype=torch.bool)
    torch.ne(rows[1:], rows[:-1], out=is_first[1:])
    starts = is_first.nonzero().squeeze(1)
    found = rows[starts]
    if len(found):
        sums = F.embedding_bag(sources, values, starts, per_sample_weights=scale, mode="sum")
    else:
        sums = values.new_zeros(0, values.shape[1])
    shape = (n_rows, values.shape[1])
    return torch.sparse_coo_tensor(
        found[None], sums, shape, check_invariants=False, is_coalesced=True
    )


class _Bag(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, weights: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(table, ids, weights)
        ctx.sparse = sparse
        return F.embedding_bag(ids, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # the decorator hides ctx
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        table, ids, weights = ctx.saved_tensors
        dy = grads[0].contiguous()
        dtable = dweights = None
        if ctx.needs_input_grad[0]:
            n_rows = table.shape[0]
            dtable = (
                row_gradient(ids, weights, dy, n_rows)
                if ctx.sparse
                else torch.ops.moe_zoo.bag_dtable(weights, ids, dy, n_rows)
            )
        if ctx.needs_input_grad[2]:
            dweights = torch.ops.moe_zoo.bag_dweights(table, ids, dy)
        return dtable, None, dweights, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.n_rows, ctx.dtype = table.shape[0], table.dtype
        return F.embedding(ids, table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # the decorator hides ctx
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        dy = grads[0].to(ctx.dtype).contiguous()
        return row_gradient(ids[:, None], None, dy, ctx.n_rows), None
