"""What runs made from a finished run's weights have in common: conversions, extracted submodels."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes import load
from recipes.costing import run_cost, whole_model_cost
from recipes.loop_health import words_of
from recipes.metrics import Evaluation
from recipes.names import ffn_label
from recipes.schema import Recipe

CHANGED = {"quantize.json": "quantised", "pack.json": "packed"}


def check_run(run: Path, verb: str) -> None:
    """Raise where no finished run lies whose weights are its own. verb: what is done to it."""
    if not (run / "recipe.yaml").is_file() or not (run / "weights.safetensors").is_file():
        raise ValueError(f"{run}: no recipe.yaml and weights.safetensors: is it a finished run?")
    for name, word in CHANGED.items():
        if (run / name).is_file():
            raise ValueError(f"{run} is {word}: {verb} the run that it came from")


def run_result(
    trained: dict[str, Any], recipe: Recipe, label: str, after: Evaluation
) -> dict[str, Any]:
    """result.json of the made run: the trained one's, with the new model's figures and no curve.

    Args:
        trained: result.json of the run that it was made from.
        recipe: of the made run.
        label: appended to the variant's name.
        after: the made model's last evaluation.
    """
    variant = f"{trained['variant']}-{label}"
    return trained | {
        "id": f"{variant}-{trained['precision']}-s{trained['seed']}",
        "variant": variant,
        "ffn": ffn_label(recipe.model.ffn),
        "recipe": load.to_plain(recipe),
        "cost": asdict(run_cost(whole_model_cost(recipe), tied=recipe.model.tie_embeddings)),
        "final": asdict(after.final()),
        "load": [asdict(layer) for layer in after.load.loads()],
        "health": [asdict(layer) for layer in after.health.layers()],
        "memory": [asdict(layer) for layer in after.memory.layers()],
        "density": [asdict(layer) for layer in after.density.layers()],
        "loops": [asdict(layer) for layer in after.loops.layers(words_of(recipe.data))],
        "widths": [],
        "losses": after.losses,
        "sharpness": after.sharpness.value(),
        "curve": [],
        "sample": None,
    }
