"""What the parts of the library say to one another.

Dimension letters: B batch, S sequence, T = B * S tokens, D d_model, F d_ff or d_expert,
E experts, K experts per token, N = T * K routed copies, M memory slots.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor


class Later(NamedTuple):
    """What a layer adds to the residual stream after a later block."""

    y: Tensor  # [B, S, D]
    blocks: int  # how many blocks later: 1 after the output of the next


class FFNOutput(NamedTuple):
    """What every FFN variant returns."""

    y: Tensor  # [B, S, D], same dtype as the input
    losses: dict[str, Tensor] | None = None  # scalars, unweighted, mean over tokens
    stats: dict[str, Tensor] | None = None  # detached sums, so that they add over micro-batches
    carry: Tensor | None = None  # [B, S, E], router logits handed to the next layer
    later: Later | None = None  # not in y: whoever runs the blocks adds it there


class Routing(NamedTuple):
    """What every router returns, for T tokens."""

    experts: Tensor  # [T, K] int64, expert ids
    weights: Tensor  # [T, K] float32, mixing weights
    logits: Tensor  # [T, E] float32, before any normalisation; what `carry` hands on
    losses: dict[str, Tensor]  # as in FFNOutput
    keep: Tensor | None = None  # [T, K] bool, the choices that hold; None: all. Weight 0 elsewhere
    stats: dict[str, Tensor] | None = None  # what the router counts, for those of FFNOutput


@dataclass(frozen=True, kw_only=True)
class WeightCost:
    """What one parameter (or one step without parameters) costs a token, forward only."""

    name: str  # the parameter's own name in the module, e.g. "gate_up.weight"
    role: str  # as tagged on the leaf that owns it: "ffn", "expert", "router", "attention", ...
    params: int  # every trainable number
    flops: float = 0.0  # matmul FLOPs per token; a multiply-add counts 2
    other_flops: float = 0.0  # element-wise work, softmax, top-k: estimated
    units: int = 1  # experts (or rows) that the numbers split into evenly
    active_units: float = 1.0  # of these, how many one token touches
    layer: int | None = None  # the block it stands in; None outside blocks
    bits: float = 16.0  # storage per number, scales included

    @property
    def active_params(self) -> float:
        """Numbers that one token touches."""
        return self.params * self.active_units / self.units

    def weight_bytes(self, n_tokens: int) -> float:
        """Bytes read per token when `n_tokens` are processed together (comparison.md 2.3).

        A unit is read once if any token uses it: U(n) = units (1 - (1 - active/units)^n).
        """
        read = self.units * (1 - (1 - self.active_units / self.units) ** n_tokens)
        return self.params / self.units * read * self.bits / 8 / n_tokens


@dataclass(frozen=True)
class Cost:
    """What one token costs, forward only; training takes three times the FLOPs."""

    items: tuple[WeightCost, ...]

    @property
    def params(self) -> int:
        """Every trainable number."""
        return sum(item.params for item in self.items)

    @property
    def active_params(self) -> float:
        """Numbers that one token touches."""
        return sum(item.active_params for item in self.items)

    @property
    def flops(self) -> float:
        """Matmul FLOPs per token, forward; a multiply-add counts 2."""
        return sum(item.flops for item in self.items)

    @property
    def other_flops(self) -> float:
        """Estimated FLOPs per token outside matmuls, forward."""
        return sum(item.other_flops for item in self.items)

    @property
    def training_flops(self) -> float:
        """Matmul FLOPs per token of forward and backward: three times the forward."""
        return 3 * self.flops

    @property
    def weight_bytes(self) -> float:
        """Weight bytes that one token reads when it comes alone."""
        return self.weight_bytes_at(1)

    def weight_bytes_at(self, n_tokens: int) -> float:
        """Weight bytes read per token when `n_tokens` are processed together."""
        return sum(item.weight_bytes(n_tokens) for item in self.items)

    def by_role(self) -> dict[str, "Cost"]:
        """The same cost, split by module role."""
        roles = dict.fromkeys(item.role for item in self.items)
        return {r: Cost(tuple(i for i in self.items if i.role == r)) for r in roles}

    def within(self, prefix: str, layer: int | None = None) -> "Cost":
        """The same cost as part of a larger module: names prefixed, layer set."""
        return Cost(tuple(replace(i, name=f"{prefix}{i.name}", layer=layer) for i in self.items))

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.items + other.items)

    def __iter__(self) -> Iterator[WeightCost]:
        return iter(self.items)


def total(costs: Iterable[Cost]) -> Cost:
    """One cost from many."""
    return Cost(tuple(item for cost in costs for item in cost))
