"""Pack a finished run: a run directory whose weights are real codes and scales.

recipe.yaml          the run's
weights.safetensors  packed, with the precisions that they compute in; `zoo generate` reads it
pack.json            each packed leaf with its bits, the bytes of the whole and the bits per byte
                     of text, before and after
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from layers.precision import seed_rounding
from recipes import load, record
from recipes.data import TextData
from recipes.metrics import evaluate
from recipes.schema import Recipe
from zoo.model import build
from zoo.packing import PackReport, pack
from zoo.precision import rounding_seed
from zoo.pretrained import load_weights, write_weights


class PackedRun(NamedTuple):
    """What `pack_run` made, and what it is worth."""

    report: PackReport
    bpb_before: float  # on the validation part, in the packed formats but unpacked
    bpb: float  # packed: the same where matrices are decoded whole

    def __str__(self) -> str:
        return f"{self.report}\nbits/byte {self.bpb_before:.4f}, packed {self.bpb:.4f}"


def pack_run(run: Path | str, *, precision: Any = None, out: Path | str | None = None) -> PackedRun:
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
    before = _bits_per_byte(model, recipe)
    report = pack(model)
    packed = PackedRun(report, before, _bits_per_byte(model, recipe))
    with record.filling(out) as part:
        shutil.copy(run / "recipe.yaml", part / "recipe.yaml")
        write_weights(model, part / "weights.safetensors")
        (part / "weights.safetensors").chmod(0o644)  # as the other files; the library writes 0600
        bpb = {"before": packed.bpb_before, "after": packed.bpb}
        record.write_json(part / "pack.json", asdict(report) | {"bpb": bpb})
    return packed


def _bits_per_byte(model: nn.Module, recipe: Recipe) -> float:
    """On the validation part, as at the end of a run."""
    data = TextData(recipe.data, recipe.seed)
    loader = data.eval_loader("validation", recipe.data.final_bytes_per_domain)
    return evaluate(model, loader, data.domains).bpb.final().bpb
