"""Token-choice mixture of gated experts, dropless (arXiv:1701.06538; the expert: arXiv:2002.05202).

Shared experts, which every token visits, are those of DeepSeekMoE (arXiv:2401.06066, eq. 9).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from layers.base import Cost, FFNOutput, Routing, WeightCost
from layers.decode import native_dtypes, run_token
from layers.dispatch import combine, count_experts, dispatch, is_decoding, make_plan, row_weights
from layers.grouped import matmul_dtype
from layers.linear import ExpertLinear
from layers.names import check_choice, check_positive
from layers.swiglu import GATE_FLOPS, GATES, SwiGLU, SwiGLUConfig, default_d_ff, glu


def default_d_expert(d_model: int, top_k: int) -> int:
    """F such that top_k experts are as wide as a default dense FFN, up to a multiple of 32."""
    return -(-default_d_ff(d_model) // (top_k * 32)) * 32


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes of a mixture of gated experts."""

    d_model: int
    d_expert: int | None = None  # hidden width F of one expert; None: top_k make a default swiglu
    n_experts: int = 8
    top_k: int = 2
    n_shared: int = 0  # experts that every token visits, as one swiglu n_shared * d_expert wide
    activation: str = "silu"  # of the gate: silu | gelu | relu | identity

    def __post_init__(self) -> None:
        check_positive(d_model=self.d_model, n_experts=self.n_experts, top_k=self.top_k)
        check_positive(d_expert=self.hidden)
        check_choice("activation of moe", self.activation, GATES)
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k must be at most n_experts={self.n_experts}, got {self.top_k}")
        if self.n_shared < 0:
            raise ValueError(f"n_shared must not be negative, got {self.n_shared}")

    @property
    def hidden(self) -> int:
        """F of one expert, with the default filled in."""
        if self.d_expert is None:
            return default_d_expert(self.d_model, max(self.top_k, 1))
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

    def cost(self) -> Cost:
        """One token's cost; the router counts its own."""
        routed = experts_cost(
            self.d_model, self.hidden, self.n_experts, self.top_k, self.activation
        )
        return routed + (self.shared.cost().within("shared.") if self.shared else Cost(()))


def experts_cost(
    d_model: int, d_expert: int, n_experts: int, active: float, activation: str
) -> Cost:
    """The cost of stacked gated experts of which `active` run for a token."""
    n = d_model * d_expert

    def stack(name: str, matrices: int, other_flops: float) -> WeightCost:
        return WeightCost(
            name=f"{name}.weight",
            role="expert",
            params=n_experts * matrices * n,
            flops=2 * matrices * n * active,
            other_flops=other_flops,
            units=n_experts,
            active_units=active,
        )

    body = (GATE_FLOPS[activation] + 2) * d_expert * active  # the gate, times up, times the weight
    return Cost((stack("gate_up", 2, body), stack("down", 1, d_model * active)))


class Experts(NamedTuple):
    """The stacked experts of a layer, as `run_experts` takes them."""

    gate_up: ExpertLinear  # [E, 2F, D], gate rows first
    down: ExpertLinear  # [E, D, F]
    activation: str  # of the gate
    weighs: Literal["output", "input"] = "output"  # what a choice's weight multiplies


def run_experts(
    tokens: Tensor, routed: Tensor, weights: Tensor, keep: Tensor | None, experts: Experts
) -> Tensor:
    """The sum over a token's choices of weight * expert(x), or of expert(weight * x) (Llama 4),
    where expert(x) = down(activation(gate(x)) * up(x)).

    A weight of the output is multiplied in before `down`, on F columns and not on D: down is
    linear, and no D-wide expert output need be kept for its gradient (moe.md 14.3).

    Args:
        tokens: [T, D].
        routed: [T, K] int64, the chosen experts.
        weights: [T, K].
        keep: [T, K] bool, the choices to run; None: all. What is left out costs nothing.
        experts: the stacks.

    Returns:
        [T, D] in the experts' compute dtype; 0 for a token without an expert.
    """
    if is_decoding(tokens):
        return _run_one(tokens, routed, weights, keep, experts)
    gate_up, down, activation, weighs = experts
    plan = make_plan(routed, gate_up.weight.shape[0], keep)
    rows = dispatch(_cast_once(tokens, gate_up), plan)  # [N, D]
    of_row = row_weights(weights, plan)  # [N, 1]
    if weighs == "input":
        h = glu(gate_up(rows * of_row.to(rows.dtype), plan.counts), activation)
    else:
        h = glu(gate_up(rows, plan.counts), activation, of_row)  # [N, F]
    return combine(down(h, plan.counts), plan)


