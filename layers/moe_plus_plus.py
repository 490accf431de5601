"""MoE++: FFN experts beside experts that compute nothing (arXiv:2410.07348; moe.md 4)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, FFNOutput, WeightCost
from layers.capacity import Capacity, check_capacity, is_causal
from layers.dispatch import is_decoding
from layers.experts import Experts, ExpertsConfig, default_d_expert
from layers.linear import ValueTable, linear
from layers.moe import check_routing, flatten_inputs, load_stats, route
from layers.names import check_choice, check_positive
from layers.precision.leaf import Leaf

# What the paper trains, and what its authors released, which differ (moe.md 4.3). The released
# checkpoint also draws every weight but the constants' vectors with std 0.01.
PRESETS: dict[str, dict[str, object]] = {
    "paper": {"weights": "paper", "logit_norm": None, "capacity_factor": 1.1, "tau": 0.75},
    "released": {"weights": "released", "logit_norm": 1.0, "capacity_factor": None, "tau": 0.75},
}


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """How many experts of each kind; routing order: FFN, constant, copy, zero."""

    d_model: int
    n_experts: int = 8  # FFN experts
    n_constant: int | None = None  # None: the paper's table and rule, see `constants`
    n_copy: int = 1
    n_zero: int = 1

    def __post_init__(self) -> None:
        check_positive(d_model=self.d_model, n_experts=self.n_experts)
        for name in ("n_constant", "n_copy", "n_zero"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def constants(self) -> int:
        """Constant experts: max(n_experts / 4 - n_zero - n_copy, 1), but 2 for 8 experts.

        The rule gives 1 for 8 experts where the paper's table has 8 + 4.
        """
        if self.n_constant is not None:
            return self.n_constant
        if (self.n_experts, self.n_copy, self.n_zero) == (8, 1, 1):
            return 2
        return max(self.n_experts // 4 - self.n_zero - self.n_copy, 1)

    @property
    def n_zero_computation(self) -> int:
        """Experts that have no FFN."""
        return self.constants + self.n_copy + self.n_zero

    def check_share(self, free: float, top_k: int) -> None:
        """Raise unless tokens of top_k distinct experts can use this share of those without an FFN.

        free: share of all assignments.
        """
        least = max(1 - self.n_experts / top_k, 0)
        most = min(self.n_zero_computation / top_k, 1)
        if not (0 < free < 1 and least <= free <= most):
            raise ValueError(
                f"zero_computation_share must be above 0, below 1 and in [{least:g}, {most:g}] for "
                f"top_k={top_k} of {self.n_experts} FFN and {self.n_zero_computation} other "
                f"experts, got {free}"
            )

    @property
    def n_routes(self) -> int:
        """Experts of all kinds."""
        return self.n_experts + self.n_zero_computation

    @property
    def expert_names(self) -> tuple[str, ...]:
        """What a router chooses among, in the order of its logits and of `stats["counts"]`."""
        kinds = {"ffn": self.n_experts, "constant": self.constants}
        kinds |= {"copy": self.n_copy, "zero": self.n_zero}
        return tuple(f"{kind} {e}" for kind, count in kinds.items() for e in range(count))


@dataclass(frozen=True, kw_only=True)
class MoEPlusPlusConfig(Kinds):
    """Sizes and options of a MoE++ layer."""

    d_expert: int | None = None  # hidden width F of an FFN expert; None: as `moe`
    top_k: int = 2
    activation: str = "silu"  # of the gate: silu | gelu | relu | identity
    tau: float = 0.75  # as the router's: share of an FFN expert's use to a zero-computation one's
    zero_computation_share: float | None = None  # as the router's: wanted in place of what tau says
    capacity_factor: float | None = 1.1  # gamma, in training; None: dropless
    eval_capacity_factor: float | None = None  # in evaluation; the released code has none
    capacity_of: str = "assignments"  # gamma times T K slots; "tokens": times T, the paper's letter
    capacity_pool: str = "micro_batch"  # as `moe`'s
    priority: str = "position"  # as `moe`'s: who stays
    limit_zero_computation: bool = True  # capacity holds for zero-computation experts too
    input_scale: float = 1.0  # on what experts of every kind read; the code's default was top_k
    backend: str = "auto"  # how FFN experts multiply, as `moe`'s

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(top_k=self.top_k, tau=self.tau, input_scale=self.input_scale)
        _ = self.experts  # its own checks
        check_choice("capacity_of", self.capacity_of, ("assignments", "tokens"))
        check_capacity(
            self.backend, self.capacity_pool, self.priority, self.capacity_factor,
            self.eval_capacity_factor,
        )  # fmt: skip
        if self.zero_computation_share is not None:
            self.check_share(self.zero_computation_share, self.top_k)
        if self.top_k > self.n_routes:
            raise ValueError(
                f"top_k must be at most the {self.n_routes} experts of all kinds, got {self.top_k}"
            )

    @property
    def hidden(self) -> int:
        """F of one FFN expert, with the default filled in."""
        if self.d_expert is None:
            return default_d_expert(self.d_model, max(self.top_k, 1))
        return self.d_expert

    @property
    def experts(self) -> ExpertsConfig:
        """The FFN experts."""
        return ExpertsConfig(
            d_model=self.d_model, d_expert=self.hidden, n_experts=self.n_experts,
            activation=self.activation, backend=self.backend,
        )  # fmt: skip

    @property
    def designed_tau(self) -> float:
        """tau, or the one at which the balance loss would ask for the wanted share."""
        free = self.zero_computation_share
        if free is None:
            return self.tau
        return self.n_zero_computation * (1 - free) / (free * self.n_experts)

    @property
    def designed_share(self) -> float:
        """Share of one zero-computation expert in all assignments at the balance loss's minimum.

        An FFN expert's is tau times it (moe.md 4.4).
        """
        return 1 / (self.designed_tau * self.n_experts + self.n_zero_computation)

    @property
    def slots(self) -> tuple[float, ...]:
        """Capacity of each expert in training, per real token, before rounding up (moe.md 4.5).

        The paper counts gamma T slots in all, for K T assignments: taken literally, almost half
        of them are dropped. So T is read as the number of assignments, unless `capacity_of` says
        "tokens". An expert without a limit has infinitely many.
        """
        return self._slots(self.capacity_factor)

    def _slots(self, factor: float | None) -> tuple[float, ...]:
        if factor is None:
            return (math.inf,) * self.n_routes
        per_token = self.top_k if self.capacity_of == "assignments" else 1
        free = factor * per_token * self.designed_share
        rest = free if self.limit_zero_computation else math.inf
        return (self.designed_tau * free,) * self.n_experts + (rest,) * self.n_zero_computation

    @property
    def tokenwise(self) -> bool:
        """Whether in evaluation no choice is dropped for the sake of another token's."""
        return self.eval_capacity_factor is None

    def capacity(self, training: bool) -> Capacity | None:
        """What each expert takes, in training or in evaluation; None: no limit."""
        factor = self.capacity_factor if training else self.eval_capacity_factor
        if factor is None:
            return None
        pool, priority = self.capacity_pool, self.priority
        return Capacity(slots=self._slots(factor), pool=pool, priority=priority)

    @property
    def causal(self) -> bool:
        """Whether no token's output depends on later tokens."""
        return is_causal(self.priority, self.capacity_factor, self.eval_capacity_factor)

    def cost(self, assignments: float | None = None) -> Cost:
        """One token's cost; the router counts its own.

        Args:
            assignments: FFN experts that run for a token, as measured; None: as designed,
                K tau N_FFN / (tau N_FFN + N_ZC).
        """
        if assignments is None:
            assignments = self.top_k * self.designed_tau * self.n_experts * self.designed_share
        ffn = self.experts.cost(assignments).within("experts.")
        n, d = self.constants, self.d_model
        if not n:
            return ffn
        active = min(n, self.top_k * self.designed_share * n)
        return ffn + Cost(
            (
                WeightCost(
                    name="constant_mix.weight", role="constant", params=2 * n * d,
                    flops=4 * n * d, other_flops=6 * n,
                ),
                WeightCost(
                    name="constant.weight", role="constant", params=n * d,
                    other_flops=2 * active * d, units=n, active_units=active,
                ),
            )
        )  # fmt: skip


