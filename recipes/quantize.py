"""Quantise a finished run after training, and say what that cost in bits per byte."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from layers.names import check_positive
from layers.posttraining.calibration import collect
from layers.posttraining.correction import attach_corrections
from layers.posttraining.methods import Method, method_of
from layers.posttraining.outcome import (
    Outcome,
    is_table,
    output_error,
    policy_of_outcomes,
    put,
    weight_of,
)
from layers.precision import Leaf, QSpec, leaves, seed_rounding
from layers.precision.policy import HIGH_ROLES
from recipes import load, record
from recipes.curve import final_evaluation
from recipes.data import TextData
from recipes.quantized_run import write_quantized
from recipes.runtime import settings
from recipes.schema import Recipe
from recipes.task import LanguageModelTask
from zoo.precision import policy_of, rounding_seed, set_precision
from zoo.pretrained import load_weights

HIGH_BITS = 16  # that a weight which stays high counts in bytes


@dataclass(frozen=True, kw_only=True)
class _Calibration:
    """Types of what does not belong to a method."""

    calibration_batches: int = 4
    calibration_rows: int = 512

    def __post_init__(self) -> None:
        check_positive(
            calibration_batches=self.calibration_batches, calibration_rows=self.calibration_rows
        )


def quantize_run(
    run: Path | str,
    /,
    *,
    method: str = "rtn",
    out: Path | str | None = None,
    calibration_batches: int = 4,
    calibration_rows: int = 512,
    **options: Any,
) -> dict[str, Any]:
    """Quantise the weights and inputs of a run's leaves; router, norms, embedding, head stay high.

    Args:
        run: a finished run's directory; its first training batches calibrate.
        method: a row of `layers.posttraining.methods.METHODS`.
        out: a directory that is not there yet; None: beside the run, named after the method.
        calibration_batches: how many.
        calibration_rows: of inputs to keep for each matrix.
        options: of the method (`layers.posttraining.options`), e.g. format="nvfp4".

    Returns:
        The content of quantize.json.

    Raises:
        ValueError: no finished run there, one that is quantised already, an unknown method,
            format or option, a directory in the way.
    """
    run, row = Path(run).resolve(), method_of(method)
    chosen = load.merge(row.options, {}, options, what=f"{method} option")
    said = {"calibration_batches": calibration_batches, "calibration_rows": calibration_rows}
    load.merge(_Calibration, {}, said, what="quantize")
    recipe = _recipe(run)
    label = f"{method}-{QSpec.of(chosen.format).format}"
    out = Path(str(out)) if out else run.with_name(f"{run.name}-{label}")
    if out.exists():
        raise ValueError(f"{out} is already there: give another out=, or delete it")
    with settings(recipe.trainer):
        data = TextData(recipe.data, recipe.seed, recipe.trainer.accumulate)
        task = _as_trained(run, recipe, data.domains)
        before = final_evaluation(task, data)
        rows = _calibrate(task, data, calibration_batches, calibration_rows)
        outcomes = _outcomes(task, rows, row, chosen)
        made = _quantized(task, outcomes, label)
        after = final_evaluation(made, data)
        result = {
            "method": method,
            "options": load.to_plain(chosen),
            "run": run.name,
            "calibration": {"batches": calibration_batches, "rows": calibration_rows},
            "leaves": _leaf_rows(task, made, rows, outcomes),
            "bpb": {"before": before.bpb.final().bpb, "after": after.bpb.final().bpb},
            "bytes": _bytes(task, outcomes),
            "versions": record.versions(),
            "commit": record.commit(),
        }
        bits = {f"{name}.weight": outcome.bits for name, outcome in outcomes.items()}
        write_quantized(run, out, made, result, after, bits)
    return result


def read_model(run: Path) -> LanguageModelTask:
    """The model of a run directory, quantised or not, as a task without data."""
    return _as_trained(run, load.load(run / "recipe.yaml"), ())


def show(result: Mapping[str, Any]) -> None:
    """A short table of what `quantize_run` returned."""
    print(f"{'leaf':32s} {'weights':>10s} {'inputs':>10s} {'bits':>6s} {'output error':>12s}")
    for leaf in result["leaves"]:
        print(
            f"{leaf['name']:32s} {leaf['weights']:>10s} {leaf['inputs']:>10s} "
            f"{leaf['bits']:6.2f} {leaf['output_error']:12.2%}"
        )
    bpb, size = result["bpb"], result["bytes"]
    print(
        f"{result['method']}: {bpb['before']:.4f} -> {bpb['after']:.4f} bits/byte, "
        f"{size['before']:,} -> {size['after']:,} bytes of weights"
    )


def _recipe(run: Path) -> Recipe:
    """The recipe of a finished run. Raises ValueError where there is none, or it is quantised."""
    if not (run / "recipe.yaml").is_file() or not (run / "weights.safetensors").is_file():
        raise ValueError(f"{run}: no recipe.yaml and weights.safetensors: is it a finished run?")
    if (run / "quantize.json").is_file():
        raise ValueError(f"{run} is quantised already: quantise the run that it came from")
    return load.load(run / "recipe.yaml")


def _as_trained(run: Path, recipe: Recipe, domains: tuple[str, ...]) -> LanguageModelTask:
    """The run's model with its weights, in the formats of its last step."""
    task, n_steps = LanguageModelTask(recipe, domains), recipe.trainer.max_steps
    set_precision(task.model, recipe.precision, step=n_steps - 1, max_steps=n_steps)
    attach_corrections(task.model, load_file(run / "weights.safetensors"))
    load_weights(task.model, run / "weights.safetensors")
    seed_rounding(task.model, rounding_seed(recipe.seed, recipe.precision), n_steps)
    return task