def _run_one(
    token: Tensor, routed: Tensor, weights: Tensor, keep: Tensor | None, experts: Experts
) -> Tensor:
    """`run_experts` for a single token: no plan, one matrix-vector product for each choice.

    One native call where the leaves only cast; in torch ops else.
    """
    gate_up, down, activation, weighs = experts
    computes = native_dtypes(token, gate_up, down) if weighs == "output" else None
    if computes is not None:
        return run_token(
            token, routed, weights, keep, gate_up.weight, down.weight, activation, computes
        )
    if keep is not None:
        routed, weights = routed[keep][None], weights[keep][None]
    chosen = routed.tolist()[0]
    if not chosen:
        return torch.zeros_like(token)
    of_choice = weights.view(-1, 1)  # [K, 1]
    if weighs == "input":
        inputs = token * of_choice.to(token.dtype)  # [K, D]
        up = [gate_up.one(inputs[i : i + 1], e) for i, e in enumerate(chosen)]
        h = glu(torch.cat(up), activation)
    else:
        up = [gate_up.one(token, e) for e in chosen]
        h = glu(torch.cat(up), activation, of_choice)  # [K, F]
    y = down.one(h[:1], chosen[0])
    for i, e in enumerate(chosen[1:], start=1):
        y = y + down.one(h[i : i + 1], e)
    return y


def _cast_once(tokens: Tensor, leaf: ExpertLinear) -> Tensor:
    """Tokens in the leaf's dtype where it would only cast them: before they are copied K times."""
    p = leaf.precision
    if p is None:
        return tokens.to(matmul_dtype(tokens))
    return tokens.to(p.dtype) if p.is_cast else tokens


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


class MoE(nn.Module):
    """y = shared(x) + sum over the k chosen of w_k down_k(activation(gate_k(x)) * up_k(x))."""

    def __init__(self, config: MoEConfig, router: nn.Module):
        super().__init__()
        c = self.config = config
        self.router = router
        self.gate_up = ExpertLinear(c.n_experts, c.d_model, 2 * c.hidden, role="expert")
        self.down = ExpertLinear(c.n_experts, c.hidden, c.d_model, role="expert")
        self.shared = SwiGLU(c.shared) if c.shared else None

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D]; carry: [B, S, E'] for routers that read it; mask: [B, S] bool."""
        c = self.config
        tokens, carry, mask = flatten_inputs(x, carry, mask)
        routing, keep = route(self.router, tokens, carry, mask, x.shape[0])
        check_routing(routing, c.n_experts)
        weighs = "input" if getattr(self.router, "weights_input", False) else "output"
        experts = Experts(self.gate_up, self.down, c.activation, weighs)
        y = run_experts(tokens, routing.experts, routing.weights, keep, experts)
        y = y.view_as(x)
        if self.shared is not None:
            y = y + self.shared(tokens.view_as(x)).y
        return FFNOutput(
            y=y.type_as(x),
            losses=routing.losses,
            stats=None if is_decoding(tokens) else self._stats(routing.experts, keep),
            carry=routing.logits.unflatten(0, x.shape[:2]),
        )

    def _stats(self, experts: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
        counts = count_experts(experts, self.config.n_experts, keep)
        none = counts.new_zeros(())
        return {"counts": counts, "dropped": none, "zero_computation": none}
