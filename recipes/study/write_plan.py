"""plan.json: what a study's report needs of its plan, so that it need not be planned again."""

from collections.abc import Iterable
from dataclasses import asdict

from layers.base import Cost
from recipes import load, record
from recipes.costing import whole_model_cost
from recipes.names import precision_label
from recipes.planned import placeless
from recipes.report.records import SCHEMA, Choice
from recipes.schema import Recipe, TableConfig
from recipes.study.plan import StudyPlan, StudyRun
from recipes.study.records import (
    PLAN,
    CellRecord,
    ControlRecord,
    ModelRecord,
    PlannedRecord,
    PlanRecord,
)
from zoo.model import model_cost

MASTER = 4  # bytes of a float32 number, in which weights, gradients and states are kept
TABLE_ROLE = "memory_values"


def write_plan(plan: StudyPlan, runs: Iterable[StudyRun]) -> PlanRecord:
    """Write plan.json with the runs that are known so far."""
    found = plan_record(plan, runs)
    record.write_json(plan.out / PLAN, asdict(found))
    return found


def plan_record(plan: StudyPlan, runs: Iterable[StudyRun]) -> PlanRecord:
    """A plan as its directory keeps it."""
    s, primary = plan.study, plan.study.hold[0]
    planned: list[PlannedRecord] = []
    models: dict[str, ModelRecord] = {}
    for run in {run.id: run for run in runs}.values():
        hold = [] if run.stage == "tuning" or primary in run.holds else [run.holds[0]]
        key = "/".join([run.size, run.variant, *hold])
        if key not in models:
            models[key] = _model(run)
        planned.append(
            PlannedRecord(
                id=run.id, stage=run.stage, size=run.size, variant=run.variant,
                precision=run.precision, seed=run.seed, lr=run.recipe.optim.lr, holds=run.holds,
                model=key, inside=run.inside,
                recipe_sha256=record.fingerprint(
                    placeless(load.to_plain(run.recipe), run.inside)
                ),
            )
        )  # fmt: skip
    cells = tuple(
        CellRecord(
            size=c.size.label, hold=c.hold, target=c.target,
            variants=tuple(v.label for v in c.variants), matched=c.matched,
            unreachable=c.unreachable,
        )
        for c in plan.cells
    )  # fmt: skip
    return PlanRecord(
        schema=SCHEMA,
        name=s.name,
        study=plan.resolved,
        baseline=Choice(variant=s.baseline.variant, precision=s.baseline.precision),
        holds=tuple(s.hold),
        sizes=plan.sizes,
        variants=tuple(v for v in _first(plan) if v not in plan.controls),
        precisions=tuple(precision_label(p) for p in s.precisions),
        seeds=tuple(s.seeds),
        cells=cells,
        controls={k: ControlRecord(kind=c.kind, of=c.of) for k, c in plan.controls.items()},
        models=models,
        runs=tuple(planned),
    )


def _first(plan: StudyPlan) -> list[str]:
    """Labels of the first cell: the primary budget is met by all."""
    return [v.label for v in plan.cells[0].variants]


def _model(run: StudyRun) -> ModelRecord:
    recipe = run.recipe
    cost = whole_model_cost(recipe)
    trainer, data, config = recipe.trainer, recipe.data, recipe.model
    roles = cost.by_role()
    outside = {"embedding", "head"} & roles.keys()
    strict = sum(roles[role].active_params for role in roles if role not in outside)
    return ModelRecord(
        size=run.size,
        variant=run.variant,
        active_strict=strict,
        active_with_head=strict + config.vocab_size * config.d_model,
        weight_bytes=MASTER * cost.params,
        gradient_bytes=MASTER * cost.params,
        optimizer_bytes=optimizer_bytes(recipe, cost),
        tokens_per_step=trainer.accumulate * data.batch_size * data.seq_len,
        traced_as=model_cost(config, data.seq_len, causal=False).flops,
    )


def optimizer_bytes(recipe: Recipe, cost: Cost) -> int:
    """State of the recipe's optimizer: two moments of AdamW, or what the tables' own keeps."""
    table = recipe.optim.table
    total = 0.0
    for item in cost:
        apart = table is not None and item.role == TABLE_ROLE and table.optimizer != "adamw"
        if apart and table is not None:
            total += _row_state(table, item.params, item.units)
        else:
            total += 2 * MASTER * item.params
    return round(total)


def _row_state(t: TableConfig, params: int, rows: int) -> float:
    """Bytes of row_adam's or row_adagrad's state (recipes/row_optim.py)."""
    second = rows if t.second_moment == "row" else params
    decays = 2 * MASTER * rows if t.weight_decay else 0  # in float64
    if t.optimizer == "row_adagrad":
        return MASTER * second + decays
    counted, faded = t.bias_correction == "row", t.moments == "decayed"
    return MASTER * (params + second + rows * (counted + faded)) + decays
