"""Token-choice mixture of experts (arXiv:1701.06538; the expert: arXiv:2002.05202).

It drops no choice, unless a capacity is set (arXiv:2101.03961, eq. 3; see `layers.capacity`).

Shared experts, which every token visits, are those of DeepSeekMoE (arXiv:2401.06066, eq. 9); with
a gate they are Qwen2-MoE's (arXiv:2407.10671, released code).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from layers.base import Cost, FFNOutput, Routing, WeightCost
from layers.capacity import Capacity, check_capacity, is_causal
from layers.dispatch import count_experts, is_decoding
from layers.experts import Experts, ExpertsConfig, default_d_expert
from layers.linear import Linear
from layers.names import check_positive
from layers.prefix import default_widths
from layers.swiglu import SwiGLU, SwiGLUConfig


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes of a mixture of experts."""

    d_model: int
    d_expert: int | None = None  # hidden width F of one expert; None: top_k make a default FFN
    n_experts: int = 8
    top_k: int = 2
    n_shared: int = 0  # experts that every token visits, as one swiglu n_shared * d_expert wide
    shared_gate: bool = False  # these weighed by sigmoid(w . x) (Qwen2-MoE)
    activation: str = "silu"  # of the gate, as swiglu's; as mlp's where not gated
    gated: bool = True  # False: two matrices an expert, as Switch has them
    bias: bool = False  # on every matrix of every expert (gpt-oss)
    backend: str = "auto"  # how experts multiply, see `Experts`; "capacity" needs both factors
    capacity_factor: float | None = None  # in training, see `layers.capacity`; None: no limit
    eval_capacity_factor: float | None = None  # in evaluation; a single token keeps all choices
    capacity_pool: str = "micro_batch"  # what a capacity is counted in, or each "sequence"
    priority: str = "position"  # who stays: "position", "choice", "batch" or "weight"

    def __post_init__(self) -> None:
        check_positive(d_model=self.d_model, n_experts=self.n_experts, top_k=self.top_k)
        _ = self.experts  # its own checks
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k must be at most n_experts={self.n_experts}, got {self.top_k}")
        check_capacity(
            self.backend, self.capacity_pool, self.priority, self.capacity_factor,
            self.eval_capacity_factor,
        )  # fmt: skip
        if self.n_shared < 0:
            raise ValueError(f"n_shared must not be negative, got {self.n_shared}")
        if self.shared_gate and not self.n_shared:
            raise ValueError("shared_gate weighs shared experts: give n_shared of 1 or more")
        if self.n_shared and (self.bias or not self.gated):
            raise ValueError(
                "shared experts are a swiglu without biases: leave out n_shared, or bias=True and "
                "gated=False"
            )

    @property
    def hidden(self) -> int:
        """F of one expert, with the default filled in."""
        if self.d_expert is None:
            return default_d_expert(self.d_model, max(self.top_k, 1), self.gated)
        return self.d_expert

    @property
    def expert_names(self) -> tuple[str, ...]:
        """What a router chooses among, in the order of its logits and of `stats["counts"]`."""
        return tuple(f"ffn {e}" for e in range(self.n_experts))

    @property
    def shared(self) -> SwiGLUConfig | None:
        """The shared experts as one dense FFN."""
        if not self.n_shared:
            return None
        width = self.n_shared * self.hidden
        return SwiGLUConfig(d_model=self.d_model, d_ff=width, activation=self.activation)

    @property
    def experts(self) -> ExpertsConfig:
        """The routed experts."""
        return ExpertsConfig(
            d_model=self.d_model, d_expert=self.hidden, n_experts=self.n_experts,
            activation=self.activation, gated=self.gated, bias=self.bias, backend=self.backend,
        )  # fmt: skip

    @property
    def causal(self) -> bool:
        """Whether no token's output depends on later tokens."""
        return is_causal(self.priority, self.capacity_factor, self.eval_capacity_factor)

    @property
    def tokenwise(self) -> bool:
        """Whether in evaluation no choice is dropped for the sake of another token's."""
        return self.eval_capacity_factor is None

    def capacity(self, training: bool) -> Capacity | None:
        """What each expert takes, in training or in evaluation; None: no limit."""
        factor = self.capacity_factor if training else self.eval_capacity_factor
        if factor is None:
            return None
        slots = (factor * self.top_k / self.n_experts,) * self.n_experts
        return Capacity(slots=slots, pool=self.capacity_pool, priority=self.priority)

    @property
    def granularities(self) -> tuple[int, ...]:
        """Widths of an expert that nested training takes; none where shared experts are one FFN."""
        return () if self.n_shared else default_widths(self.hidden)

    def cost(self, assignments: float | None = None, width: int | None = None) -> Cost:
        """One token's cost; the router counts its own.

        Args:
            assignments: routed experts that run for a token, as measured, where a router or a
                capacity leaves some out; None: top_k, which ReMoE aims at and the others choose.
            width: of the mixture whose experts are the first so many hidden numbers of these.
        """
        if width is not None:
            self.experts.parts(width)  # its own checks
            return replace(self, d_expert=width).cost(assignments)
        active = self.top_k if assignments is None else assignments
        return self.experts.cost(active).within("experts.") + self._shared_cost()

    def _shared_cost(self) -> Cost:
        if self.shared is None:
            return Cost(())
        cost, d = self.shared.cost().within("shared."), self.d_model
        if not self.shared_gate:
            return cost
        gate = WeightCost(
            name="shared_gate.weight", role="router", params=d, flops=2 * d, other_flops=4 + d
        )
        return cost + Cost((gate,))


