"""The directory of a quantised run.

quantize.json        method, options, what became of each leaf, bits per byte, bytes
recipe.yaml          the run's, with the precision that the quantised model computes in
weights.safetensors  weights already rounded, as float32; scales, shifts, low-rank factors
result.json          the run's, with the quantised model's figures and no curve
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from layers.base import Cost
from recipes import load, record
from recipes.costing import run_cost, whole_model_cost
from recipes.loop_health import words_of
from recipes.metrics import Evaluation
from recipes.task import LanguageModelTask
from zoo.precision import policy_of
from zoo.pretrained import own_tensors


def write_quantized(
    run: Path,
    out: Path,
    made: LanguageModelTask,
    result: Mapping[str, Any],
    after: Evaluation,
    bits: Mapping[str, float],
) -> None:
    """Write the directory, whole or not at all.

    Args:
        run: what was quantised.
        out: the new directory.
        made: the quantised model under its recipe.
        result: the content of quantize.json.
        after: its evaluation.
        bits: storage per number of the weights that were quantised, by parameter name.
    """
    tensors = own_tensors(made.model)
    with record.filling(out) as part:
        weights = part / "weights.safetensors"
        record.write_text(part / "recipe.yaml", load.to_yaml(made.recipe))
        record.write_json(part / "quantize.json", result)
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, weights)
        weights.chmod(0o644)  # as the other files; the library writes 0600
        trained = record.read_result(run)
        if trained is not None:
            record.write_json(part / "result.json", _run_result(trained, made, after, bits))


def _run_result(
    trained: dict[str, Any], made: LanguageModelTask, after: Evaluation, bits: Mapping[str, float]
) -> dict[str, Any]:
    """result.json, so that a report lays the quantised model beside the run."""
    precision = f"{trained['precision']}+{policy_of(made.recipe.precision).name}"
    whole = whole_model_cost(made.recipe)
    cost = Cost(tuple(replace(item, bits=bits.get(item.name, item.bits)) for item in whole))
    return trained | {
        "id": f"{trained['variant']}-{precision}-s{trained['seed']}",
        "precision": precision,
        "recipe": load.to_plain(made.recipe),
        "cost": asdict(run_cost(cost, tied=made.recipe.model.tie_embeddings)),
        "final": asdict(after.final()),
        "load": [asdict(layer) for layer in after.load.loads()],
        "health": [asdict(layer) for layer in after.health.layers()],
        "memory": [asdict(layer) for layer in after.memory.layers()],
        "density": [asdict(layer) for layer in after.density.layers()],
        "loops": [asdict(layer) for layer in after.loops.layers(words_of(made.recipe.data))],
        "widths": [],
        "losses": after.losses,
        "curve": [],
        "sample": None,
    }
