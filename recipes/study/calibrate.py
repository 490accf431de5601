"""What a study will take: FLOPs counted, seconds and memory measured on a few steps of each model.

One short run of each (size, variant, precision), in a process of its own and trained as the study
trains: its median step, its peak memory, and what a process takes beside its steps.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from recipes import load, record
from recipes.batches import Batch
from recipes.costing import whole_model_cost
from recipes.data import TextData
from recipes.planned import PlannedRun, Processes, RunFailed
from recipes.schema import Recipe
from recipes.study.plan import StudyPlan, StudyRun

STEPS = 5
FILE = "calibration.json"
FORWARD = 1 / 3  # of a training step's time, for a token that is only evaluated


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a short run of one model showed on this machine."""

    tokens_per_s: float  # in training
    overhead_s: float  # of a process, outside training
    peak_memory_bytes: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one run of a study will take."""

    flops: float  # of training, matmuls
    seconds: float | None  # None: not measured
    peak_memory_bytes: float | None


def key_of(run: StudyRun) -> str:
    """What runs share that take the same time: all but seed and learning rate."""
    recipe = drawn(run.recipe)
    plain = load.to_plain(replace(recipe, seed=0, optim=replace(recipe.optim, lr=1.0)))
    return record.fingerprint(plain)[:16]


def calibrate(
    plan: StudyPlan, runs: Iterable[StudyRun], told: Callable[[str], None] = lambda text: None
) -> dict[str, Measured]:
    """Measure each model that is not in the study's calibration.json yet; by `key_of`.

    A model whose short run fails is left out, and `told` why.
    """
    found = read_calibration(plan)
    processes = Processes(subprocess.DEVNULL)
    try:
        for key, run in {key_of(run): run for run in runs}.items():
            if key in found:
                continue
            try:
                found[key] = _measure(run, processes)
            except RunFailed as failure:
                told(f"{run.variant}: {failure}")
                continue
            told(f"{run.id}: {found[key].tokens_per_s:,.0f} tokens/s")
            record.write_json(plan.out / FILE, {k: asdict(m) for k, m in found.items()})
    finally:
        processes.stop()
    return found


def read_calibration(plan: StudyPlan) -> dict[str, Measured]:
    """What was measured before."""
    path = plan.out / FILE
    plain = json.loads(path.read_text()) if path.is_file() else {}
    return {key: Measured(**fields) for key, fields in plain.items()}


def drawn(recipe: Recipe) -> Recipe:
    """The recipe with weights drawn, as no run to begin from need be there: as fast as with them.

    A teacher's forward is left out with it.
    """
    return replace(recipe, init_from=None, prior_teacher=None)


def _measure(run: StudyRun, processes: Processes) -> Measured:
    recipe = drawn(run.recipe)
    trainer = replace(
        recipe.trainer, max_steps=STEPS, eval_every_steps=STEPS, checkpoint_every_steps=STEPS,
        log_every_steps=1,
    )  # fmt: skip
    data = replace(recipe.data, eval_bytes_per_domain=256, final_bytes_per_domain=256)
    short = replace(recipe, trainer=trainer, data=data)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        record.write_text(out / "recipe.yaml", load.to_yaml(short))
        planned = PlannedRun(id=run.id, variant=run.variant, recipe=short)
        processes.start()  # a worker imports once, for all runs of a study
        started = time.monotonic()
        processes(planned, out)
        seconds = time.monotonic() - started
        result = record.read_result(out)
    if result is None:
        raise RunFailed("it ended without a result")
    speed = result["speed"]
    return Measured(
        tokens_per_s=speed["tokens_per_s"],
        overhead_s=max(seconds - speed["train_s"], 0.0),
        peak_memory_bytes=speed["peak_memory_bytes"],
    )


def estimates(runs: Iterable[StudyRun], measured: Mapping[str, Measured]) -> list[Estimate]:
    """What each run will take, its evaluations included; seconds where its model was measured."""
    evaluated: dict[str, int] = {}
    found: list[Estimate] = []
    for run in runs:
        recipe = run.recipe
        data = record.fingerprint(load.to_plain(recipe.data))
        if data not in evaluated:
            evaluated[data] = evaluated_tokens(recipe)
        found.append(_estimate(run, measured.get(key_of(run)), evaluated[data]))
    return found


def _estimate(run: StudyRun, measured: Measured | None, evaluated: int) -> Estimate:
    """evaluated: held-out tokens of the whole run."""
    tokens = trained_tokens(run.recipe)
    flops = tokens * whole_model_cost(run.recipe).training_flops
    if measured is None:
        return Estimate(flops=flops, seconds=None, peak_memory_bytes=None)
    return Estimate(
        flops=flops,
        seconds=(tokens + FORWARD * evaluated) / measured.tokens_per_s + measured.overhead_s,
        peak_memory_bytes=measured.peak_memory_bytes,
    )


def trained_tokens(recipe: Recipe) -> int:
    """Of the whole run."""
    t, d = recipe.trainer, recipe.data
    return t.max_steps * t.accumulate * d.batch_size * d.seq_len


def evaluated_tokens(recipe: Recipe) -> int:
    """Held-out tokens of all evaluations: those along the way, and the last."""
    data = TextData(recipe.data, recipe.seed, recipe.trainer.accumulate)
    times = recipe.trainer.max_steps // recipe.trainer.eval_every_steps
    final = data.eval_loader("validation", recipe.data.final_bytes_per_domain)
    return times * _tokens(data.val_dataloader()) + _tokens(final)


def _tokens(batches: Iterable[Batch]) -> int:
    return sum(batch.tokens.numel() for batch in batches)
