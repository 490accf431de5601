"""Tucker-decomposed query-key retrieval, TDQKR (UltraMem, arXiv:2411.12364; memory.md 5.3, 6.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, WeightCost
from layers.memory.losses import key_balance
from layers.memory.norms import make_norm, norm_cost
from layers.memory.retriever import Hits, check_top_k
from layers.memory.selection import top_ids
from layers.names import check_choice, check_positive

QUERIES = ("shared", "per_rank")
SEARCHES = ("positive", "signed")


@dataclass(frozen=True, kw_only=True)
class TuckerKeysConfig:
    """Sizes and options of Tucker-decomposed keys."""

    heads: int
    n_keys: int  # a side; n_keys^2 slots
    d_key: int  # of one side and rank
    top_k: int  # slots that a head keeps: m
    sub_top_k: int | None = None  # keys of a side that a head looks at, m_sub; None: top_k
    rank: int = 2  # r
    n_cores: int = 2  # c, scores of a slot
    query: str = "per_rank"  # "shared": one query a side for all ranks (UltraMem)
    search: str = "positive"  # "signed" looks at the keys of lowest projections too

    def __post_init__(self) -> None:
        check_positive(heads=self.heads, d_key=self.d_key, rank=self.rank, n_cores=self.n_cores)
        check_top_k(self.n_keys, self.top_k, self.looks_at)
        check_choice("query", self.query, QUERIES)
        check_choice("search", self.search, SEARCHES)

    @property
    def looks_at(self) -> int:
        """`sub_top_k`, with the default filled in."""
        return self.top_k if self.sub_top_k is None else self.sub_top_k

    @property
    def queries(self) -> int:
        """Query vectors a token, shared by the heads: sides, times ranks where each has its own."""
        return 2 * (self.rank if self.query == "per_rank" else 1)

    @property
    def n_slots(self) -> int:
        """Pairs of keys."""
        return self.n_keys**2

    @property
    def cores(self) -> int:
        """Scores of a hit."""
        return self.n_cores

    @property
    def hits(self) -> int:
        """Slots that a token reads, over all heads."""
        return self.heads * self.top_k

    def cost(self) -> Cost:
        """One token's cost."""
        n = 2 * self.rank * self.heads * self.n_keys * self.d_key
        blocks = 2 if self.search == "signed" else 1
        choose = 2 * self.n_keys * (self.rank + 1)
        rescore = 2 * self.rank * blocks * self.looks_at**2
        kept = 4 * self.n_cores * self.rank**2 * self.top_k
        weight = WeightCost(
            name="weight", role="product_keys", params=n, flops=2 * n,
            other_flops=float(self.heads * choose), bits=32,
        )  # fmt: skip
        cores = WeightCost(
            name="cores", role="product_keys", params=self.n_cores * self.heads * self.rank**2,
            other_flops=float(self.heads * (rescore + kept)), bits=32,
        )  # fmt: skip
        norm = norm_cost("rms", self.d_key, 2 * self.rank * self.heads * self.n_keys)
        return Cost((weight, cores)) + norm.within("norm.")


