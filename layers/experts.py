"""The experts of a mixture: stacked FFNs, and how tokens run through those chosen for them.

The body of a gated expert is down(activation(gate(x)) * up(x)) (arXiv:2002.05202), of an ungated
one down(activation(up(x))) (arXiv:2101.03961), either with biases (arXiv:2508.10925).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from layers.base import Cost, WeightCost
from layers.decode import native_dtypes, run_token
from layers.dispatch import Plan, is_decoding, make_plan
from layers.fixed_plan import FixedPlan, slot_plan, sorted_plan
from layers.grouped import BACKENDS, matmul_dtype
from layers.linear import ExpertLinear
from layers.mlp import ACTIVATION_FLOPS, ACTIVATIONS
from layers.names import check_choice, check_positive
from layers.prefix import WHOLE, Prefixes, prefixes
from layers.swiglu import GATE_FLOPS, GATES, default_d_ff, glu

Weighs = Literal["output", "input"]  # what a choice's weight multiplies


def default_d_expert(d_model: int, top_k: int, gated: bool = True) -> int:
    """F such that top_k experts are as wide as a default dense FFN, up to a multiple of 32."""
    d_ff = default_d_ff(d_model) if gated else 4 * d_model
    return -(-d_ff // (top_k * 32)) * 32


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Sizes and body of stacked experts."""

    d_model: int
    d_expert: int  # hidden width F of one expert
    n_experts: int
    activation: str = "silu"  # a row of GATES; of ACTIVATIONS where not gated
    gated: bool = True
    bias: bool = False  # on both matrices of every expert
    backend: str = "auto"  # how experts multiply, see `Experts`

    def __post_init__(self) -> None:
        check_choice("experts' backend", self.backend, BACKENDS)
        check_positive(d_model=self.d_model, d_expert=self.d_expert, n_experts=self.n_experts)
        kind, known = ("gated", GATES) if self.gated else ("ungated", ACTIVATIONS)
        check_choice(f"activation of {kind} experts", self.activation, known)

    def parts(self, width: int | None) -> Prefixes:
        """What the first `width` hidden numbers of every expert take of both leaves. None: all."""
        return prefixes(width, self.d_expert, groups=2 if self.gated else 1)

    def cost(self, active: float = 1.0) -> Cost:
        """One token's cost where `active` experts run for it, the mixing weights included."""
        e, n, f = self.n_experts, self.d_model * self.d_expert, self.d_expert

        def stack(
            name: str, numbers: int, flops: float, other_flops: float, role: str = "expert"
        ) -> WeightCost:
            return WeightCost(
                name=name, role=role, params=e * numbers, flops=flops * active,
                other_flops=other_flops * active, units=e, active_units=active,
            )  # fmt: skip

        matrices = 2 if self.gated else 1
        act = (GATE_FLOPS if self.gated else ACTIVATION_FLOPS)[self.activation]
        inner = self.inner_name
        items = [stack(f"{inner}.weight", matrices * n, 2 * matrices * n, (act + 1) * f)]
        if self.bias:
            items.append(stack(f"{inner}.bias", matrices * f, 0, matrices * f, "bias"))
        items.append(stack("down.weight", n, 2 * n, self.d_model))
        if self.bias:
            items.append(stack("down.bias", self.d_model, 0, 2 * self.d_model, "bias"))
        return Cost(tuple(items))

    @property
    def inner_name(self) -> str:
        """What the first leaf is called."""
        return "gate_up" if self.gated else "up"