class ConstantMix(Leaf):
    """(a_1, a_2) = softmax(W_c x) for every constant expert. Weight [n_constant, 2, D].

    Row 0 weighs the input, row 1 the vector. Run for every token: it is 2 rows an expert.
    """

    def __init__(self, n_constant: int, d_model: int, *, role: str):
        super().__init__()
        self.role = role
        self.weight = nn.Parameter(torch.empty(n_constant, 2, d_model))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, D]. Returns [T, n_constant, 2] in at least float32."""
        logits = linear(x, self.weight.flatten(0, 1), None, self)
        logits = logits.unflatten(-1, self.weight.shape[:2])
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


class MoEPlusPlus(nn.Module):
    """y = sum over the k chosen of w_k E_k(x), where E is of one of four kinds:

    FFN down(activation(gate(x)) * up(x)); constant a_1 x + a_2 v with (a_1, a_2) = softmax(W_c x);
    copy x; zero 0. Capacity gamma limits every expert in training alone: the released inference
    code has none, and a generated token must not depend on its batch.
    """

    def __init__(self, config: MoEPlusPlusConfig, router: nn.Module):
        super().__init__()
        if getattr(router, "weights_input", False):
            raise ValueError(
                f"{type(router).__name__} weighs the input of experts (Llama 4), moe_plus_plus "
                "weighs their output: give it another router"
            )
        c = self.config = config
        self.router = router
        self.experts = Experts(c.experts)
        if c.constants:
            self.constant_mix = ConstantMix(c.constants, c.d_model, role="constant")
            self.constant = ValueTable(c.constants, c.d_model, role="constant")  # v
            nn.init.normal_(self.constant.weight)  # N(0, 1), as the normed input (released code)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D]; carry: [B, S, E'], logits of the previous MoE layer; mask: [B, S] bool."""
        c = self.config
        tokens, carry, mask = flatten_inputs(x, carry, mask)
        routing, chosen = route(self.router, tokens, carry, mask, x.shape[0])
        check_routing(routing, c.n_routes)
        if c.input_scale != 1:
            tokens = tokens * c.input_scale  # after the router has read them

        keep, rows = chosen, None  # [T, K]; the most rows of an FFN expert
        capacity = None if is_decoding(tokens) else c.capacity(self.training)
        if capacity is not None:
            keep = capacity.keep(routing, chosen, mask, x.shape[0])
            rows = capacity.most_rows(c.n_experts, len(tokens), x.shape[0])
        weights = routing.weights if keep is None else routing.weights.masked_fill(~keep, 0)
        is_ffn = None if not c.n_zero_computation else routing.experts < c.n_experts
        planned = keep if is_ffn is None else is_ffn if keep is None else keep & is_ffn
        y = self.experts(tokens, routing.experts, weights, planned, capacity=rows).type_as(x)
        if c.constants + c.n_copy:
            y = self._add_zero_computation(y, tokens, routing.experts, weights)
        return FFNOutput(
            y=y.view_as(x),
            losses=routing.losses,
            stats=None
            if is_decoding(tokens)
            else load_stats(routing, c.n_routes, keep, chosen, c.n_experts),
            carry=routing.logits.unflatten(0, x.shape[:2]),
        )

    def _add_zero_computation(
        self, y: Tensor, tokens: Tensor, experts: Tensor, weights: Tensor
    ) -> Tensor:
        """y + what constants and copies give. y, tokens: [T, D]; experts, weights: [T, K]."""
        c = self.config
        first_copy = c.n_experts + c.constants
        is_copy = (experts >= first_copy) & (experts < first_copy + c.n_copy)
        of_input = weights * is_copy  # [T, K], how much of x each choice gives
        if c.constants:
            is_constant = (experts >= c.n_experts) & (experts < first_copy)
            which = (experts - c.n_experts).clamp(0, c.constants - 1)
            mix = self.constant_mix(tokens)  # [T, n_constant, 2]
            mix = mix.gather(1, which[..., None].expand(-1, -1, 2))  # [T, K, 2]
            share = (weights * is_constant)[..., None] * mix
            of_input = of_input + share[..., 0]
            y = y + self.constant(which, share[..., 1]).type_as(y)
        return torch.addcmul(y, tokens, of_input.sum(-1, keepdim=True).type_as(y))
