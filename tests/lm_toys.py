"""Small stand-ins that obey the FFN interface, so that the model is tested on its own."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from layers.base import Cost, FFNOutput, WeightCost
from layers.names import check_positive
from zoo.entry import Entry


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """Logits W x, plus G carry where an earlier layer routed."""

    d_model: int
    n_experts: int = 3
    n_carry: int | None = None

    def cost(self):
        items = [WeightCost(name="weight", role="router", params=self.n_experts * self.d_model)]
        if self.n_carry:
            items.append(
                WeightCost(name="gate", role="router", params=self.n_experts * self.n_carry)
            )
        return Cost(tuple(items))


class Chain(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.n_experts, config.d_model))
        gate = config.n_carry and torch.randn(config.n_experts, config.n_carry)
        self.gate = nn.Parameter(gate) if gate is not None else None

    def forward(self, x, carry=None):
        logits = x @ self.weight.T
        return logits if self.gate is None else logits + carry @ self.gate.T


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    d_model: int
    n_experts: int = 3
    dropout: float = 0.0

    def __post_init__(self):
        check_positive(n_experts=self.n_experts)

    @property
    def expert_names(self):
        return tuple(f"ffn {e}" for e in range(self.n_experts))

    def cost(self):
        n = self.n_experts * self.d_model
        return Cost((WeightCost(name="weight", role="expert", params=n),))


class Toy(nn.Module):
    """y = softmax(router(x)) V: soft, tokenwise, with all that a routed FFN reports."""

    def __init__(self, config, router):
        super().__init__()
        self.config, self.router = config, router
        self.weight = nn.Parameter(torch.randn(config.n_experts, config.d_model))

    def forward(self, x, carry=None, mask=None):
        logits = self.router(x, carry)
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        probs = logits.softmax(-1)
        y = F.dropout(probs @ self.weight, self.config.dropout, self.training)
        chosen = logits.argmax(-1)[real]
        return FFNOutput(
            y=y * real[..., None],
            losses={"balance": probs[real].square().sum(-1).mean()},
            stats={"counts": chosen.bincount(minlength=self.config.n_experts)},
            carry=logits,
        )


@dataclass(frozen=True, kw_only=True)
class RawConfig:
    d_model: int

    def cost(self):
        return Cost(())


class Raw(nn.Module):
    """Halves the residual stream that it is handed raw; reports how large that was."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, x, carry=None, mask=None):
        size = x.detach().square().mean()
        return FFNOutput(-x / 2, losses={"size": size}, stats={"size": size})


def row(name, module, config, **more):
    return Entry(
        name=name, module=module, config=config, summary="a stand-in", paper="none",
        tiny={"d_model": 16}, **more,
    )  # fmt: skip


CHAIN = row("chain", Chain, ChainConfig, kind="router")
TOY = row("toy", Toy, ToyConfig, router="chain")
RAW = row("raw", Raw, RawConfig, own_norm=True)
