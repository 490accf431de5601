"""Send each token to its experts and bring the results back, without atomics.

A plan is made by counting: a stable sort of the expert ids, the count of each, and the inverse of
the sort. Rows then stand sorted by expert, within an expert in token order. An assignment left out
of the plan (dropped by capacity, of a masked token, of an expert that computes nothing) has no row:
it is neither gathered, nor computed, nor added.

Gathering and adding are each other's gradient. A token's rows are added in the order of its
choices, in one pass of `embedding_bag` that accumulates in float32, so results repeat bit for bit.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan(NamedTuple):
    """Where N of the T * K assignments go."""

    order: Tensor  # [N] int64, the assignment t * K + k that each row holds
    tokens: Tensor  # [N] int64, the token that each row holds
    inverse: Tensor  # [N] int64, the row of each planned assignment, in the order of assignments
    starts: Tensor  # [T] int64, where each token's rows begin in `inverse`
    counts: Tensor  # [E] int64, rows of each expert

    def spread(self, tokens: Tensor) -> Tensor:
        """As `dispatch`."""
        return dispatch(tokens, self)

    def collect(self, rows: Tensor) -> Tensor:
        """As `combine`."""
        return combine(rows, self)

    def of_rows(self, weights: Tensor) -> Tensor:
        """As `row_weights`."""
        return row_weights(weights, self)

    def emptied(self, rows: Tensor) -> Tensor:
        """The rows: none of this plan is empty, as one of a `FixedPlan` may be."""
        return rows


def make_plan(experts: Tensor, n_experts: int, keep: Tensor | None = None) -> Plan:
    """Sort assignments by expert.

    Args:
        experts: [T, K] int64, expert ids; those of kept assignments are in [0, n_experts).
        n_experts: E.
        keep: [T, K] bool, the assignments to plan; None plans all, and then N = T * K is known
            without looking at the data.
    """
    n_tokens, k = experts.shape
    if keep is None:
        order, inverse, counts = torch.ops.moe_zoo.sort_all(experts, n_experts)
        starts = torch.arange(0, n_tokens * k, k, device=experts.device)
    else:
        order, inverse, counts = torch.ops.moe_zoo.sort_kept(experts, keep, n_experts)
        rows = keep.sum(-1)
        starts = rows.cumsum(0) - rows
    return Plan(order, order // k, inverse, starts, counts)


def dispatch(tokens: Tensor, plan: Plan) -> Tensor:
    """One copy of a token for each of its rows. tokens: [T, D]. Returns [N, D]."""
    if not (torch.is_grad_enabled() and tokens.requires_grad):
        return _gather(tokens, plan)
    rows = _Dispatch.apply(tokens, *plan)
    assert isinstance(rows, Tensor)
    return rows


def combine(rows: Tensor, plan: Plan) -> Tensor:
    """The sum of each token's rows, zero for a token without any.

    rows: [N, D], already weighted. Returns [T, D] in the same dtype.
    """
    if not (torch.is_grad_enabled() and rows.requires_grad):
        return _add(rows, plan)
    tokens = _Combine.apply(rows, *plan)
    assert isinstance(tokens, Tensor)
    return tokens


def row_weights(weights: Tensor, plan: Plan) -> Tensor:
    """The mixing weight of each row, as a column. weights: [T, K]. Returns [N, 1]."""
    return weights.flatten()[plan.order, None]


def is_decoding(tokens: Tensor) -> bool:
    """Whether this is a decoding step on a CPU: a single token, [1, D], without gradients.

    Such a step is bound by reading weights, and each small operation shows. It takes no plan, and
    reports neither losses nor stats: one token has no load to balance.
    """
    return (
        tokens.shape[0] == 1
        and not torch.is_grad_enabled()
        and tokens.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )


def count_experts(experts: Tensor, n_experts: int, mask: Tensor | None = None) -> Tensor:
    """How many assignments each expert has.

    experts: [T, K] int64 in [0, n_experts); mask: [T] or [T, K] bool, False for what does not
    count. Returns [n_experts] int64.
    """
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 1 else mask
        experts = experts.masked_fill(~mask, n_experts)
    return torch.ops.moe_zoo.count_experts(experts, n_experts)


def _gather(tokens: Tensor, plan: Plan) -> Tensor:
    return tokens.index_select(0, plan.tokens)


def _add(rows: Tensor, plan: Plan) -> Tensor:
    return F.embedding_bag(plan.inverse, rows, plan.starts, mode="sum")


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, *plan: Tensor) -> Tensor:
        ctx.save_for_backward(*plan)
        return _gather(tokens, Plan(*plan))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan = Plan(*ctx.saved_tensors)
        return _add(grads[0].contiguous(), plan), *[None] * len(plan)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, *plan: Tensor) -> Tensor:
        ctx.save_for_backward(*plan)
        return _add(rows, Plan(*plan))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan = Plan(*ctx.saved_tensors)
        return _gather(grads[0], plan), *[None] * len(plan)


# The plan's operators: opaque to torch.compile, which cannot trace a bincount.

_library = torch.library.Library("moe_zoo", "FRAGMENT")
_library.define("sort_all(Tensor experts, int n_experts) -> (Tensor, Tensor, Tensor)")
_library.define("sort_kept(Tensor experts, Tensor keep, int n_experts) -> (Tensor, Tensor, Tensor)")
_library.define("count_experts(Tensor experts, int n_experts) -> Tensor")


def _count_experts(experts: Tensor, n_experts: int) -> Tensor:
    return _counts(experts.flatten(), n_experts)


def _counts(ids: Tensor, n_experts: int) -> Tensor:
    """How many ids are each of [0, n_experts); those that are n_experts itself do not count."""
    if ids.device.type == "cpu":
        return ids.bincount(minlength=n_experts)[:n_experts]
    # a GPU's bincount reads the largest id on the host; whole numbers add up the same in any order
    ones = torch.ones_like(ids)
    return ids.new_zeros(n_experts + 1).scatter_add_(0, ids, ones)[:n_experts]


def _sort_all(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = experts.flatten()
    order = ids.to(_sort_dtype(n_experts)).argsort(stable=True)
    return order, _inverse(order), _counts(ids, n_experts)


def _sort_kept(experts: Tensor, keep: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    # a host read on a GPU: `layers.fixed_plan.sorted_plan` has none
    kept = keep.flatten().nonzero().squeeze(-1)  # [N], in the order of assignments
    ids = experts.flatten()[kept]
    order = ids.to(_sort_dtype(n_experts)).argsort(stable=True)
    return kept[order], _inverse(order), _counts(ids, n_experts)


def _sort_dtype(n_experts: int) -> torch.dtype:
    return torch.uint8 if n_experts <= 256 else torch.int32  # narrow keys sort fastest


def _inverse(order: Tensor) -> Tensor:
    places = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


_library.impl("count_experts", _count_experts, "CompositeExplicitAutograd")
_library.impl("sort_all", _sort_all, "CompositeExplicitAutograd")
_library.impl("sort_kept", _sort_kept, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_zoo::count_experts", lib=_library)
def _(experts: Tensor, n_experts: int) -> Tensor:
    return experts.new_empty(n_experts)


@torch.library.register_fake("moe_zoo::sort_all", lib=_library)
def _(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    n = experts.numel()
    return experts.new_empty(n), experts.new_empty(n), experts.new_empty(n_experts)


@torch.library.register_fake("moe_zoo::sort_kept", lib=_library)
def _(experts: Tensor, keep: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    n = torch.library.get_ctx().new_dynamic_size()
    return experts.new_empty(n), experts.new_empty(n), experts.new_empty(n_experts)
