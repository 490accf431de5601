"""What a method made of a leaf, and how a model comes to compute with it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.linear import ExpertLinear, Linear, ValueTable
from layers.posttraining.correction import Correction
from layers.precision import Leaf, LeafPrecision, PrecisionPolicy, QSpec, Rule


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a method made of one leaf."""

    weight: Tensor  # rounded, in the shape of the leaf's, float32
    bits: float  # of storage per weight, scales and corrections included
    format: str  # of the weight, for a reader
    weights: QSpec | None = None  # a format that gives these weights back; None: read in float32
    inputs: QSpec | None = None  # how inputs are written; None: only cast
    input_scale: Tensor | None = None  # [] or [E] float32, where the inputs' scope is static
    correction: Correction | None = None


@torch.no_grad()
def put(outcome: Outcome, leaf: Leaf) -> None:
    """Give a leaf, under the precision of `policy_of_outcomes`, what the method made of it."""
    weight = leaf.weight
    assert isinstance(weight, Tensor)
    weight.copy_(outcome.weight)
    if outcome.input_scale is not None:
        assert leaf.operand_scales is not None
        leaf.operand_scales[0] = outcome.input_scale
    if outcome.correction is not None:
        leaf.correction = outcome.correction


def is_table(leaf: Leaf) -> bool:
    """Whether it is looked up; raises for a kind of leaf that no method knows."""
    if not isinstance(leaf, Linear | ExpertLinear | ValueTable):
        raise ValueError(f"no method quantises a {type(leaf).__name__} of role {leaf.role!r}")
    return isinstance(leaf, ValueTable)


def weight_of(leaf: Leaf) -> Tensor:
    """The weight in float32, without gradient."""
    weight = leaf.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def policy_of_outcomes(
    base: PrecisionPolicy, every: Mapping[str, Leaf], outcomes: Mapping[str, Outcome], name: str
) -> PrecisionPolicy:
    """The precision of a quantised model: by role where all of a role agree, by name elsewhere.

    Args:
        base: of the model before; its compute dtype and strictness stay.
        every: all leaves of the model by name, under `base`.
        outcomes: by name of the leaf.
        name: of the policy.
    """
    uses: dict[LeafPrecision, list[str]] = {}
    for leaf_name, leaf in every.items():
        assert leaf.precision is not None
        use = leaf.precision
        if leaf_name in outcomes:
            use = _precision(use, outcomes[leaf_name])
        uses.setdefault(use, []).append(leaf_name)
    rules: list[Rule] = []
    for use, names in uses.items():
        roles = tuple(sorted({every[n].role for n in names}))
        if [n for n, leaf in every.items() if leaf.role in roles] == names:
            rules.append(Rule(use=use, roles=roles))
        else:
            rules += [Rule(use=use, name=n) for n in names]
    default = LeafPrecision.of(base.default.compute)
    return PrecisionPolicy(name=name, default=default, rules=tuple(rules), strict=base.strict)


def _precision(before: LeafPrecision, outcome: Outcome) -> LeafPrecision:
    """Weights as they stand, inputs as the method says; gradients, if ever, only cast."""
    cast = before.compute
    operands = {"fprop_x": outcome.inputs or cast, "fprop_w": outcome.weights or "fp32"}
    return LeafPrecision.of({"all": cast, **operands, "compute": cast})


@torch.no_grad()
def output_error(old: Leaf, new: Leaf, rows: list[Tensor]) -> float:
    """||y - y^|| / ||y|| on the rows of calibration; of the weight itself without any."""
    weight, x = weight_of(old), torch.cat(rows)
    if isinstance(new, ValueTable) or not len(x):
        return float((weight - weight_of(new)).norm() / weight.norm())
    if isinstance(new, ExpertLinear):
        y = torch.cat([part @ w.T for part, w in zip(rows, weight, strict=True)])
        found = new(x, torch.tensor([len(part) for part in rows]))
    else:
        y = F.linear(x, weight, getattr(old, "bias", None))
        found = new(x)
    return float((found.float() - y).norm() / y.norm())
