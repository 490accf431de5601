"""A run that was killed and started again leaves what an uninterrupted one leaves, bit for bit."""

import pytest
import torch
from recipe_toys import evaluate_briefly, killed_after, rows, timeless, tiny_recipe
from safetensors.torch import load_file

from recipes.callbacks import mixed, read_checkpoint
from recipes.train import train
from zoo.catalogue import FFNS
from zoo.registry import resolve


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    evaluate_briefly(monkeypatch)


def equal_weights(one, other):
    a, b = (load_file(run / "weights.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    assert len(a) > 0
    for name, weight in a.items():
        assert torch.equal(weight, b[name]), name


def check_resume(recipe, step, tmp_path, monkeypatch):
    """Train at once, and cut after `step`; both must agree."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = train(recipe, whole)
    with killed_after(monkeypatch, step):
        train(recipe, cut)
    assert not (cut / "result.json").exists()
    found = train(recipe, cut)
    assert timeless(found) == timeless(expected)
    assert rows(cut) == rows(whole)
    equal_weights(whole, cut)


# of rows that share a module: one, and those whose router draws numbers or has state that moves
RESUMED = {row.module: row for row in reversed(FFNS)}.values()
STATEFUL = ("deepseek_v3_moe", "noisy_top_k_moe", "remoe")


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(
            row, id=row.name,
            marks=() if row in RESUMED or row.name in STATEFUL else pytest.mark.slow,
        )
        for row in FFNS
    ],
)  # fmt: skip
def test_half_and_half_is_the_whole(entry, tmp_path, monkeypatch):
    sizes = {k: v for k, v in entry.tiny.items() if k != "d_model"}
    overrides = [] if resolve(entry.name, **entry.tiny).causal else ["model.allow_noncausal=true"]
    check_resume(tiny_recipe({"name": entry.name, **sizes}, *overrides), 4, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("step", "overrides"),
    [
        (6, ["trainer.accumulate=2", "data.batch_size=8"]),  # two steps after the checkpoint
        (8, []),  # trained to the end, but killed before the result
        (4, ["precision=nvfp4"]),
        (4, ["trainer.activation_checkpointing=true"]),
    ],
    ids=["accumulating", "at the end", "nvfp4", "recomputing"],
)
def test_wherever_it_was_cut(step, overrides, tmp_path, monkeypatch):
    ffn = {"name": "moe", "n_experts": 4, "d_expert": 32, "jitter": 0.1}  # draws random numbers
    check_resume(tiny_recipe(ffn, *overrides), step, tmp_path, monkeypatch)


@pytest.mark.parametrize("step", [3, 4, 5, 8])
def test_around_the_end_of_an_epoch(step, tmp_path, monkeypatch):
    """4 steps are an epoch: before its end, at it, and in the next one."""
    monkeypatch.setattr("recipes.batches.epoch_steps", lambda *_, accumulate, **__: 4 * accumulate)
    overrides = ["trainer.checkpoint_every_steps=1", "trainer.accumulate=2", "data.batch_size=8"]
    check_resume(tiny_recipe("mlp", *overrides), step, tmp_path, monkeypatch)


def test_evaluating_more_often_changes_nothing(tmp_path):
    ffn = {"name": "moe", "n_experts": 4, "d_expert": 32, "jitter": 0.1}
    for name, every in (("often", 2), ("seldom", 8)):
        train(tiny_recipe(ffn, f"trainer.eval_every_steps={every}"), tmp_path / name)
    equal_weights(tmp_path / "often", tmp_path / "seldom")


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    recipe = tiny_recipe("mlp", "trainer.max_steps=2")
    first = train(recipe, tmp_path)
    monkeypatch.setattr("recipes.train._train", None)  # would raise if called
    assert train(recipe, tmp_path) == first


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut short":
        del content[len(content) // 2 :]
    elif how == "empty":
        content.clear()
    elif how == "other":
        content[:] = b"not a checkpoint"
    elif how == "flipped":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["cut short", "empty", "other", "flipped"])
def test_a_damaged_checkpoint_is_named(how, tmp_path, monkeypatch):
    recipe = tiny_recipe("mlp")
    with killed_after(monkeypatch, 4):
        train(recipe, tmp_path)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 4
    damaged(last, how)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged .*: delete it to train from") as e:
        train(recipe, tmp_path)
    assert "\n" not in str(e.value)


def test_another_recipe_is_refused(tmp_path, monkeypatch):
    with killed_after(monkeypatch, 4):
        train(tiny_recipe("mlp"), tmp_path)
    with pytest.raises(ValueError, match=r"another recipe \(differs in optim\.lr\)"):
        train(tiny_recipe("mlp", "optim.lr=0.5"), tmp_path)


def test_seeds_of_neighbours_are_unlike():
    seeds = [mixed(seed, batch, 0) for seed in range(8) for batch in range(512)]
    assert len(set(seeds)) == len(seeds)
    bits = torch.tensor(seeds)[:, None] >> torch.arange(32) & 1
    assert (bits.float().mean(0) - 0.5).abs().max() < 0.05