def flatten_inputs(
    x: Tensor, carry: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x [B, S, D], carry [B, S, E'], mask [B, S] as [T, D], [T, E'], [T]; masked tokens as 0."""
    tokens = x.flatten(0, 1)
    carry = None if carry is None else carry.flatten(0, 1)
    if mask is not None:
        mask = mask.flatten()
        tokens = tokens.masked_fill(~mask[:, None], 0)  # whatever stands there, NaN included
    return tokens, carry, mask


def route(
    router: nn.Module, tokens: Tensor, carry: Tensor | None, mask: Tensor | None, n_sequences: int
) -> tuple[Routing, Tensor | None]:
    """What a router says of [T, D] tokens; and [T, K] bool, the choices to run (None: all).

    n_sequences: B, for a router that counts its balance by sequence.
    """
    if getattr(router, "reads_sequences", False):
        routing: Routing = router(tokens, carry, mask, n_sequences)
    else:
        routing = router(tokens, carry, mask)
    keep = routing.keep
    if mask is not None:
        real = mask[:, None].expand_as(routing.experts)
        keep = real if keep is None else keep & real
    return routing, keep


def check_routing(routing: Routing, n_experts: int) -> None:
    """Raise unless the router scored exactly the layer's experts, of all kinds."""
    if routing.logits.shape[-1] != n_experts:
        raise ValueError(
            f"the router scores {routing.logits.shape[-1]} experts, the layer has {n_experts}: "
            "give both the same numbers of experts"
        )


def load_stats(
    routing: Routing, n_routes: int, keep: Tensor | None, chosen: Tensor | None, n_ffn: int = -1
) -> dict[str, Tensor]:
    """What a mixture reports: assignments that ran, by expert [n_routes]; how many a capacity
    dropped; how many of those that ran have no FFN; and what the router adds.

    keep, chosen: [T, K] bool, assignments that ran and that the router meant; None: all. n_ffn:
    routes from this one on have no FFN; -1: each has.
    """
    counts = count_experts(routing.experts, n_routes, keep)
    none = counts.new_zeros(())
    meant = None if keep is chosen else count_experts(routing.experts, n_routes, chosen).sum()
    dropped = none if meant is None else meant - counts.sum()
    free = none if n_ffn < 0 else counts[n_ffn:].sum()
    return {"counts": counts, "dropped": dropped, "zero_computation": free} | (routing.stats or {})


class MoE(nn.Module):
    """y = shared(x) + sum over the k chosen of w_k down_k(activation(gate_k(x)) * up_k(x)).

    Where it has a gate, sigmoid(w . x) shared(x), the sigmoid in float32.
    """

    def __init__(self, config: MoEConfig, router: nn.Module):
        super().__init__()
        c = self.config = config
        self.router = router
        self.experts = Experts(c.experts)
        self.shared = SwiGLU(c.shared) if c.shared else None
        self.shared_gate = Linear(c.d_model, 1, role="router") if c.shared_gate else None

    @property
    def nested(self) -> bool:
        """Whether forward takes a width of the experts: shared ones are one FFN and have none."""
        return self.shared is None

    def forward(
        self,
        x: Tensor,
        carry: Tensor | None = None,
        mask: Tensor | None = None,
        width: int | None = None,
    ) -> FFNOutput:
        """Every chosen expert on x, or its first `width` hidden numbers alone (MatFormer).

        x: [B, S, D]; carry: [B, S, E'] for routers that read it; mask: [B, S] bool.
        """
        c = self.config
        if width is not None and not self.nested:
            raise ValueError(f"shared experts have no width of their own, so no width {width}")
        tokens, carry, mask = flatten_inputs(x, carry, mask)
        routing, chosen = route(self.router, tokens, carry, mask, x.shape[0])
        check_routing(routing, c.n_experts)
        keep, rows = chosen, None  # [T, K]; the most rows of an expert
        capacity = None if is_decoding(tokens) else c.capacity(self.training)
        if capacity is not None:
            keep = capacity.keep(routing, chosen, mask, x.shape[0])
            rows = capacity.most_rows(c.n_experts, len(tokens), x.shape[0])
        weighs = "input" if getattr(self.router, "weights_input", False) else "output"
        y = self.experts(tokens, routing.experts, routing.weights, keep, weighs, rows, width)
        y = y.view_as(x)
        if self.shared is not None:
            y = y + self._shared(tokens.view_as(x))
        return FFNOutput(
            y=y.type_as(x),
            losses=routing.losses,
            stats=None if is_decoding(tokens) else load_stats(routing, c.n_experts, keep, chosen),
            carry=routing.logits.unflatten(0, x.shape[:2]),
        )

    def _shared(self, x: Tensor) -> Tensor:
        """Shared experts, gated where they have a gate. x: [B, S, D]."""
        assert self.shared is not None
        y = self.shared(x).y
        if self.shared_gate is None:
            return y
        gate = self.shared_gate(x)  # [B, S, 1]
        return y * gate.to(torch.promote_types(gate.dtype, torch.float32)).sigmoid().type_as(y)