class Experts(nn.Module):
    """Expert e of x: down_e(activation(gate_e(x)) * up_e(x)), or ungated; all stacked.

    Parameters [E, out, in], and [E, out] for biases, so that what shards experts cuts axis 0.

    All backends give the same sums to rounding, whatever the precision. "loop": expert by expert;
    "grouped": `F.grouped_mm`; "batched": a copy of its matrix for each row, for a few rows;
    "capacity": [E, C, D] in one batched matmul, C rows for every expert, used or not; "auto": the
    fastest by measured size. "grouped" and "batched" read nothing on the host, nor does "auto"
    on a GPU in bf16; "capacity" has no shape that depends on the data besides. Costs count the rows
    of choices that run; a FLOP counter also sees the empty rows of these. Where a precision rounds
    at random, rows that stand elsewhere draw other numbers.
    """

    gate_up: ExpertLinear  # [E, 2F, D], gate rows first; where gated
    up: ExpertLinear  # [E, F, D]; where not

    def __init__(self, config: ExpertsConfig):
        super().__init__()
        c = self.config = config
        rows = 2 * c.d_expert if c.gated else c.d_expert
        inner = ExpertLinear(c.n_experts, c.d_model, rows, role="expert", bias=c.bias)
        self.add_module(c.inner_name, inner)
        self.down = ExpertLinear(c.n_experts, c.d_expert, c.d_model, role="expert", bias=c.bias)

    @property
    def inner(self) -> ExpertLinear:
        """The leaf before the activation."""
        return self.gate_up if self.config.gated else self.up

    def forward(
        self,
        tokens: Tensor,
        routed: Tensor,
        weights: Tensor,
        keep: Tensor | None = None,
        weighs: Weighs = "output",
        capacity: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """The sum over a token's choices of weight * expert(x), or of expert(weight * x) (Llama 4).

        A weight of the output is multiplied in before `down`, on F columns and not on D: down is
        linear, and no D-wide expert output need be kept for its gradient (moe.md 14.3).

        Args:
            tokens: [T, D].
            routed: [T, K] int64, the chosen experts.
            weights: [T, K].
            keep: [T, K] bool, the choices to run; None: all. What is left out costs nothing.
            weighs: what a weight multiplies.
            capacity: C, read by the backend of that name: the most rows of one expert. `keep` must
                hold to it: a choice beyond is left out.
            width: of every expert the first so many hidden numbers alone; None: all.

        Returns:
            [T, D] in the experts' compute dtype; 0 for a token without an expert.

        Raises:
            ValueError: for the backend "capacity" without one, a width that the experts lack.
        """
        parts = self.config.parts(width)
        if is_decoding(tokens):
            return self._run_one(tokens, routed, weights, keep, weighs, parts)
        backend, tokens = self.config.backend, cast_once(tokens, self.inner)
        plan = self._plan(tokens, routed, keep, capacity)
        rows, of_row = plan.spread(tokens), plan.of_rows(weights)  # [N, D], [N, 1]
        if weighs == "input":
            rows, of_row = rows * of_row.to(rows.dtype), None
        inner = self.inner(rows, plan.counts, backend=backend, part=parts.inner)
        h = self._body(plan.emptied(inner), of_row)  # [N, F]
        return plan.collect(self.down(h, plan.counts, of_row, backend, parts.down))

    def _plan(
        self, tokens: Tensor, routed: Tensor, keep: Tensor | None, capacity: int | None
    ) -> Plan | FixedPlan:
        """In sizes that depend on what is kept, unless the backend is not to read that."""
        n_experts, backend = self.inner.weight.shape[0], self.config.backend  # of those held here
        if backend == "capacity":
            if capacity is None:
                raise ValueError(
                    "experts' backend 'capacity' needs a capacity, the rows of one expert: "
                    "give it to forward, or choose 'auto'"
                )
            return slot_plan(routed, n_experts, capacity, keep)
        if keep is None or backend == "loop" or (backend == "auto" and not tokens.is_cuda):
            return make_plan(routed, n_experts, keep)
        return sorted_plan(routed, n_experts, keep)

    def _body(self, inner: Tensor, weights: Tensor | None = None) -> Tensor:
        """Between the two matmuls. inner: [..., 2F] or [..., F]; weights: [..., 1]."""
        if self.config.gated:
            return glu(inner, self.config.activation, weights)
        h = ACTIVATIONS[self.config.activation](inner)
        return h if weights is None else h * weights.to(h.dtype)

    def _run_one(
        self, token: Tensor, routed: Tensor, weights: Tensor, keep: Tensor | None, weighs: Weighs,
        parts: Prefixes,
    ) -> Tensor:  # fmt: skip
        """`forward` for a single token: no plan, one matrix-vector product for each choice.

        One native call where the leaves only cast; in torch ops else.
        """
        c, inner, down = self.config, self.inner, self.down
        plain = c.gated and not c.bias and weighs == "output" and parts == WHOLE
        computes = native_dtypes(token, inner, down, c.activation) if plain else None
        if computes is not None:
            return run_token(
                token, routed, weights, keep, inner.weight, down.weight, c.activation, computes
            )
        if keep is not None:
            routed, weights = routed[keep][None], weights[keep][None]
        chosen = routed.tolist()[0]
        if not chosen:
            return torch.zeros_like(token)
        of_choice = weights.view(-1, 1)  # [K, 1]
        of_bias = torch.ones_like(of_choice) if weighs == "input" else of_choice
        if weighs == "input":
            inputs = token * of_choice.to(token.dtype)  # [K, D]
            rows = [inner.one(inputs[i : i + 1], e, part=parts.inner) for i, e in enumerate(chosen)]
            h = self._body(torch.cat(rows))
        else:
            rows = [inner.one(token, e, part=parts.inner) for e in chosen]
            h = self._body(torch.cat(rows), of_choice)  # [K, F]
        y = down.one(h[:1], chosen[0], of_bias[:1], parts.down)
        for i, e in enumerate(chosen[1:], start=1):
            y = y + down.one(h[i : i + 1], e, of_bias[i : i + 1], parts.down)
        return y


def cast_once(tokens: Tensor, leaf: ExpertLinear) -> Tensor:
    """Tokens in the leaf's dtype where it would only cast them: before they are copied K times."""
    p = leaf.precision
    if p is None:
        return tokens.to(matmul_dtype(tokens))
    return tokens.to(p.dtype) if p.is_cast else tokens
