"""Which assignments fit when every expert takes only so many (moe.md 5).

The convention of a capacity factor: an expert takes C = ceil(factor * T K / E) of the T K
assignments of T real tokens (Megatron's). T counts a micro-batch, or each sequence by itself, and
a rule of priority says who stays:

    position  the first tokens, each with its choices in order (Switch, arXiv:2101.03961)
    choice    all first choices before all second ones (GShard, arXiv:2006.16668)
    batch     as choice, tokens by their largest weight (V-MoE's batch priority, arXiv:2106.05974)
    weight    the largest weights of each expert (Megatron's "probs")

Only "position" lets no token's place depend on later ones. A pool of the whole micro-batch lets a
sequence's places depend on its neighbours. What does not fit is dropped: it adds nothing, and the
weights of a token's other choices stay what they were.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.base import Routing
from layers.names import check_choice, check_positive
from layers.replay import decided

PRIORITIES = ("position", "choice", "batch", "weight")
POOLS = ("micro_batch", "sequence")
_A_BIT = 1e-9  # a product just above a whole number is that number


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How many assignments each expert takes, and which stay."""

    slots: tuple[float, ...]  # of each expert, per real token, before rounding up; inf: no limit
    pool: str  # what they are counted in, of `POOLS`
    priority: str  # of `PRIORITIES`

    def keep(
        self, routing: Routing, chosen: Tensor | None, mask: Tensor | None, n_sequences: int
    ) -> Tensor:
        """[T, K] bool, the choices that fit. chosen: [T, K], those that the router means of real
        tokens, None: all; mask: [T] bool, the real tokens; n_sequences: B.
        """
        return within_capacity(
            routing.experts,
            torch.tensor(self.slots, dtype=torch.float64, device=routing.experts.device),
            mask,
            chosen=chosen,
            priority=self.priority,
            weights=routing.weights,
            n_pools=self._pools(n_sequences),
        )

    def most_rows(self, n_experts: int, n_tokens: int, n_sequences: int) -> int:
        """What one of the first n_experts can keep of T tokens in B sequences, at most."""
        pools = self._pools(n_sequences)
        return pools * math.ceil(max(self.slots[:n_experts]) * (n_tokens // pools) - _A_BIT)

    def _pools(self, n_sequences: int) -> int:
        return max(n_sequences, 1) if self.pool == "sequence" else 1


def check_capacity(
    backend: str, pool: str, priority: str, factor: float | None, eval_factor: float | None
) -> None:
    """Raise unless a layer's options of capacity are possible together."""
    check_choice("capacity_pool", pool, POOLS)
    check_choice("priority", priority, PRIORITIES)
    for name, given in (("capacity_factor", factor), ("eval_capacity_factor", eval_factor)):
        if given is not None:
            check_positive(**{name: given})
        elif backend == "capacity":
            raise ValueError(
                "backend 'capacity' gives every expert equally many rows, so it needs a bound on "
                f"them in training and in evaluation: set {name} (n_experts / top_k drops "
                "nothing), or choose backend 'auto'"
            )


def is_causal(priority: str, factor: float | None, eval_factor: float | None) -> bool:
    """Whether no token's place among an expert's rows depends on later tokens."""
    return priority == "position" or (factor is None and eval_factor is None)


def within_capacity(
    experts: Tensor,
    slots: Tensor,
    mask: Tensor | None = None,
    *,
    chosen: Tensor | None = None,
    priority: str = "position",
    weights: Tensor | None = None,
    n_pools: int = 1,
) -> Tensor:
    """Keep the first ceil(slots_e * real tokens) assignments of each expert, in each pool.

    Args:
        experts: [T, K] int64, the chosen experts, a token's best choice first.
        slots: [E] float64, capacity per real token; inf for no limit.
        mask: [T] bool, True where a token is real; others keep nothing and take no slot.
        chosen: [T, K] bool, the choices that the router means; others take no slot; None: all.
        priority: a row of `PRIORITIES`.
        weights: [T, K], read by the priorities "batch" and "weight".
        n_pools: the T tokens are this many pools of equal size, one after another.

    Returns:
        [T, K] bool, True for what is kept.
    """
    (n_tokens, k), n_experts = experts.shape, slots.shape[0]
    size = n_tokens // n_pools
    takes = chosen
    if mask is not None:
        takes = mask[:, None] if chosen is None else chosen & mask[:, None]
    ids = experts if takes is None else experts.masked_fill(~takes, n_experts)
    pool = torch.arange(n_pools, device=ids.device)
    groups = (ids.reshape(n_pools, size * k) + (n_experts + 1) * pool[:, None]).flatten()  # [A]

    real = ids.new_full((n_pools,), size) if mask is None else mask.view(n_pools, size).sum(-1)
    capacity = (real[:, None] * slots - _A_BIT).ceil()
    capacity = torch.where(real[:, None] > 0, capacity, 0)  # inf * 0
    capacity = torch.cat([capacity, capacity.new_zeros(n_pools, 1)], dim=1).flatten()

    first = _in_order(priority, n_tokens, k, weights, ids.device)
    order, starts = sort_groups(groups if first is None else groups[first], capacity.shape[0])
    order = order if first is None else first[order]
    by_group = groups[order]
    rank = torch.arange(order.shape[0], device=order.device) - starts[by_group]
    kept = torch.empty_like(groups, dtype=torch.bool).scatter_(0, order, rank < capacity[by_group])
    return decided(kept.view_as(experts))


def _in_order(
    priority: str, n_tokens: int, k: int, weights: Tensor | None, device: torch.device
) -> Tensor | None:
    """Assignments t * K + k, those that come first in front; None: as they stand. [T * K]."""
    if priority == "position":
        return None
    if priority == "choice":
        return torch.arange(n_tokens * k, device=device).view(n_tokens, k).T.flatten()
    assert weights is not None
    weights = weights.detach()
    if priority == "weight":
        return weights.flatten().argsort(stable=True, descending=True)
    tokens = weights.amax(-1).argsort(stable=True, descending=True)
    return (tokens * k + torch.arange(k, device=device)[:, None]).flatten()


def sort_groups(groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """A stable sort of group numbers, in sizes that do not depend on the data.

    groups: [A] int64 in [0, n_groups). Returns the order [A], and where each group starts in it,
    [n_groups + 1] with A at the end.
    """
    order = groups.argsort(stable=True)
    ids = torch.arange(n_groups + 1, device=groups.device)
    return order, torch.searchsorted(groups[order], ids)
