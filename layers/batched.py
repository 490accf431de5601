"""Products over rows sorted by expert as one batched matmul: a matrix for each row, or padded.

"Gathered" copies each row's matrix and multiplies all rows at once: for a handful of rows, where
the calls of a loop would cost more than the copies. "Padded" reads the rows as [E, C, K], the same
number C for every expert: nothing depends on the data, so it compiles whole. Neither reads a
count on the host. As in `layers.grouped`: N rows, E experts, counts [E] int64.
"""

import torch
from torch import Tensor


def expert_of_rows(counts: Tensor, n_rows: int) -> Tensor:
    """The expert of each row, without a host read; E - 1 for rows past the last. Returns [N]."""
    rows = torch.arange(n_rows, device=counts.device)
    return torch.searchsorted(counts.cumsum(0), rows, right=True).clamp_(max=counts.shape[0] - 1)


def gathered_mm(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """`y[n] = w[e(n)] @ x[n]`. x: [N, K]; w: [E, O, K]. Returns [N, O] in x's dtype."""
    return torch.bmm(_matrices(x, w, counts), x.unsqueeze(-1)).squeeze(-1)


def gathered_mm_dx(dy: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """`dx[n] = w[e(n)]^T @ dy[n]`. dy: [N, O]; w: [E, O, K]. Returns [N, K] in dy's dtype."""
    return torch.bmm(dy.unsqueeze(1), _matrices(dy, w, counts)).squeeze(1)


def _matrices(rows: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    return w.index_select(0, expert_of_rows(counts, rows.shape[0])).to(rows.dtype)


def gathered_wgrad(dy: Tensor, x: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """`dw[e] = sum of dy[n] x[n]^T` over its rows, in their order; rows past the last add nothing.

    dy: [N, O]; x: [N, K]. Returns [E, O, K], summed in float32 at least.
    """
    n_experts, shape = counts.shape[0], (dy.shape[1], x.shape[1])
    wide = torch.promote_types(dtype, torch.float32)
    outer = torch.bmm(dy.unsqueeze(-1).to(wide), x.unsqueeze(1).to(wide))
    held = torch.arange(x.shape[0], device=x.device) < counts.sum()
    ids = expert_of_rows(counts, x.shape[0]).masked_fill(~held, n_experts)
    # the gradient of an embedding: adds rows up by id, and repeats its bits on a GPU too
    dw = torch.ops.aten.embedding_dense_backward(
        outer.flatten(1), ids, n_experts + 1, n_experts, False
    )
    return dw[:n_experts].view(n_experts, *shape).to(dtype)


def padded_mm(x: Tensor, w: Tensor) -> Tensor:
    """`y[e, c] = w[e] @ x[e, c]`. x: [E * C, K]; w: [E, O, K]. Returns [E * C, O]."""
    return torch.bmm(x.unflatten(0, (w.shape[0], -1)), w.to(x.dtype).mT).flatten(0, 1)


def padded_wgrad(dy: Tensor, x: Tensor, n_experts: int, dtype: torch.dtype) -> Tensor:
    """`dw[e] = sum over c of dy[e, c] x[e, c]^T`. dy: [E * C, O]; x: [E * C, K]."""
    dy, x = dy.unflatten(0, (n_experts, -1)), x.unflatten(0, (n_experts, -1))
    return torch.bmm(dy.mT, x).to(dtype)