class TuckerKeys(nn.Module):
    """Slots (i, j) of large G_ij = S_row[:, i]^T C S_col[:, j], C the sum of c cores.

    S_row[a, i] = <norm(K_row,a,i), q_row,a>, a = 1..r; S_col alike. First the m_sub best keys of
    either side by u^T S_row and t^T S_col, where u, t are the leading singular vectors of C; then
    the m best of their pairs by G; a kept slot has one score for each core.

    This is no exhaustive search: by (u, t) both projections are large and positive, and what is
    large by two negative ones is missed, about half on random data. search="signed" looks there
    too. u and t are a function of the cores alone, with the sign that makes their sum positive, so
    recomputing, resuming and every rank choose alike; the authors' code keeps them in a buffer
    whose first sign is the SVD library's.

    Weight [2, r, H, n, d_key], normal std 1 / sqrt(d_key), whose magnitude the norm takes off;
    cores [c, H, r, r], uniform(0, 1).
    """

    def __init__(self, config: TuckerKeysConfig):
        super().__init__()
        c = self.config = config
        self.weight = nn.Parameter(torch.empty(2, c.rank, c.heads, c.n_keys, c.d_key))
        self.cores = nn.Parameter(torch.empty(c.n_cores, c.heads, c.rank, c.rank))
        norm = make_norm("rms", c.d_key, 1)
        assert norm is not None
        self.norm = norm
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw keys and cores anew; the norm's gain is the row's to set."""
        nn.init.normal_(self.weight, std=self.config.d_key**-0.5)
        nn.init.uniform_(self.cores)

    def forward(self, queries: Tensor) -> Hits:
        """queries: [T, 2 r, d_key], the ranks of a side beside one another; or [T, 2, d_key]."""
        rows, cols = self._projections(queries)
        with torch.no_grad():
            found = self._looked_at(*self._along(rows, cols))
        return self._kept(rows, cols, found)

    def balanced(
        self, queries: Tensor, form: str, mask: Tensor | None = None
    ) -> tuple[Hits, Tensor]:
        """As `forward`, and the balance loss of the keys that were looked at, both sides' added up.

        queries: as in `forward`; form, mask [T]: as in `layers.memory.losses.key_balance`.
        """
        rows, cols = self._projections(queries)
        along = self._along(rows, cols)
        found = self._looked_at(*along)
        sides = zip(along, found[0], strict=True)
        loss = torch.stack([key_balance(side, ids, form, mask) for side, ids in sides]).sum()
        return self._kept(rows, cols, found), loss

    @torch.no_grad()
    def exhaustive(self, queries: Tensor) -> Tensor:
        """The slots of largest G over all n^2 pairs, [T, H, K]: what a perfect search would find.

        queries: as in `forward`. Makes H n^2 numbers a token, so it is for a few tokens.
        """
        c = self.config
        rows, cols = self._projections(queries)
        every = torch.arange(c.n_keys, device=queries.device).expand(*rows[0].shape)
        g = outer_scores(self.cores.sum(0).to(queries.dtype), rows, cols, every, every)
        return top_ids(g.flatten(-2), c.top_k)

    def _projections(self, queries: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """S_row and S_col, each as r tensors [T, H, n]."""
        c, t = self.config, queries.shape[0]
        keys = self.norm(self.weight.to(queries.dtype))
        keys = keys.reshape(queries.shape[1], -1, c.d_key)  # [2 r, H n, d_key] or [2, r H n, d_key]
        scores = torch.bmm(queries.transpose(0, 1), keys.mT)
        if c.query == "per_rank":
            scores = scores.view(2, c.rank, t, c.heads, c.n_keys)
        else:
            scores = scores.view(2, t, c.rank, c.heads, c.n_keys).transpose(1, 2)
        return scores[0].unbind(0), scores[1].unbind(0)

    def _along(self, rows: Sequence[Tensor], cols: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """u^T S_row and t^T S_col, [T, H, n] each, without gradients of u and t."""
        with torch.no_grad():
            u, t = leading_pair(self.cores.sum(0).to(rows[0].dtype))
        by_row, by_col = (
            sum((v[:, a, None] * side[a] for a in range(1, len(side))), start=v[:, :1] * side[0])
            for v, side in ((u, rows), (t, cols))
        )
        return by_row, by_col

    def _looked_at(self, by_row: Tensor, by_col: Tensor) -> list[list[Tensor]]:
        """The keys of either side whose pairs are scored, [T, H, m_sub]; signed: and the lowest."""
        k = self.config.looks_at
        found = [[top_ids(by_row, k), top_ids(by_col, k)]]
        if self.config.search == "signed":
            found.append([top_ids(-by_row, k), top_ids(-by_col, k)])
        return found

    def _kept(
        self, rows: Sequence[Tensor], cols: Sequence[Tensor], found: list[list[Tensor]]
    ) -> Hits:
        """The best pairs of the keys found, scored by each core."""
        with torch.no_grad():
            best_rows, best_cols = self._search(rows, cols, found)
        at_rows = [s.gather(-1, best_rows) for s in rows]
        at_cols = [s.gather(-1, best_cols) for s in cols]
        cores = self.cores.to(rows[0].dtype)
        scores = torch.stack([rescore(core, at_rows, at_cols) for core in cores], 1)
        return Hits(best_rows * self.config.n_keys + best_cols, scores)

    def _search(
        self, rows: Sequence[Tensor], cols: Sequence[Tensor], found: list[list[Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The keys of the chosen pairs, best first: [T, H, K] int64 each."""
        c = self.config
        core = self.cores.sum(0).to(rows[0].dtype)
        blocks = [outer_scores(core, rows, cols, *found[0])]
        if c.search == "signed":
            twice = [_among(new, old) for new, old in zip(found[1], found[0], strict=True)]
            twice = twice[0][..., :, None] & twice[1][..., None, :]
            block = outer_scores(core, rows, cols, *found[1])
            blocks.append(block.masked_fill(twice, -torch.inf))
        best = top_ids(torch.cat([b.flatten(-2) for b in blocks], -1), c.top_k)
        block, place = best // c.looks_at**2, best % c.looks_at**2
        row, col = place // c.looks_at, place % c.looks_at
        all_rows, all_cols = (torch.cat(side, -1) for side in zip(*found, strict=True))
        start = block * c.looks_at
        return all_rows.gather(-1, start + row), all_cols.gather(-1, start + col)


