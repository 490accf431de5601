"""SPT's routed FFN: a dense FFN of which each token runs some blocks of neurons.

arXiv:2312.10365 and its code (moe.md 11). The published plain layer weighs blocks by 1 and so never
trains its router; its low-rank layer, the one tuned with, weighs the frozen base by c = 2 p. Here c
is the router's to say (`routers.spt`) and the low-rank factors are an option; as the default both
base and router are trained, which is the low-rank layer's rule without its factors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from layers.base import Cost, FFNOutput, WeightCost
from layers.dispatch import (
    Plan,
    combine,
    dispatch,
    is_decoding,
    make_plan,
    row_weights,
)
from layers.linear import ExpertLinear, Linear
from layers.mlp import ACTIVATION_FLOPS, ACTIVATIONS
from layers.moe import check_routing, flatten_inputs, load_stats, route
from layers.names import check_choice, check_positive
from layers.swiglu import GATE_FLOPS, GATES, default_d_ff, glu

# how a dense weight lies in blocks of f neurons: the same numbers, in the order of another axis
BLOCKS = {
    "gate_up.weight": "(two n f) d -> n (two f) d",
    "up.weight": "(n f) d -> n f d",
    "down.weight": "d (n f) -> n d f",
}


@dataclass(frozen=True, kw_only=True)
class SPTFFNConfig:
    """Sizes of a dense FFN, and of its blocks."""

    d_model: int
    d_ff: int | None = None  # hidden width F, all blocks; None: that of a default swiglu
    n_experts: int = 4  # blocks of neurons; must divide F
    top_k: int = 2  # blocks that a token runs; published: half of 4, or one (plain, gated)
    activation: str = "silu"  # as swiglu's; as mlp's where not gated
    gated: bool = True  # False: two matrices, as mlp
    rank: int | None = None  # of low-rank factors beside a frozen base (published: 16); None: none

    def __post_init__(self) -> None:
        check_positive(d_model=self.d_model, n_experts=self.n_experts, top_k=self.top_k)
        check_positive(d_ff=self.hidden)
        if self.rank is not None:
            check_positive(rank=self.rank)
        kind, known = ("gated", GATES) if self.gated else ("ungated", ACTIVATIONS)
        check_choice(f"activation of {kind} spt_ffn", self.activation, known)
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k must be at most n_experts={self.n_experts}, got {self.top_k}")
        if self.hidden % self.n_experts:
            raise ValueError(f"d_ff={self.hidden} does not split into {self.n_experts} equal parts")

    @property
    def hidden(self) -> int:
        """F, with the default filled in."""
        return default_d_ff(self.d_model) if self.d_ff is None else self.d_ff

    @property
    def block(self) -> int:
        """f, the neurons of one block."""
        return self.hidden // self.n_experts

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The blocks, in the order of the router's logits and of `stats["counts"]`."""
        return tuple(f"ffn {b}" for b in range(self.n_experts))

    def cost(self) -> Cost:
        """One token's cost; the router counts its own."""
        d, f, k, r = self.d_model, self.block, self.top_k, self.rank
        act = (GATE_FLOPS if self.gated else ACTIVATION_FLOPS)[self.activation]
        n_inner = 2 if self.gated else 1

        def blocks(name: str, numbers: int, other_flops: float = 0.0) -> WeightCost:
            return WeightCost(
                name=f"{name}.weight", role="expert", params=self.n_experts * numbers,
                flops=2 * numbers * k, other_flops=other_flops * k, units=self.n_experts,
                active_units=k,
            )  # fmt: skip

        def whole(name: str, numbers: int) -> WeightCost:
            return WeightCost(
                name=f"{name}.weight", role="expert", params=numbers, flops=2 * numbers
            )

        inner = blocks(self.inner_name, n_inner * d * f, (act + n_inner + 1) * f)
        items = [inner, blocks("down", d * f, d)]
        if r is not None:
            for name in self.factor_names:
                items += [whole(f"{name}_left", d * r), blocks(f"{name}_right", f * r, f)]
            items += [blocks("down_left", f * r, r), whole("down_right", d * r)]
        return Cost(tuple(items))

    @property
    def inner_name(self) -> str:
        """What the leaf before the activation is called, as in the dense FFN."""
        return "gate_up" if self.gated else "up"

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Of what the inner low-rank factors are."""
        return ("gate", "up") if self.gated else ("up",)


class SPTFFN(nn.Module):
    """h = act(c (gate x) + R L x) * (c (up x) + R' L' x); y = sum over k blocks of c (down h) + low
    rank. c enters before and after the activation, and on the base alone.

    With all blocks, c = 1 and right factors of zero it is the dense FFN; a dense `state_dict`
    (`swiglu`, or `mlp` where not gated; no biases) loads unchanged, by its own names and shapes.
    Stacks [n, out, in] hold its numbers, so that each block is a matrix of its own to a format.
    """

    def __init__(self, config: SPTFFNConfig, router: nn.Module):
        super().__init__()
        c = self.config = config
        self.router = router
        n_inner = 2 if c.gated else 1
        inner = ExpertLinear(c.n_experts, c.d_model, n_inner * c.block, role="expert")
        self.add_module(c.inner_name, inner)
        self.down = ExpertLinear(c.n_experts, c.block, c.d_model, role="expert")
        with torch.no_grad():  # fan in of the dense matrix, not of a block's part of it
            self.down.weight.mul_(c.n_experts**-0.5)
        if c.rank is not None:
            self._add_factors(c.rank)
        self.register_load_state_dict_pre_hook(_take_dense)

    def _add_factors(self, rank: int) -> None:
        """Left ones normal(0, 1), as an embedding's default; right ones zero; the base frozen."""
        c = self.config
        for name in (c.inner_name, "down"):
            self._leaf(name).requires_grad_(False)
        for name in c.factor_names:
            self.add_module(f"{name}_left", Linear(c.d_model, rank, role="expert"))
            right = ExpertLinear(c.n_experts, rank, c.block, role="expert")
            self.add_module(f"{name}_right", right)
        self.down_left = ExpertLinear(c.n_experts, c.block, rank, role="expert")
        self.down_right = Linear(rank, c.d_model, role="expert")
        for name in (*c.factor_names, "down"):
            nn.init.normal_(self._leaf(f"{name}_left").weight)
            nn.init.zeros_(self._leaf(f"{name}_right").weight)

    def _leaf(self, name: str) -> Any:
        return self._modules[name]

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D]; carry: [B, S, E'] for routers that read it; mask: [B, S] bool."""
        cfg = self.config
        tokens, carry, mask = flatten_inputs(x, carry, mask)
        routing, keep = route(self.router, tokens, carry, mask, x.shape[0])
        check_routing(routing, cfg.n_experts)
        plan = make_plan(routing.experts, cfg.n_experts, keep)
        c = row_weights(routing.weights, plan)  # [N, 1]

        inner = self._leaf(cfg.inner_name)(dispatch(tokens, plan), plan.counts)  # [N, 2f] or [N, f]
        inner = inner * c.to(inner.dtype)
        if cfg.rank is not None:
            inner = inner + self._low_inner(tokens, plan)
        h = self._activated(inner)  # [N, f]
        y = combine(self.down(h * c.to(h.dtype), plan.counts), plan)  # [T, D]
        if cfg.rank is not None:
            y = y + self.down_right(combine(self.down_left(h, plan.counts), plan))
        return FFNOutput(
            y=y.view_as(x).type_as(x),
            losses=routing.losses,
            stats=None if is_decoding(tokens) else load_stats(routing, cfg.n_experts, keep, keep),
            carry=routing.logits.unflatten(0, x.shape[:2]),
        )

    def _low_inner(self, tokens: Tensor, plan: Plan) -> Tensor:
        """R L x of each row's block; L x once for a token. Returns [N, 2f] or [N, f]."""
        parts = []
        for name in self.config.factor_names:
            low = dispatch(self._leaf(f"{name}_left")(tokens), plan)  # [N, r]
            parts.append(self._leaf(f"{name}_right")(low, plan.counts))
        return torch.cat(parts, dim=-1)

    def _activated(self, inner: Tensor) -> Tensor:
        how = self.config.activation
        return glu(inner, how) if self.config.gated else ACTIVATIONS[how](inner)

    def dense_state(self) -> dict[str, Tensor]:
        """The base as the dense FFN's `state_dict` has it, without the low-rank factors."""
        state = {}
        for name in (f"{self.config.inner_name}.weight", "down.weight"):
            dense, blocks = BLOCKS[name].split(" -> ")
            stack = self._leaf(name.removesuffix(".weight")).weight.detach()
            two = {"two": 2} if "two" in dense else {}
            state[name] = rearrange(stack, f"{blocks} -> {dense}", **two)
        return state


def in_blocks(state: Mapping[str, Tensor], n_blocks: int) -> dict[str, Tensor]:
    """Dense weights as stacks [n, out, in], block b the neurons [b F / n, (b + 1) F / n).

    state: by the names of `swiglu` or `mlp`, matrices; what it names otherwise is left out.
    """
    found = {}
    for name, how in BLOCKS.items():
        if name in state:
            sizes = {"n": n_blocks, "two": 2} if "two" in how else {"n": n_blocks}
            found[name] = rearrange(state[name], how, **sizes)
    return found


def _take_dense(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a `state_dict` is loaded: dense matrices in it become stacks."""
    assert isinstance(module, SPTFFN)
    dense = {
        name: state[prefix + name]
        for name in BLOCKS
        if prefix + name in state and state[prefix + name].ndim == 2
    }
    for name, stack in in_blocks(dense, module.config.n_experts).items():
        state[prefix + name] = stack
