"""Train a recipe into a run directory; go on where a killed run stopped."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from safetensors.torch import save_file
from torch import Tensor

from layers.base import Cost
from recipes import load, record
from recipes.callbacks import (
    AtomicCheckpoints,
    Progress,
    SaveLast,
    SeedEachBatch,
    check_checkpoint,
)
from recipes.controllers import controller_callbacks
from recipes.costing import run_cost, training_flops, whole_model_cost
from recipes.curve import Curve, Diverged, final_evaluation
from recipes.data import TextData
from recipes.initial import begin_from, check_begun, init_sha256
from recipes.launch import launch
from recipes.loop_health import words_of
from recipes.names import ffn_label, precision_label
from recipes.parallel import strategy_of
from recipes.precision_callbacks import precision_callbacks
from recipes.prior import prior_callbacks
from recipes.probes import probe_callbacks, recorded
from recipes.ranks import (
    check_same_batch,
    is_sharded,
    leaving,
    meet,
    n_data,
    rank_of,
    same_run,
    writes,
)
from recipes.report.records import SCHEMA, Final, Run, Sample, Speed
from recipes.runtime import interruptible, settings
from recipes.schema import Recipe
from recipes.stability import diverged_at, spikes
from recipes.task import LanguageModelTask
from recipes.widths import final_widths
from zoo.generate import generate
from zoo.parallel import whole
from zoo.pretrained import own_tensors

LOCK_WAIT_S = 5.0  # a run that was killed may take a moment to be gone
SAMPLE_TOKENS = 200
SAMPLE_PROMPT = "The "
NO_FINAL = Final(bpb=math.nan, nats_per_token=math.nan, eval_bytes=0, eval_tokens=0)


def train(
    recipe: Recipe, out: Path | str, *, variant: str | None = None, run_id: str | None = None
) -> dict[str, Any]:
    """Train, evaluate on the whole validation part, and leave a run directory.

    A directory whose run is finished is only read; one whose run was killed is gone on with. A
    loss that becomes infinite or NaN ends the run: it is recorded as diverged, without weights.

    Args:
        recipe: what to train.
        out: the run directory.
        variant: its label in a comparison; None: the catalogue's name of its FFN.
        run_id: what it is called; None: its label, precision and seed.

    Returns:
        The content of result.json.

    Raises:
        ValueError: when the directory holds another recipe's run, is in use, or is damaged.
    """
    out, variant = Path(out), variant or ffn_label(recipe.model.ffn)
    load.check(recipe)
    if rank_of(recipe.trainer):  # started from outside, and the first holds the lock
        return work(recipe, out, variant, run_id)
    busy = f"{out} is in use by another run: wait for it, or give another out="
    with record.locked(out / ".lock", busy, wait_s=LOCK_WAIT_S):
        _claim(recipe, out)
        check_begun(recipe, out)
        done = record.read_result(out)
        if done is not None:
            print(f"{done['id']}: already finished in {out}", flush=True)
            return done
        if rank_of(recipe.trainer) is None:
            launch(out, variant, run_id, recipe.trainer)
            return cast("dict[str, Any]", record.read_result(out))
        return work(recipe, out, variant, run_id)


def work(recipe: Recipe, out: Path, variant: str, run_id: str | None) -> dict[str, Any]:
    """What each process of a run does, in a directory that holds the recipe; as `train`."""
    with settings(recipe.trainer), leaving():
        return _train(recipe, out, variant, run_id)


def _claim(recipe: Recipe, out: Path) -> None:
    """Write recipe.yaml, or refuse where another recipe's run lies.

    An unfinished run may go on on other processes (`recipes.ranks.same_run`).
    """
    path = out / "recipe.yaml"
    plain = load.to_plain(recipe)
    if path.is_file():
        before = load.read_yaml(path)
        check_same_batch(before, plain)
        differing = load.differences(same_run(before), same_run(plain))
        if differing:
            raise ValueError(
                f"{out} holds a run of another recipe (differs in {', '.join(differing)}): "
                "give another out=, or delete it"
            )
        if before == plain or (out / "result.json").is_file():
            return
    record.write_text(path, load.to_yaml(recipe))


def _train(recipe: Recipe, out: Path, variant: str, run_id: str | None) -> dict[str, Any]:
    run_id = run_id or f"{variant}-{precision_label(recipe.precision)}-s{recipe.seed}"
    fingerprint = record.fingerprint(same_run(load.to_plain(recipe)))
    about: dict[str, Any] = {
        "init_sha256": init_sha256(recipe),
        "versions": record.versions(),
        "commit": record.commit(),
        "machine": record.machine(torch.get_num_threads()),
    }
    if writes(recipe.trainer):
        record.write_json(
            out / "meta.json",
            {"id": run_id, "variant": variant, "seed": recipe.seed, "recipe_sha256": fingerprint}
            | about,
        )
    last = out / "checkpoints" / "last.ckpt"
    resumed = check_checkpoint(last, fingerprint)
    data = TextData(recipe.data, recipe.seed, recipe.trainer.accumulate)
    task = LanguageModelTask(recipe, data.domains)
    if not resumed:
        begin_from(recipe, task.model)
    cost = whole_model_cost(recipe)
    curve = _curve(recipe, data)
    probes = probe_callbacks(recipe, out)
    trainer = lean_trainer(recipe, out, [
        SeedEachBatch(recipe.seed),
        *precision_callbacks(recipe),
        *controller_callbacks(recipe),
        *prior_callbacks(recipe),
        *probes,
        curve,
        *([Progress(run_id, curve)] if writes(recipe.trainer) else []),
        SaveLast(last, recipe.trainer.checkpoint_every_steps, curve, fingerprint),
    ])  # fmt: skip
    with interruptible(trainer):
        try:
            trainer.fit(task, data, ckpt_path=str(last) if resumed else None, weights_only=True)
        except Diverged as error:
            if writes(recipe.trainer):
                print(f"{run_id}: {error}", flush=True)
    about["probes"] = recorded(probes)
    return _finish(recipe, out, task, data, curve, cost, run_id, variant, about)


def _curve(recipe: Recipe, data: TextData) -> Curve:
    trainer = recipe.trainer
    sequences = recipe.data.batch_size * n_data(trainer) * trainer.accumulate
    tokens = sequences * recipe.data.seq_len
    return Curve(
        data,
        log_every=trainer.log_every_steps,
        eval_every=trainer.eval_every_steps,
        tokens=tokens,
        flops=tokens * training_flops(recipe),
        n_data=n_data(trainer),
    )


def lean_trainer(recipe: Recipe, out: Path, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A lean Trainer: it loops, clips, accumulates and resumes; nothing else per step."""
    config, loggers = recipe.trainer, list[Any]()
    if writes(config):
        (out / "metrics.csv").unlink(missing_ok=True)  # the curve in the checkpoint fills it again
        loggers.append(CSVLogger(out, name="", version="", flush_logs_every_n_steps=1))
        if "tensorboard" in record.versions():
            loggers.append(TensorBoardLogger(out, name="tensorboard", version=""))
    return pl.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        strategy=strategy_of(config),
        max_steps=config.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=recipe.optim.clip_norm,
        precision="32-true",  # the leaves have a precision of their own
        logger=loggers,
        callbacks=callbacks,
        plugins=[] if is_sharded(config) else [AtomicCheckpoints()],
        limit_val_batches=0,  # the curve evaluates, so that a checkpoint follows its row
        num_sanity_val_steps=0,
        log_every_n_steps=config.log_every_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _finish(
    recipe: Recipe, out: Path, task: LanguageModelTask, data: TextData, curve: Curve, cost: Cost,
    run_id: str, variant: str, about: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    (steps,) = curve.steps([-1])
    outcome = _outcome(task, data, curve)
    if outcome["final"] is not NO_FINAL:
        _save_weights(task, out / "weights.safetensors")
    if not writes(recipe.trainer):
        meet()
        return cast("dict[str, Any]", record.read_result(out))
    result = Run(
        schema=SCHEMA,
        id=run_id,
        variant=variant,
        ffn=ffn_label(recipe.model.ffn),
        precision=precision_label(recipe.precision),
        seed=recipe.seed,
        lr=recipe.optim.lr,
        recipe=load.to_plain(recipe),
        **about,
        steps=steps,
        tokens=steps * curve.tokens,
        cost=run_cost(
            cost, tied=recipe.model.tie_embeddings, training_flops=training_flops(recipe)
        ),
        speed=Speed(
            tokens_per_s=curve.tokens_per_s(),
            train_s=curve.train_s,
            peak_memory_bytes=float(record.peak_memory_bytes()),
        ),
        curve=curve.points(),
        **outcome,
    )
    plain, final = asdict(result), result.final
    told = f"{final.bpb:.4f} bits/byte on {final.eval_bytes:,} bytes"
    if final.accuracy is not None:
        told = f"accuracy {final.accuracy:.4f} of {final.eval_bytes:,} answers"
    if final is NO_FINAL:
        plain["final"] |= {"bpb": None, "nats_per_token": None}  # JSON has no NaN
        told = f"diverged by step {result.diverged_step}"
    record.write_json(out / "result.json", plain)
    meet()
    print(f"{run_id}: {told}, in {out}", flush=True)
    return cast("dict[str, Any]", record.read_result(out))


def _outcome(task: LanguageModelTask, data: TextData, curve: Curve) -> dict[str, Any]:
    """What training came to, as a Run has it; figures of the model only where there are some."""
    losses = curve.losses()
    told = diverged_at(losses)
    found: dict[str, Any] = {"final": NO_FINAL, "spike_steps": curve.steps(spikes(losses))}
    evaluation = final_evaluation(task, data) if math.isfinite(losses[-1]) else None
    final = evaluation.final() if evaluation else NO_FINAL
    if evaluation and math.isfinite(final.bpb):
        found |= {
            "final": final,
            "load": evaluation.load.loads(),
            "health": evaluation.health.layers(),
            "memory": evaluation.memory.layers(),
            "density": evaluation.density.layers(),
            "loops": evaluation.loops.layers(words_of(task.recipe.data)),
            "widths": final_widths(task, data),
            "losses": evaluation.losses,
            "sample": sample(task, data),
            "sharpness": evaluation.sharpness.value(),
        }
    elif told is None:  # the last update broke the weights
        told = len(losses) - 1
    at = None if told is None else curve.steps([told])[0]
    return found | {"diverged": at is not None, "diverged_step": at}


def _save_weights(task: LanguageModelTask, path: Path) -> None:
    tensors = {name: t.detach().contiguous() for name, t in whole_tensors(task).items()}
    if not writes(task.recipe.trainer):
        return
    with record.replacing(path) as part:
        save_file(tensors, part)
    path.chmod(0o644)  # as the other files; the library writes 0600


def whole_tensors(task: LanguageModelTask) -> dict[str, Tensor]:
    """The weights by name, gathered where they are sharded: all ranks take part."""
    return {name: whole(t) for name, t in own_tensors(task.model).items()}


def sample(task: LanguageModelTask, data: TextData) -> Sample | None:
    """What the model goes on with after a fixed prompt, drawn from a fixed seed; of text alone."""
    if data.task is not None:
        return None
    prompt = data.tokenizer.encode(SAMPLE_PROMPT)[None].to(task.device)
    n_tokens = min(SAMPLE_TOKENS, task.recipe.model.max_seq_len - prompt.shape[1])
    tokens = generate(task.model, prompt, max_new_tokens=n_tokens, seed=0)
    return Sample(prompt=SAMPLE_PROMPT, text=data.tokenizer.decode(tokens[0, prompt.shape[1] :]))