def leading_pair(core: Tensor) -> tuple[Tensor, Tensor]:
    """The leading singular vectors u, t of each core, sum(u) >= 0 (if 0: its first entry).

    core: [H, r, r], float32 or float64: there is no SVD in bfloat16. Returns [H, r] each.
    """
    left, _, right = torch.linalg.svd(core)
    u, t = left[..., 0], right[..., 0, :]
    total = u.sum(-1, keepdim=True)
    deciding = torch.where(total == 0, u[..., :1], total)
    sign = torch.where(deciding < 0, -1.0, 1.0).to(core.dtype)
    return u * sign, t * sign


def core_gap(core: Tensor) -> Tensor:
    """1 - lambda_2 / lambda_1 of each core: 1 where its leading vectors say all, 0 where they are
    no better than the next.

    core: [H, r, r]. Returns [H]; 1 for rank 1.
    """
    values = torch.linalg.svdvals(core)
    if values.shape[-1] == 1:
        return torch.ones_like(values[..., 0])
    return 1 - values[..., 1] / values[..., 0].clamp_min(torch.finfo(values.dtype).tiny)


def outer_scores(
    core: Tensor, rows: Sequence[Tensor], cols: Sequence[Tensor], row_ids: Tensor, col_ids: Tensor
) -> Tensor:
    """G of all pairs of the given keys. core: [H, r, r]; ids: [T, H, m]. Returns [T, H, m, m]."""
    left, right = [s.gather(-1, row_ids) for s in rows], [s.gather(-1, col_ids) for s in cols]
    g = left[0].new_zeros(())
    for b, col in enumerate(right):
        through = sum(core[:, a, b, None] * row for a, row in enumerate(left))
        g = torch.addcmul(g, through[..., :, None], col[..., None, :])  # type: ignore[index]
    return g


def rescore(core: Tensor, rows: Sequence[Tensor], cols: Sequence[Tensor]) -> Tensor:
    """sum over a, b of C_ab rows_a cols_b. core: [H, r, r]; rows, cols: r of [T, H, K]."""
    score = torch.zeros_like(rows[0])
    for a, row in enumerate(rows):
        for b, col in enumerate(cols):
            score = torch.addcmul(score, row * col, core[:, a, b, None])
    return score


def _among(new: Tensor, old: Tensor) -> Tensor:
    """[..., m] bool: which of `new` stand in `old`."""
    return (new[..., :, None] == old[..., None, :]).any(-1)
