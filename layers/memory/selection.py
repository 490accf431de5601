"""The k largest of rows of scores, best first; of equals, the lower index (memory.md 1, 10).

`torch.topk` promises no order among equals, so that two machines, or two batch sizes, may choose
differently. Here ties are looked for (one comparison of k numbers) and rows that have some are
sorted stably. On a CPU the search over product keys is one native call where that builds.
Nothing here is differentiable: whoever chose gathers the scores anew.
"""

import functools

import torch
from torch import Tensor

from layers.memory import native


def top_ids(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row. scores: [..., n]. Returns [..., k] int64."""
    return torch.ops.moe_zoo.top_ids(scores.detach(), None, k)


def product_top_k(rows: Tensor, cols: Tensor, k: int, sub_k: int, combine: str) -> Tensor:
    """The k slots of largest rows_i + cols_j among the sub_k best i and j, best first.

    Exact over all n^2 slots if sub_k >= k; of equal sums the lower slot is first.

    Args:
        rows, cols: [..., n] scores of either side.
        k: slots to keep.
        sub_k: keys of either side to keep, at most n; sub_k^2 >= k.
        combine: "pruned" looks at those pairs only that can be among the k best, "full" at all
            sub_k^2. The scores chosen are the same bit for bit.

    Returns:
        [..., k] int64, slot i * n + j.
    """
    return torch.ops.moe_zoo.product_top_k(rows.detach(), cols.detach(), k, sub_k, combine)


@functools.cache
def pairs(sub_k: int, k: int, combine: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Places (i, j) among sorted sides that may hold one of the k best sums (memory.md 1.2).

    Counted from 1, (i, j) is beaten or tied by the i j pairs before it on both sides, so it can be
    among the k best only if i j <= k.
    """
    every = [(i, j) for i in range(sub_k) for j in range(sub_k)]
    if combine == "pruned":
        every = [(i, j) for i, j in every if (i + 1) * (j + 1) <= k]
    return tuple(i for i, _ in every), tuple(j for _, j in every)


def _top_ids(scores: Tensor, rank: Tensor | None, k: int) -> Tensor:
    """As `top_ids`; of equals the one of lower rank, where ranks [..., n] are given."""
    shape, n = scores.shape, scores.shape[-1]
    scores = scores.reshape(-1, n)
    values, ids = scores.topk(min(k + 1, n), dim=-1)  # one more shows a tie at the cut
    tied = (values[:, 1:] == values[:, :-1]).any(-1).nonzero().squeeze(-1)
    ids = ids[:, :k].clone(memory_format=torch.contiguous_format)
    if tied.numel():
        some = scores[tied]
        if rank is None:
            order = torch.sort(some, dim=-1, descending=True, stable=True).indices
        else:
            by_rank = rank.reshape(-1, n)[tied].argsort(-1)
            order = torch.sort(some.gather(-1, by_rank), dim=-1, descending=True, stable=True)
            order = by_rank.gather(-1, order.indices)
        ids[tied] = order[:, :k]
    return ids.view(*shape[:-1], k)


def _product_top_k(rows: Tensor, cols: Tensor, k: int, sub_k: int, combine: str) -> Tensor:
    if native.wanted(rows):
        return native.product_top_k(rows, cols, k, sub_k, pairs(sub_k, k, combine))
    n = rows.shape[-1]
    best_rows, best_cols = _top_ids(rows, None, sub_k), _top_ids(cols, None, sub_k)
    i, j = (torch.tensor(p, device=rows.device) for p in pairs(sub_k, k, combine))
    sums = rows.gather(-1, best_rows)[..., i] + cols.gather(-1, best_cols)[..., j]
    slots = best_rows[..., i] * n + best_cols[..., j]
    return slots.gather(-1, _top_ids(sums, slots, k))


_library = torch.library.Library("moe_zoo", "FRAGMENT")
_library.define("top_ids(Tensor scores, Tensor? rank, int k) -> Tensor")
_library.define("product_top_k(Tensor rows, Tensor cols, int k, int sub_k, str combine) -> Tensor")
_library.impl("top_ids", _top_ids, "CompositeExplicitAutograd")
_library.impl("product_top_k", _product_top_k, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_zoo::top_ids", lib=_library)
def _(scores: Tensor, rank: Tensor | None, k: int) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)


@torch.library.register_fake("moe_zoo::product_top_k", lib=_library)
def _(rows: Tensor, cols: Tensor, k: int, sub_k: int, combine: str) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], k, dtype=torch.int64)
