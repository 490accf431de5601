"""What a recipe's model costs, counted from its config alone."""

from typing import TYPE_CHECKING

from layers.base import Cost
from recipes.schema import Recipe
from zoo.accounting import stored
from zoo.model import model_cost
from zoo.precision import policy_of

if TYPE_CHECKING:
    from recipes.report.records import RunCost

# Tokens processed together at which weight bytes per token are stated (comparison.md 2.3)
BYTES_AT_TOKENS = (1, 16, 256, 4096)


def whole_model_cost(recipe: Recipe) -> Cost:
    """Cost per token at the recipe's sequence length, weights stored in its precision."""
    cost = model_cost(recipe.model, recipe.data.seq_len)
    return stored(cost, policy_of(recipe.precision), recipe.model.n_layers)


def run_cost(cost: Cost, *, tied: bool) -> "RunCost":
    """A cost as records keep it. tied: the head reads the embedding's table."""
    from recipes.report.records import RunCost

    roles = cost.by_role()
    outside = ("embedding",) if tied else ("embedding", "head")
    embedding = sum(roles[role].params for role in outside if role in roles)
    return RunCost(
        params=cost.params,
        active_params=cost.active_params,
        nonembedding_params=cost.params - embedding,
        flops_per_token=cost.flops,
        training_flops_per_token=cost.training_flops,
        other_flops_per_token=cost.other_flops,
        flops_by_role={role: part.flops for role, part in roles.items()},
        params_by_role={role: float(part.params) for role, part in roles.items()},
        weight_bytes_per_token={str(n): cost.weight_bytes_at(n) for n in BYTES_AT_TOKENS},
    )
