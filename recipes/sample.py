"""Text from a finished run."""

from pathlib import Path

from layers.names import check_positive
from layers.precision import seed_rounding
from recipes import load
from recipes.runtime import settings
from recipes.text import tokenizer
from zoo.generate import generate
from zoo.model import build
from zoo.precision import rounding_seed
from zoo.pretrained import building, load_weights


def continue_text(
    run: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    mapped: bool = False,
) -> str:
    """What the model of a run directory goes on with after `prompt`, computed as the run computes.

    mapped: memory tables stay on the disk (`zoo.mapped`).

    Raises:
        ValueError: for a directory without a finished run, damaged weights, an empty prompt, or
            an option out of range.
    """
    if not (run / "recipe.yaml").is_file() or not (run / "weights.safetensors").is_file():
        raise ValueError(
            f"{run}: no recipe.yaml and weights.safetensors there: is it a finished run?"
        )
    check_positive(tokens=max_new_tokens)
    if not prompt:
        raise ValueError("prompt is empty: give at least one character")
    recipe = load.load(run / "recipe.yaml")
    if recipe.data.task is not None:
        raise ValueError(
            f"{run} was trained on a task, not on text: there is nothing to go on with"
        )
    n_steps = recipe.trainer.max_steps
    weights = run / "weights.safetensors"
    with building(weights, mapped=mapped):
        model = build(
            recipe, step=n_steps - 1, max_steps=n_steps
        )  # in the formats of its last step
    load_weights(model, weights, mapped=mapped)
    seed_rounding(model, rounding_seed(recipe.seed, recipe.precision), n_steps)
    encoder = tokenizer(recipe.data.tokenizer)
    ids = encoder.encode(prompt)[None]
    with settings(recipe.trainer):  # the same paths of matmuls, so the same bits
        new = generate(
            model, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
            seed=seed,
        )  # fmt: skip
    return encoder.decode(new[0, ids.shape[1] :])
