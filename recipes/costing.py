"""What a recipe's model costs, counted from its config alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from layers.base import Cost
from recipes.nested import Nesting
from recipes.schema import Recipe
from zoo.accounting import stored
from zoo.extract import extracted_config
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


def training_flops(recipe: Recipe) -> float:
    """Matmul FLOPs per token of forward and backward, mean over the steps of the run.

    Of nested training, those of the granularities that its steps run.
    """
    if recipe.nested is None:
        return whole_model_cost(recipe).training_flops
    nesting = Nesting(recipe)
    flops = [submodel_cost(recipe, widths).training_flops for widths in nesting.widths]
    return nesting.mean_over_steps(flops, recipe.trainer.max_steps)


def submodel_cost(recipe: Recipe, widths: Sequence[int | None]) -> Cost:
    """`whole_model_cost` of the plain model that a nested one runs at these widths, by layer."""
    model = extracted_config(recipe.model, widths)
    return whole_model_cost(replace(recipe, model=model, nested=None))


def run_cost(cost: Cost, *, tied: bool, training_flops: float | None = None) -> "RunCost":
    """A cost as records keep it.

    tied: the head reads the embedding's table; training_flops: per token, as the run trained;
    None: those of the whole model.
    """
    from recipes.report.records import RunCost

    roles = cost.by_role()
    outside = ("embedding",) if tied else ("embedding", "head")
    embedding = sum(roles[role].params for role in outside if role in roles)
    return RunCost(
        params=cost.params,
        active_params=cost.active_params,
        nonembedding_params=cost.params - embedding,
        flops_per_token=cost.flops,
        training_flops_per_token=(
            cost.training_flops if training_flops is None else training_flops
        ),
        other_flops_per_token=cost.other_flops,
        flops_by_role={role: part.flops for role, part in roles.items()},
        params_by_role={role: float(part.params) for role, part in roles.items()},
        weight_bytes_per_token={str(n): cost.weight_bytes_at(n) for n in BYTES_AT_TOKENS},
    )
