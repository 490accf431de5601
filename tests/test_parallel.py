"""Runs on two processes (gloo, CPU) beside runs on one.

Two ranks with one micro-batch a step are one process with two: sums of two numbers have one order,
and halves are exact, so float32 runs must agree to the bit. With experts over both ranks and top_k
2 a token's sum has two addends too.
"""

import json
import os
import shutil
from typing import Any

import pytest
import torch
from parallel_toys import MOE, MOE_PLUS_PLUS, brief, cut_after, ranks
from recipe_toys import refused
from safetensors.torch import load_file

from recipes.cli import app
from recipes.launch import launch
from recipes.load import load, to_yaml
from recipes.train import train

STEPS = 8
MODEL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}


def recipe_of(ffn: Any, *, batch: int = 4, **trainer: Any) -> dict[str, Any]:
    """A plain recipe of a run of a second."""
    return {
        "precision": "fp32",
        "model": MODEL | {"ffn": ffn},
        "loss_weights": {"balance": 0.01, "z": 0.001},
        "data": {
            "corpus": "tinyshakespeare", "seq_len": 32, "batch_size": batch,
            "eval_bytes_per_domain": 512, "final_bytes_per_domain": 512,
        },
        "optim": {"lr": 1e-2, "clip_norm": None},  # a norm is a sum in another order
        "trainer": {
            "max_steps": STEPS, "eval_every_steps": 4, "checkpoint_every_steps": 5,
            "log_every_steps": 2, "threads": 1,  # so step 5 leaves a row half made
        } | trainer,
    }  # fmt: skip


DDP = {"devices": 2, "strategy": "ddp"}
FSDP = {"devices": 2, "strategy": "fsdp2"}
EP = {"devices": 2, "strategy": "fsdp2", "expert_parallel": 2}
BIASED = {"name": "deepseek_v3", "bias_step": 0.01}
MOVING = MOE | {"router": BIASED}  # state that counts over ranks move


