"""How routers choose for held-out tokens, layer by layer (comparison.md section 8).

A hook on each router keeps what it returned in the last forward, during evaluation alone: training
pays nothing, no layer knows of it, and any router that returns a Routing of every token is seen,
one that keeps a ragged number of choices too.

q, the probability of each expert, is the router's own `probabilities(logits)` where it has such a
method (a sigmoid, a ReLU: scores as shares of their sum) and the softmax of its logits elsewhere.
A router's choice is the k largest of its `preference(logits)`, of its logits where it has none
(a bias, groups); k is what the token was given. A near tie is a choice that logits rounded to
bfloat16 would change: what a lower precision or another kernel may flip.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from layers.base import Routing
from recipes.hooks import seen_in
from recipes.report.layer_records import LayerHealth

MOST_PAIRED = 64  # experts in a matrix of pairs
TOLD = 0.99  # share of the choices that logits must tell for a rate of near ties
SUMS = ("confidence", "token_entropy", "margin", "square", "told", "near_tie")


def routers_of(model: nn.Module) -> dict[int, nn.Module]:
    """{layer: its FFN's router} for the layers that have one."""
    found = (getattr(block.ffn, "router", None) for block in cast(Any, model).blocks)
    return {layer: each for layer, each in enumerate(found) if isinstance(each, nn.Module)}


def watched(model: nn.Module) -> AbstractContextManager[dict[int, Routing]]:
    """{layer: what its router returned}, as `recipes.hooks.seen_in`."""
    return seen_in(model, routers_of(model), lambda module, args, routing: routing)


def probabilities(router: nn.Module, logits: Tensor) -> Tensor:
    """q, [T, E] in float64."""
    own = getattr(router, "probabilities", None)
    return own(logits.double()) if own is not None else logits.double().softmax(-1)


def preference(router: nn.Module, logits: Tensor) -> Tensor:
    """[T, E], of which the router chooses the k largest."""
    own = getattr(router, "preference", None)
    return own(logits) if own is not None else logits


def chosen(routing: Routing) -> Tensor:
    """[T, E] bool, the choices that hold."""
    experts, n_experts = routing.experts, routing.logits.shape[-1]
    if routing.keep is not None:
        experts = experts.masked_fill(~routing.keep, n_experts)
    found = torch.zeros(len(experts), n_experts + 1, dtype=torch.bool, device=experts.device)
    return found.scatter(1, experts, True)[:, :n_experts]


def explains(scores: Tensor, choice: Tensor) -> Tensor:
    """[T] bool, whether a token's choice is its largest scores; of equals those of lower index.

    scores: [T, E]; choice: [T, E] bool.
    """
    e = scores.shape[-1]
    place = torch.arange(e, device=scores.device)
    low = scores.masked_fill(~choice, math.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(choice, -math.inf).amax(-1, keepdim=True)
    last = place.where(choice & (scores == low), -1).amax(-1)
    first = place.where(~choice & (scores == high), e).amin(-1)
    return (low > high)[:, 0] | ((low == high)[:, 0] & (last < first))


def of_tokens(router: nn.Module, routing: Routing, q: Tensor, choice: Tensor) -> Tensor:
    """What is summed over tokens: [T, len(SUMS)] float64.

    q: [T, E], `probabilities`; choice: [T, E] bool, `chosen`.
    """
    logits = routing.logits
    best = q.topk(min(2, q.shape[-1]), dim=-1).values
    second = best[:, 1] if q.shape[-1] > 1 else torch.zeros_like(best[:, 0])
    rounded = logits.bfloat16().to(logits.dtype)
    told = explains(preference(router, logits), choice)
    still = explains(preference(router, rounded), choice)
    columns = {
        "confidence": best[:, 0],
        "token_entropy": entropy(q),
        "margin": best[:, 0] - second,
        "square": logits.double().square().mean(-1),
        "told": told,
        "near_tie": told & ~still,
    }
    return torch.stack([columns[name].double() for name in SUMS], dim=-1)


def entropy(q: Tensor) -> Tensor:
    """H of each row over its largest value, ln E; 0 for a single expert."""
    return -torch.xlogy(q, q).sum(-1) / max(math.log(q.shape[-1]), 1e-30)


class RouterHealth(Metric):
    """Sums over the real tokens of an evaluation, by MoE layer."""

    full_state_update = False

    def __init__(self, routers: Mapping[int, nn.Module], n_experts: Mapping[int, int]):
        """routers: as `routers_of` gives them; n_experts: E by layer, experts of every kind."""
        super().__init__()
        self.routers = {layer: r for layer, r in routers.items() if layer in n_experts}
        for layer in self.routers:
            e = n_experts[layer]
            shapes = {"tokens": (), "sums": (len(SUMS),), "mass": (e,), "pairs": (e, e)}
            for name, shape in shapes.items():
                zeros = torch.zeros(shape, dtype=torch.float64)
                self.add_state(f"{name}_{layer}", zeros, dist_reduce_fx="sum")

    def update(self, seen: Mapping[int, Routing], mask: Tensor | None) -> None:
        """Add one batch. seen: as `watched` gives it; mask: [B, S] bool, True where real."""
        for layer, router in self.routers.items():
            if layer in seen:
                self._add(layer, router, seen[layer], None if mask is None else mask.flatten())

    def _add(self, layer: int, router: nn.Module, routing: Routing, real: Tensor | None) -> None:
        q, choice = probabilities(router, routing.logits), chosen(routing)
        rows = of_tokens(router, routing, q, choice)
        if real is not None:
            rows, q, choice = rows[real], q[real], choice[real]
        ones = choice.double()
        n = rows.new_tensor(len(rows))
        added = {"tokens": n, "sums": rows.sum(0), "mass": q.sum(0), "pairs": ones.T @ ones}
        for name, value in added.items():
            state = getattr(self, f"{name}_{layer}")
            state += value.to(state.device)

    def compute(self) -> dict[int, dict[str, Tensor]]:
        """{layer: {tokens, sums, mass [E], pairs [E, E]}}, over all processes."""
        names = ("tokens", "sums", "mass", "pairs")
        return {k: {name: getattr(self, f"{name}_{k}") for name in names} for k in self.routers}

    def layers(self) -> tuple[LayerHealth, ...]:
        """A record per MoE layer whose router was seen."""
        found = self.compute().items()
        return tuple(_record(layer, sums) for layer, sums in found if sums["tokens"].item())


def _record(layer: int, of: dict[str, Tensor]) -> LayerHealth:
    n = of["tokens"].item()
    mass = of["mass"].reshape(-1)  # torchmetrics takes the axes off a single number
    pairs = of["pairs"].reshape(len(mass), len(mass))
    mean = dict(zip(SUMS, (of["sums"] / n).tolist(), strict=True))
    used = pairs.diagonal().sort(descending=True, stable=True).indices[:MOST_PAIRED].sort().values
    return LayerHealth(
        layer=layer,
        experts_per_token=pairs.trace().item() / n,
        confidence=mean["confidence"],
        token_entropy=mean["token_entropy"],
        margin=mean["margin"],
        information=entropy(mass / n).item() - mean["token_entropy"],
        near_ties=mean["near_tie"] / mean["told"] if mean["told"] >= TOLD else None,
        logit_rms=math.sqrt(mean["square"]),
        pair_experts=tuple(used.tolist()),
        pairs=tuple(map(tuple, pairs[used][:, used].tolist())),
    )
