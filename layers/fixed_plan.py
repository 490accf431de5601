"""A plan whose sizes do not depend on the data: rows may stand empty, and no host reads a count.

Two layouts. Sorted: all T * K assignments, those left out last, in rows that no expert multiplies.
Slots: C rows for every expert, filled from the front, so that the experts are one batched matmul
of [E, C, D] and a layer compiles whole. An empty row holds zeros, whatever stood there.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from layers.capacity import sort_groups


class FixedPlan(NamedTuple):
    """Where T * K assignments go among N rows. A row not filled, or a choice not held, is 0."""

    tokens: Tensor  # [N] int64, the token that each row holds
    order: Tensor  # [N] int64, the assignment t * K + k that each row holds
    filled: Tensor  # [N] bool
    places: Tensor  # [T, K] int64, the row of each assignment
    held: Tensor  # [T, K] bool
    counts: Tensor  # [E] int64, rows that each expert multiplies

    def spread(self, tokens: Tensor) -> Tensor:
        """One copy of a token for each of its rows. tokens: [T, D]. Returns [N, D]."""
        return _spread(tokens, self.tokens, self.filled, self.places, self.held)

    def collect(self, rows: Tensor) -> Tensor:
        """The sum of each token's rows. rows: [N, D]. Returns [T, D]."""
        moved = _Collect.apply(rows, self.tokens, self.filled, self.places, self.held)
        assert isinstance(moved, Tensor)
        return moved

    def of_rows(self, weights: Tensor) -> Tensor:
        """Each row's weight, 0 of an empty one, as a column. weights: [T, K]. Returns [N, 1]."""
        one = self.places.flatten()[:, None], self.held.flatten()[:, None]
        return _spread(weights.flatten()[:, None], self.order, self.filled, *one)

    def emptied(self, rows: Tensor) -> Tensor:
        """The rows with zeros, and gradients of zero, in those that hold nothing. rows: [N, D].

        What a product left there is unwritten memory, or a bias.
        """
        return rows.masked_fill(~self.filled[:, None], 0)


def sorted_plan(experts: Tensor, n_experts: int, keep: Tensor) -> FixedPlan:
    """All assignments sorted by expert, those not kept last.

    experts: [T, K] int64, of kept ones in [0, n_experts); keep: [T, K] bool. N = T * K.
    """
    ids = experts.masked_fill(~keep, n_experts).flatten()
    order, starts = sort_groups(ids, n_experts)
    rows = torch.arange(order.shape[0], device=order.device)
    places = torch.empty_like(order).scatter_(0, order, rows).view_as(experts)
    return FixedPlan(
        order // experts.shape[1], order, rows < starts[-1], places, keep, starts.diff()
    )


def slot_plan(
    experts: Tensor, n_experts: int, capacity: int, keep: Tensor | None = None
) -> FixedPlan:
    """C rows for each expert, filled in token order; a kept assignment beyond them has no row.

    experts, keep: as in `sorted_plan`, None keeps all; capacity: C. N = E * C.
    """
    ids = experts if keep is None else experts.masked_fill(~keep, n_experts)
    ids = ids.flatten()
    order, starts = sort_groups(ids, n_experts)
    arrival = torch.arange(order.shape[0], device=order.device)
    rank = torch.empty_like(order).scatter_(0, order, arrival - starts[ids[order]])
    held = (rank < capacity) & (ids < n_experts)
    places = torch.where(held, ids * capacity + rank, 0).view_as(experts)

    slot = torch.arange(capacity, device=order.device)  # [C]
    sources = (starts[:-1, None] + slot).clamp_(max=max(order.shape[0] - 1, 0)).flatten()
    filled = (slot < starts.diff()[:, None]).flatten()  # [E * C]
    rows = order[sources]
    counts = starts.new_full((n_experts,), capacity)
    return FixedPlan(rows // experts.shape[1], rows, filled, places, held.view_as(experts), counts)


def _gather(x: Tensor, index: Tensor, filled: Tensor) -> Tensor:
    return x.index_select(0, index).masked_fill_(~filled[:, None], 0)


def _add(rows: Tensor, places: Tensor, held: Tensor) -> Tensor:
    return _gather(rows, places.flatten(), held.flatten()).unflatten(0, places.shape).sum(1)


def _spread(x: Tensor, index: Tensor, filled: Tensor, places: Tensor, held: Tensor) -> Tensor:
    moved = _Spread.apply(x, index, filled, places, held)
    assert isinstance(moved, Tensor)
    return moved


class _Spread(torch.autograd.Function):
    """Copies to rows; its gradient adds them up, without atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *where: Tensor) -> Tensor:
        index, filled, places, held = where
        ctx.save_for_backward(places, held)
        return _gather(x, index, filled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _add(grads[0], *ctx.saved_tensors), None, None, None, None


class _Collect(torch.autograd.Function):
    """Adds rows up; its gradient copies to them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *where: Tensor) -> Tensor:
        index, filled, places, held = where
        ctx.save_for_backward(index, filled)
        return _add(rows, places, held)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grads[0], *ctx.saved_tensors), None, None, None, None
