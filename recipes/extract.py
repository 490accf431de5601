"""A submodel of a finished nested run, as the directory of a plain run.

extract.json         what it came from, the width of each layer, bits per byte and cost of the
                     whole model (before) and of the extracted one (after)
recipe.yaml          the run's, with plain layers of these widths and no nested training; its
                     `init_from` is this directory, so that training it goes on from here
weights.safetensors  of the extracted model
result.json          the run's, with the new model's figures and no curve; steps, tokens and speed
                     are those of the nested training
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layers.names import check_positive
from recipes import load, record
from recipes.costing import whole_model_cost
from recipes.curve import final_evaluation
from recipes.data import TextData
from recipes.derived import check_run, run_result
from recipes.quantize import read_model
from recipes.runtime import settings
from recipes.task import LanguageModelTask
from zoo.extract import SubWidths, extract, layer_widths
from zoo.mixnmatch import least_slope
from zoo.model import ModelConfig
from zoo.pretrained import write_weights


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What is extracted: widths as they are said, or as a budget has them."""

    widths: Any = None  # one number for every nested layer, or a list with one for each layer
    hidden: int | None = None  # these budgets and multiple_of: as in zoo.least_slope
    params: float | None = None
    flops: float | None = None
    multiple_of: int | None = None
    heads: int | None = None  # the first so many of every layer; beside widths or alone

    def __post_init__(self) -> None:
        budgets = {"hidden": self.hidden, "params": self.params, "flops": self.flops}
        given = {name: n for name, n in budgets.items() if n is not None}
        said = [*(["widths"] if self.widths is not None else []), *given]
        if len(said) > 1 or not (said or self.heads is not None):
            raise ValueError(
                f"extract takes one of widths, {', '.join(budgets)}, or heads alone, "
                f"got {said or 'none'}"
            )
        check_positive(**given)
        if self.multiple_of is not None and not given:
            raise ValueError("multiple_of is of a budget: leave it out where none is given")
        _check_widths(self.widths)

    def settled(self, config: ModelConfig) -> tuple[int | None, ...]:
        """The width of each layer, None where all of it is taken."""
        if self.widths is not None or (self.hidden, self.params, self.flops) == (None,) * 3:
            return layer_widths(config, self.widths)
        return least_slope(
            config, hidden=self.hidden, params=self.params, flops=self.flops,
            multiple_of=self.multiple_of,
        )  # fmt: skip


def extract_run(
    run: Path | str, /, *, out: Path | str | None = None, **options: Any
) -> dict[str, Any]:
    """Write a submodel of a finished nested run as a plain run, in a directory of its own.

    Args:
        run: a finished run's directory; for widths, some of its layers nested (matformer, moe).
        out: a directory that is not there yet; None: beside the run, with "-extract" behind.
        options: of `ExtractOptions`, e.g. widths=64, widths=[64, 64, 128] or params=1e6 (of the
            model with all of its heads).

    Returns:
        The content of extract.json.

    Raises:
        ValueError: no finished run there, one that is quantised or packed, no nested layer, a width
            that a layer does not have, a budget below the narrowest submodel's, a directory in the
            way.
    """
    run = Path(run).resolve()
    said = load.merge(ExtractOptions, {}, options, what="extract")
    check_run(run, "extract from")
    out = Path(str(out)) if out else run.with_name(f"{run.name}-extract")
    if out.exists():
        raise ValueError(f"{out} is already there: give another out=, or delete it")
    whole = read_model(run)
    widths = said.settled(whole.recipe.model)
    made = extract(whole.model, widths, heads=said.heads)
    recipe = replace(whole.recipe, model=made.config, nested=None, init_from=str(out))
    load.check(recipe)
    with settings(recipe.trainer), record.filling(out) as part:
        data = TextData(recipe.data, recipe.seed, recipe.trainer.accumulate)
        record.write_text(part / "recipe.yaml", load.to_yaml(recipe))
        write_weights(made, part / "weights.safetensors")
        (part / "weights.safetensors").chmod(0o644)  # as the other files; the library writes 0600
        tasks = (whole, read_model(part))  # as it will be read
        found = [final_evaluation(task, data) for task in tasks]
        result = {"run": run.name, "widths": list(widths), "heads": said.heads, "seed": recipe.seed}
        result |= _figures(tasks, [each.bpb.final().bpb for each in found])
        record.write_json(part / "extract.json", result)
        trained = record.read_result(run)
        if trained is not None:
            as_run = run_result(trained, recipe, label(widths, said.heads), found[1])
            record.write_json(part / "result.json", as_run)
    return result


def show(result: Mapping[str, Any]) -> None:
    """Two lines on what `extract_run` returned."""
    bpb, params, flops = result["bpb"], result["params"], result["flops_per_token"]
    widths = ", ".join("all" if w is None else str(w) for w in result["widths"])
    print(f"widths {widths}; heads {result['heads'] or 'all'}")
    print(
        f"{bpb['before']:.4f} -> {bpb['after']:.4f} bits/byte, "
        f"{params['before']:,} -> {params['after']:,} parameters, "
        f"{flops['before']:,.0f} -> {flops['after']:,.0f} FLOPs a token"
    )


def label(widths: Sequence[int | None], heads: int | None) -> str:
    """What was taken, widths from the first layer on: "w64", "w2x32+4x64-h4"."""
    runs: list[list[int]] = []  # width, how many layers in a row
    for width in (w for w in widths if w is not None):
        if runs and runs[-1][0] == width:
            runs[-1][1] += 1
        else:
            runs.append([width, 1])
    said = str(runs[0][0]) if len(runs) == 1 else "+".join(f"{n}x{width}" for width, n in runs)
    return "-".join([*([f"w{said}"] if runs else []), *([f"h{heads}"] if heads else [])])


def _check_widths(widths: SubWidths | Any) -> None:
    """Raise unless it is None, a number, or a list of numbers and None."""
    each = widths if isinstance(widths, list | tuple) else [widths]
    if any(isinstance(w, bool) or not isinstance(w, int | None) for w in each):
        raise ValueError(f"widths must be a number, or a list of one for each layer, got {widths}")


def _figures(tasks: Sequence[LanguageModelTask], bpb: Sequence[float]) -> dict[str, Any]:
    """What was found of the whole model and of the extracted one, in this order."""
    names = ("before", "after")
    costs = [whole_model_cost(task.recipe) for task in tasks]
    return {
        "bpb": dict(zip(names, bpb, strict=True)),
        "params": dict(zip(names, (cost.params for cost in costs), strict=True)),
        "flops_per_token": dict(zip(names, (cost.flops for cost in costs), strict=True)),
        "versions": record.versions(),
        "commit": record.commit(),
    }
