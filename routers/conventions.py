"""Balance losses as others write them, and what their coefficients are worth here (moe.md 3.1).

All are the one formula with another normaliser, but two differ in what they count: Hugging Face's
pools the rows of all layers before it forms f and P, so opposite imbalances cancel; GShard's counts
first choices alone. `value` gives each exactly; `converted` turns a coefficient of one into that of
another which pushes as hard.

Here a model's loss is the mean over layers of the canonical loss of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.names import check_positive, unknown
from routers.balance import balance_loss


@dataclass(frozen=True, kw_only=True)
class Convention:
    """One way to write the balance loss."""

    layers: str  # how those of layers become one: "mean", "sum", or "pooled" before the formula
    per_canonical: Callable[[int, int], float]  # (E, K) to the value of a layer in perfect balance
    source: str
    first_choice: bool = False  # f counts first choices alone


def _one(n_experts: int, top_k: int) -> float:
    return 1.0


def _k(n_experts: int, top_k: int) -> float:
    return float(top_k)


def _k_over_n(n_experts: int, top_k: int) -> float:
    return top_k / n_experts


CONVENTIONS = {
    "canonical": Convention(layers="mean", per_canonical=_one, source="this library"),
    "switch": Convention(layers="sum", per_canonical=_one, source="arXiv:2101.03961, eq. 4"),
    "flaxformer": Convention(layers="sum", per_canonical=_k, source="flaxformer; HF Switch"),
    "gshard": Convention(
        layers="sum", per_canonical=_one, source="arXiv:2006.16668; V-MoE's code", first_choice=True
    ),
    "megatron": Convention(layers="sum", per_canonical=_one, source="Megatron-LM"),
    "megablocks": Convention(layers="mean", per_canonical=_one, source="MegaBlocks; trained OLMoE"),
    "huggingface": Convention(
        layers="pooled", per_canonical=_k, source="transformers' load_balancing_loss_func"
    ),
    "sonicmoe": Convention(layers="sum", per_canonical=_one, source="SonicMoE"),
    "moe_plus_plus": Convention(
        layers="sum", per_canonical=_k_over_n, source="arXiv:2410.07348, eq. 7, with eta = 1"
    ),
}


def find(name: str) -> Convention:
    """The convention of that name.

    Raises:
        ValueError: when there is none; names the nearest.
    """
    if name not in CONVENTIONS:
        raise unknown("convention of the balance loss", name, CONVENTIONS)
    return CONVENTIONS[name]


def value(
    convention: str,
    probs: Sequence[Tensor],
    experts: Sequence[Tensor],
    mask: Tensor | None = None,
) -> Tensor:
    """A model's balance loss in a convention, before its coefficient.

    Args:
        convention: a name of `CONVENTIONS`.
        probs: [T, E] of each layer, softmax over all experts.
        experts: [T, K] int64 of each layer, the chosen ones, best first.
        mask: [T] bool, True where a token is real; the same in every layer.
    """
    how = find(convention)
    if how.first_choice:
        experts = [chosen[:, :1] for chosen in experts]
    scale = how.per_canonical(probs[0].shape[-1], experts[0].shape[-1])
    if how.layers == "pooled":
        every = None if mask is None else mask.repeat(len(probs))
        return scale * balance_loss(torch.cat(list(probs)), torch.cat(list(experts)), every)
    pairs = zip(probs, experts, strict=True)
    losses = torch.stack([balance_loss(p, chosen, mask) for p, chosen in pairs])
    return scale * (losses.mean() if how.layers == "mean" else losses.sum())


def converted(
    coefficient: float, *, of: str, to: str, n_experts: int, top_k: int, n_layers: int
) -> float:
    """The coefficient in convention `to` that weighs as `coefficient` does in convention `of`.

    Exact, gradients included, between conventions that count alike (see the module's docstring);
    with the two others equal at perfect balance.

    Args:
        coefficient: alpha, as a paper or a config has it.
        of, to: names of `CONVENTIONS`; "canonical" is what a recipe's `loss_weights` takes.
        n_experts, top_k: E (of all kinds) and K.
        n_layers: MoE layers of the model.
    """
    check_positive(n_experts=n_experts, top_k=top_k, n_layers=n_layers)

    def at_balance(name: str) -> float:
        how = find(name)
        layers = n_layers if how.layers == "sum" else 1
        return how.per_canonical(n_experts, top_k) * layers

    return coefficient * at_balance(of) / at_balance(to)
