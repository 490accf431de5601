"""Convert the dense layers of a finished run, and say what that cost before training.

convert.json         what it came from, options, each layer's receipt, bits per byte, parameters
recipe.yaml          the run's, with the converted layers and weights of the new losses; its
                     `init_from` is this directory, so that training it goes on from here
weights.safetensors  of the converted model
result.json          the run's, with the new model's figures and no curve, so that a report lays
                     both side by side; steps, tokens and speed are those of the dense training
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from recipes import load, record
from recipes.costing import whole_model_cost
from recipes.curve import final_evaluation
from recipes.data import TextData
from recipes.derived import check_run, run_result
from recipes.metrics import Evaluation
from recipes.quantize import read_model
from recipes.runtime import settings
from recipes.schema import Recipe
from recipes.task import LanguageModelTask
from zoo.conversion import Conversion, convert, teach_routers
from zoo.conversion.methods import method_of
from zoo.pretrained import write_weights


@dataclass(frozen=True, kw_only=True)
class _Teaching:
    """Types of what does not belong to a conversion."""

    teach_steps: int = 0

    def __post_init__(self) -> None:
        if self.teach_steps < 0:
            raise ValueError(f"teach_steps must not be negative, got {self.teach_steps}")


def convert_run(
    run: Path | str,
    /,
    *,
    to: str = "upcycle",
    out: Path | str | None = None,
    teach_steps: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Turn the dense layers of a finished run into others, in a directory of its own.

    `zoo train OUT/recipe.yaml` goes on from its weights; of factor_llm with the dense run as the
    teacher of its routers (`recipes.prior`), unless told prior_teacher=null.

    Args:
        run: a finished run's directory, its chosen layers `swiglu` (spark: or `mlp`).
        to: a row of `zoo.conversion.METHODS`: upcycle | granular | drop | factor_llm | spt |
            versatile | spark.
        out: a directory that is not there yet; None: beside the run, named after the conversion.
        teach_steps: batches of the run's training data on which the dense model teaches the routers
            of factor_llm, before bits per byte are measured; receipts are of before.
        options: of the conversion (`zoo.conversion.methods`), e.g. n_experts=8; what is drawn
            comes from the recipe's seed.

    Returns:
        The content of convert.json.

    Raises:
        ValueError: no finished run there, one that is quantised or packed, an unknown conversion or
            option, a layer that is not dense, a directory in the way.
    """
    run, row = Path(run).resolve(), method_of(to)
    chosen = load.merge(row, {}, options, what=f"{to} option")
    load.merge(_Teaching, {}, {"teach_steps": teach_steps}, what="convert")
    if teach_steps and to != "factor_llm":
        raise ValueError(f"teach_steps is of factor_llm, which has labels for routers, not of {to}")
    check_run(run, "convert")
    out = Path(str(out)) if out else run.with_name(f"{run.name}-{to}")
    if out.exists():
        raise ValueError(f"{out} is already there: give another out=, or delete it")
    dense = read_model(run)
    made = convert(dense.model, to, seed=dense.recipe.seed, **vars(chosen))
    weights = chosen.loss_weights(len(made.receipts))
    teacher = str(run) if "prior" in weights else None
    recipe = _recipe(dense.recipe, made, weights, out, teacher)
    load.check(recipe)
    with settings(recipe.trainer), record.filling(out) as part:
        data = TextData(recipe.data, recipe.seed, recipe.trainer.accumulate)
        taught = _taught(made, dense, data, teach_steps)
        record.write_text(part / "recipe.yaml", load.to_yaml(recipe))
        write_weights(made.model, part / "weights.safetensors")
        (part / "weights.safetensors").chmod(0o644)  # as the other files; the library writes 0600
        after = read_model(part)  # as it will be read
        found = [(task.recipe, final_evaluation(task, data)) for task in (dense, after)]
        about = {"to": to, "options": load.to_plain(chosen), "run": run.name, "seed": recipe.seed}
        result = about | taught | _measured(made, found)
        record.write_json(part / "convert.json", result)
        trained = record.read_result(run)
        if trained is not None:
            as_run = run_result(trained, recipe, to, found[1][1])
            record.write_json(part / "result.json", as_run)
    return result


def show(result: Mapping[str, Any]) -> None:
    """A short table of what `convert_run` returned."""
    print(f"{'layer':>5s} {'largest difference':>19s} {'mean':>10s} {'scale':>7s}")
    for layer in result["layers"]:
        print(
            f"{layer['layer']:5d} {layer['largest']:19.2e} {layer['mean']:10.2e} "
            f"{layer['scale']:7.4f}"
        )
    if result["teach"]["loss"]:
        first, last = result["teach"]["loss"]
        print(
            f"routers taught for {result['teach']['steps']} steps: {first:.3f} -> {last:.3f} nats"
        )
    bpb, params, active = result["bpb"], result["params"], result["active_params"]
    print(
        f"{result['to']}: {bpb['before']:.4f} -> {bpb['after']:.4f} bits/byte, "
        f"{params['before']:,} -> {params['after']:,} parameters, "
        f"{active['before']:,.0f} -> {active['after']:,.0f} active"
    )


def _recipe(
    recipe: Recipe, made: Conversion, weights: dict[str, float], out: Path, teacher: str | None
) -> Recipe:
    """The run's recipe with the converted model, to train on from its weights.

    weights: of the new losses; those of the run win. teacher: the dense run, where it goes on
    teaching.
    """
    return replace(
        recipe, model=made.model.config, loss_weights=weights | recipe.loss_weights,
        init_from=str(out), prior_teacher=teacher,
    )  # fmt: skip


def _taught(
    made: Conversion, dense: LanguageModelTask, data: TextData, n_steps: int
) -> dict[str, Any]:
    """The routers taught; what convert.json says of it."""
    batches = (batch.tokens for batch in islice(data.train_dataloader(), n_steps))
    losses = teach_routers(made.model, dense.model, batches) if n_steps else []
    return {"teach": {"steps": n_steps, "loss": [losses[0], losses[-1]] if losses else None}}


def _measured(made: Conversion, found: Sequence[tuple[Recipe, Evaluation]]) -> dict[str, Any]:
    """Receipts and what was found of the dense model and of the mixture, in this order."""
    names = ("before", "after")
    costs = [whole_model_cost(recipe) for recipe, _ in found]
    bpb = [evaluation.bpb.final().bpb for _, evaluation in found]
    return {
        "layers": [asdict(each) for each in made.receipts],
        "bpb": dict(zip(names, bpb, strict=True)),
        "params": dict(zip(names, (cost.params for cost in costs), strict=True)),
        "active_params": dict(zip(names, (cost.active_params for cost in costs), strict=True)),
        "versions": record.versions(),
        "commit": record.commit(),
    }