def diverging():
    """A run that breaks in its first steps; blocks are recomputed, experts and batches shared."""
    recipe = recipe_of(MOE, **FSDP, activation_checkpointing=True)
    return recipe | {"optim": {"lr": 1e30, "clip_norm": 1.0}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with all runs."""
    root = tmp_path_factory.mktemp("parallel")

    def alone(name, recipe, step=None):
        with brief(), cut_after(step):
            train(load(recipe), root / name)

    alone("one", recipe_of(MOVING, accumulate=2))
    alone("one_plus", recipe_of(MOE_PLUS_PLUS))
    alone("plus_1_to_2", recipe_of(MOE_PLUS_PLUS), 5)
    ranks(root, [
        ("gradients", None, None, None),
        ("clipping", None, None, None),
        ("dead", None, None, None),
        ("moved", None, None, None),
        ("ddp", recipe_of(MOVING, **DDP), "ddp", None),
        ("fsdp", recipe_of(MOVING, **FSDP), "fsdp", None),
        ("ep", recipe_of(MOVING, **EP, accumulate=2), "ep", None),
        ("diverging", diverging(), "diverging", None),
        ("cut fsdp", recipe_of(MOVING, **FSDP), "fsdp_to_ddp", 6),
        ("as ddp", recipe_of(MOVING, **DDP), "fsdp_to_ddp", None),
        ("cut ep", recipe_of(MOE_PLUS_PLUS, **EP), "plus_2_to_1", 6),
        ("grown", recipe_of(MOE_PLUS_PLUS, **EP), "plus_1_to_2", None),
    ])  # fmt: skip
    alone("plus_2_to_1", recipe_of(MOE_PLUS_PLUS))
    yield root
    shutil.rmtree(root)


def told(root, name):
    return json.loads((root / f"{name}.json").read_text())


def agree(root, one, other):
    """Curves to what summing nats in another order leaves, weights to the bit."""
    a, b = (json.loads((root / run / "result.json").read_text()) for run in (one, other))
    assert (a["steps"], a["tokens"]) == (b["steps"], b["tokens"])
    assert len(a["curve"]) == len(b["curve"]) == STEPS // 2
    for before, after in zip(a["curve"], b["curve"], strict=True):
        assert after["train_bpb"] == pytest.approx(before["train_bpb"], rel=1e-12)
        evaluated = before["eval_bpb"]
        assert after["eval_bpb"] == (evaluated and pytest.approx(evaluated, rel=1e-7))
    assert [point["eval_bpb"] is not None for point in a["curve"]].count(True) == 2
    assert b["final"]["eval_bytes"] == a["final"]["eval_bytes"]
    assert b["load"][0]["counts"] == a["load"][0]["counts"]
    weights = [load_file(root / run / "weights.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name


@pytest.mark.parametrize("run", ["ddp", "fsdp", "ep"])
def test_two_processes_are_one(run, runs):
    agree(runs, "one", run)


@pytest.mark.parametrize("run", ["plus_2_to_1", "plus_1_to_2"])
def test_a_run_goes_on_on_another_number_of_processes(run, runs):
    agree(runs, "one_plus", run)


def test_a_run_goes_on_under_another_strategy(runs):
    agree(runs, "one", "fsdp_to_ddp")


def test_checkpoints_are_what_they_were(runs):
    for run in ("one", "ddp", "plus_2_to_1", "fsdp_to_ddp"):
        (last,) = (runs / run / "checkpoints").iterdir()
        assert last.is_file()
        assert not last.is_symlink()
    for run in ("fsdp", "ep", "plus_1_to_2"):
        last = runs / run / "checkpoints" / "last.ckpt"
        assert last.is_symlink()
        assert {path.name for path in last.parent.iterdir()} == {"last.ckpt", f"step-{STEPS}"}


def test_ranks_diverge_together(runs):
    result = json.loads((runs / "diverging" / "result.json").read_text())
    assert result["diverged"]
    assert result["final"]["bpb"] is None
    assert not (runs / "diverging" / "weights.safetensors").exists()


def test_a_damaged_shard_is_named(runs, tmp_path):
    """And what one process may go on with is no other recipe: it is refused for damage alone."""
    run = tmp_path / "run"
    shutil.copytree(runs / "fsdp", run, symlinks=True)
    (run / "result.json").unlink()
    shard = sorted((run / "checkpoints" / f"step-{STEPS}").glob("__1_*.distcp"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    with refused(f"last.ckpt is damaged (wrong checksum of {shard.name}): delete it to train"):
        train(load(recipe_of(MOVING, batch=8)), run)
    shutil.rmtree(shard.parent)
    with refused("last.ckpt is damaged (its folder is gone): delete it to train"):
        train(load(recipe_of(MOVING, batch=8)), run)


def test_gradients_are_those_of_one_process(runs):
    found = told(runs, "gradients")
    assert len(found) == 10
    assert found == {case: [] for case in found}


@pytest.mark.slow
def test_both_axes_at_once(tmp_path):
    """Four processes: two share each expert's numbers, two its layer's experts."""
    ranks(tmp_path, [("gradients", None, None, None)], world=4)
    found = told(tmp_path, "gradients")
    assert found == {case: [] for case in found}


def test_one_norm_clips_all(runs):
    found = told(runs, "clipping")
    assert len(found) == 2
    for one, many, after in found.values():
        assert many == pytest.approx(one, rel=1e-6)
        assert one > 0.1
        assert after == pytest.approx(0.01, rel=1e-3)


def test_a_rank_without_tokens_takes_part(runs):
    found = told(runs, "dead")
    assert found["unequal"] == []
    assert len(found["largest"]) == 4
    for largest in found["largest"].values():
        assert min(largest[:2]) > 0
        assert largest[2:] == [0, 0]
    assert found["unmoved"] == []  # weight decay reaches dead experts too


def test_every_expert_moves(runs):
    assert told(runs, "moved") == {"data": [], "experts": []}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"devices": 2, "expert_parallel": 3}, "trainer.expert_parallel=3 must divide"),
        ({"devices": 1, "expert_parallel": 2}, "trainer.expert_parallel=2 must divide"),
        ({"devices": 3, "expert_parallel": 3}, "must divide the n_experts=4 of every mixture"),
        (EP | {"strategy": "ddp"}, "needs trainer.strategy fsdp2 or auto"),
        (DDP | {"compile": True}, "trainer.compile works on one device only"),
        ({"devices": 0}, "trainer.devices must be"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_door(said, message, tmp_path):
    with refused(message):
        train(load(recipe_of(MOE, **said)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dense_model_has_no_experts_to_share(tmp_path):
    with refused("needs a mixture of experts"):
        train(load(recipe_of("mlp", **EP)), tmp_path)


@pytest.mark.parametrize("precision", ["nvfp4_whole", "fp8_delayed"])
def test_a_precision_that_parts_would_change_is_refused(precision, tmp_path):
    recipe = recipe_of(MOE, **EP) | {"precision": PRECISIONS[precision]}
    with refused("which a part of the experts cannot do as all of them would"):
        train(load(recipe), tmp_path)


PRECISIONS: dict[str, Any] = {
    "nvfp4_whole": {"default": {"all": {"format": "nvfp4", "rounding": "stochastic"}}},
    "fp8_delayed": {"default": {"all": {"format": "fp8_e4m3", "scope": "delayed"}}},
}


def test_another_global_batch_is_refused(tmp_path):
    with brief(), cut_after(1):
        train(load(recipe_of(MOE, batch=4)), tmp_path)
    with refused("set data.batch_size=2, so that the global batch stays the same"):
        train(load(recipe_of(MOE, batch=4, **FSDP)), tmp_path)


def test_the_command_starts_its_processes(tmp_path):
    recipe = recipe_of("mlp", max_steps=2) | {"precision": PRECISIONS["fp8_delayed"]}
    (tmp_path / "tiny.yaml").write_text(to_yaml(load(recipe)))
    said = [str(tmp_path / "tiny.yaml"), f"out={tmp_path / 'run'}", "trainer.devices=2"]
    app(["train", *said], standalone_mode=False)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2
    assert result["tokens"] == 2 * 2 * 4 * 32
    assert result["recipe"]["trainer"]["devices"] == 2
    assert (tmp_path / "run" / "metrics.csv").is_file()
    assert not list((tmp_path / "run").glob("stderr-*"))


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (2, ValueError, "^what is wrong$"),  # a known error, and no traceback of the parent's
        (3, RuntimeError, r"^process 1 ended with status 3: what is wrong \(see .*stderr-1.txt\)$"),
    ],
)
def test_a_rank_that_fails_ends_the_others(status, error, message, tmp_path, monkeypatch):
    stub = tmp_path / "python"
    stub.write_text(
        f"""#!/bin/sh
echo $$ > {tmp_path}/pid-$LOCAL_RANK
[ $LOCAL_RANK = 1 ] || exec sleep 600
while [ ! -s {tmp_path}/pid-0 ]; do sleep 0.01; done
echo what is wrong >&2
exit {status}
"""
    )
    stub.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(stub))
    with pytest.raises(error, match=message):
        launch(tmp_path, "mlp", None, load(recipe_of("mlp", **DDP)).trainer)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid-0").read_text()), 0)
