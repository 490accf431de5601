"""Pack a finished run: a run directory whose weights are real codes and scales.

recipe.yaml          the run's
weights.safetensors  packed, with the precisions that they compute in; `zoo generate` reads it
pack.json            each packed leaf with its bits, and the bytes of the whole before and after
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layers.precision import seed_rounding
from recipes import load, record
from zoo.model import build
from zoo.packing import PackReport, pack
from zoo.precision import rounding_seed
from zoo.pretrained import load_weights, write_weights


def pack_run(
    run: Path | str, *, precision: Any = None, out: Path | str | None = None
) -> PackReport:
    """Write a run with packed weights into a directory of its own.

    Args:
        run: a finished run's directory.
        precision: to pack in; None: that in which the run ended.
        out: a directory that is not there yet; None: beside the run, with "-packed" behind.

    Raises:
        ValueError: no finished run there, a directory in the way, or as `zoo.packing.pack`.
    """
    run = Path(run)
    out = Path(out) if out else run.with_name(f"{run.name}-packed")
    if not (run / "recipe.yaml").is_file() or not (run / "weights.safetensors").is_file():
        raise ValueError(
            f"{run}: no recipe.yaml and weights.safetensors there: is it a finished run?"
        )
    if out.exists():
        raise ValueError(f"{out} is already there: give another out=, or delete it")
    recipe = load.load(run / "recipe.yaml")
    n_steps = recipe.trainer.max_steps
    model = build(recipe, precision, step=n_steps - 1, max_steps=n_steps)
    load_weights(model, run / "weights.safetensors")
    seed_rounding(model, rounding_seed(recipe.seed, recipe.precision), n_steps)
    report = pack(model)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        shutil.copy(run / "recipe.yaml", part / "recipe.yaml")
        write_weights(model, part / "weights.safetensors")
        (part / "weights.safetensors").chmod(0o644)  # as the other files; the library writes 0600
        record.write_json(part / "pack.json", asdict(report))
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return report