def _targets(task: LanguageModelTask) -> dict[str, Leaf]:
    """The leaves to quantise, by name."""
    return {n: leaf for n, leaf in leaves(task.model).items() if leaf.role not in HIGH_ROLES}


def _calibrate(
    task: LanguageModelTask, data: TextData, n_batches: int, n_rows: int
) -> dict[str, list[Tensor]]:
    """Inputs of every target over the first training batches."""
    batches, run = islice(data.train_dataloader(), n_batches), task.model.eval()
    return collect(lambda batch: run(batch.tokens), batches, _targets(task), rows=n_rows)


@torch.no_grad()
def _outcomes(
    task: LanguageModelTask, rows: Mapping[str, list[Tensor]], row: Method, options: Any
) -> dict[str, Outcome]:
    return {
        name: row.quantize(weight_of(leaf), rows[name], options, is_table(leaf))
        for name, leaf in _targets(task).items()
    }


def _quantized(
    task: LanguageModelTask, outcomes: Mapping[str, Outcome], label: str
) -> LanguageModelTask:
    """A second task, whose model has the outcomes in place of its weights."""
    base = policy_of(task.recipe.precision)
    policy = policy_of_outcomes(base, leaves(task.model), outcomes, label)
    made = LanguageModelTask(replace(task.recipe, precision=policy.to_plain()), task.domains)
    made.model.load_state_dict(task.model.state_dict(), strict=False)
    for name, leaf in _targets(made).items():
        put(outcomes[name], leaf)
    return made


def _leaf_rows(
    task: LanguageModelTask, made: LanguageModelTask, rows: Mapping[str, list[Tensor]],
    outcomes: Mapping[str, Outcome],
) -> list[dict[str, Any]]:  # fmt: skip
    """What became of each leaf."""
    old, new = _targets(task), _targets(made)
    return [
        {
            "name": name,
            "role": old[name].role,
            "shape": list(outcome.weight.shape),
            "weights": outcome.format,
            "inputs": outcome.inputs.format if outcome.inputs else "high",
            "bits": outcome.bits,
            "output_error": output_error(old[name], new[name], rows[name]),
        }
        for name, outcome in outcomes.items()
    ]


def _bytes(task: LanguageModelTask, outcomes: Mapping[str, Outcome]) -> dict[str, int]:
    """All weights, those that stay high at 16 bits."""
    before = sum(p.numel() for p in task.model.parameters()) * HIGH_BITS
    saved = sum(o.weight.numel() * (HIGH_BITS - o.bits) for o in outcomes.values())
    return {"before": before // 8, "after": round((before - saved) / 8)}
