"""Recipes: strict, round-tripping, complete; and what a run leaves behind."""

import math
import re
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from recipe_toys import TINY, evaluate_briefly, refused, tiny_recipe
from safetensors.torch import load_file

from layers.base import FFNOutput
from recipes import load
from recipes.batches import Batch
from recipes.metrics import BitsPerByte, ExpertLoad, expert_names
from recipes.report.records import Run
from recipes.report.strict import read_as
from recipes.runtime import MATMUL, settings, use_fast_exact_matmul
from recipes.sample import continue_text
from recipes.task import build_model, weighted
from recipes.train import train
from zoo.catalogue import FFNS

SHIPPED = sorted(Path(str(resources.files("recipes"))).glob("*.yaml"))


@pytest.mark.parametrize("name", sorted(entry.name for entry in FFNS))
def test_every_variant_has_a_recipe_that_weighs_its_losses(name):
    recipe = load.load(name, ["model.d_model=32"])
    assert name in {choice.entry.name for choice in recipe.model.layers()}
    out = build_model(recipe)(torch.randint(256, (1, 16)))
    weighted(out.losses, recipe.loss_weights)
    assert out.losses.keys() == recipe.loss_weights.keys()


# two steps of training: one recipe of each module, the others are run by hand
OFTEN = {"debug", *({row.module: row.name for row in reversed(FFNS)}.values())}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=() if p.stem in OFTEN else pytest.mark.slow)
        for p in SHIPPED
    ],
)
def test_a_shipped_recipe_runs_and_loads_equal(path, tmp_path, monkeypatch):
    evaluate_briefly(monkeypatch)
    small = ["trainer.max_steps=2", "trainer.threads=1", "model.d_model=32", "data.batch_size=32"]
    small += ["data.corpus=tinyshakespeare"]
    recipe = load.load(path.stem, small)
    assert recipe == load.load(path, small)
    result = train(recipe, tmp_path)
    assert load.load(tmp_path / "recipe.yaml") == recipe
    assert load.load(result["recipe"]) == recipe
    assert read_as(Run, result, "result").steps == 2
    assert math.isfinite(result["final"]["bpb"])


def test_defaults_then_file_then_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**TINY, "model": {**TINY["model"], "ffn": "mlp"}}))
    recipe = load.load(path, ["optim.lr=3e-4", "optim.betas=[0.8,0.9]", "data.seq_len=128"])
    assert (recipe.optim.lr, recipe.optim.betas) == (3e-4, (0.8, 0.9))
    assert (recipe.data.seq_len, recipe.data.batch_size) == (128, 16)  # override, file
    assert recipe.optim.eps == 1e-8  # default


def test_another_name_drops_the_options_of_the_first():
    old = {"ffn": {"name": "moe", "n_experts": 8, "router": {"name": "top_k", "jitter": 0.1}}}
    assert load.merged(old, {"ffn": {"name": "mlp"}}) == {"ffn": {"name": "mlp"}}
    deeper = load.merged(old, {"ffn": {"n_experts": 4, "router": {"jitter": 0.2}}})
    assert deeper["ffn"]["n_experts"] == 4
    assert deeper["ffn"]["router"] == {"name": "top_k", "jitter": 0.2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_stepss=3", "key 'trainer.max_stepss'. Did you mean 'trainer.max_steps'?"),
        ("max_steps=3", "unknown recipe key 'max_steps'. Did you mean 'trainer.max_steps'?"),
        ("trainer.max_steps=many", "trainer.max_steps must be int, got 'many'"),
        ("trainer.max_steps=0", "trainer.max_steps must be positive, got 0"),
        ("trainer.max_steps=null", "trainer.max_steps must be int, got None"),
        ("optim.betas=[0.9]", "optim.betas must be tuple[float, float], got [0.9]"),
        ("optim.schedule=line", "optim.schedule must be one of cosine, wsd, got 'line'"),
        ("optim=3", "optim must be a mapping, got 3"),
        ("loss_weights.balance=no", "loss_weights.balance must be"),
        ("model.ffn.name=moee", "unknown FFN variant 'moee'. Did you mean 'moe'?"),
        ("model.ffn.d_expertt=3", "unknown option of swiglu 'd_expertt'"),
        ("model.n_heads=3", "d_model must be a multiple of n_heads=3"),
        ("precision=fp5", "unknown precision 'fp5'"),
        ("data.corpus=classic7", "unknown corpus 'classic7'. Did you mean 'classics7'?"),
        ("data.tokenizer=bpe1024", "model.vocab_size must be at least 1024"),
        ("data.seq_len=2048", "model.max_seq_len must be at least data.seq_len=2048"),
        ("seed=-1", "seed must be 0 or more, got -1"),
        ("seed", "expected key=value, got 'seed'"),
        ("seed=[1", "cannot read seed=[1"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_one_line_with_the_path(override, message):
    with refused(message):
        tiny_recipe({"name": "swiglu", "d_ff": 64}, override)


def test_files_that_are_no_recipes(tmp_path):
    path = tmp_path / "r.yaml"
    for text, message in [
        ("a: [", "is no valid YAML"),
        ("- 1", "must hold a mapping of keys, got a list"),
        ("seed: 1\nseed: 2", "found duplicate key"),
        ("seed: 1", "recipe: model.ffn must be given"),
    ]:
        path.write_text(text)
        with refused(message):
            load.load(path)
    with refused("Did you mean 'debug'"):
        load.load("debgu")


def test_a_loss_without_a_weight_is_refused_and_zero_turns_it_off():
    losses = {"balance": torch.tensor(2.0), "z": torch.tensor(3.0)}
    with pytest.raises(ValueError, match=r"loss_weights names no weight for \['z'\]: add one, 0.0"):
        weighted(losses, {"balance": 1.0})
    assert weighted(losses, {"balance": 0.5, "z": 0.0}) == [1.0]


def test_bits_per_byte_by_hand():
    """Two domains; the second batch's last target is padding."""
    metric = BitsPerByte(("a", "b"))
    ones = torch.ones(1, 2, dtype=torch.int64)
    metric.update(torch.tensor([[1.0, 2.0]]), Batch(ones, ones, 3 * ones, None, 0))
    mask = torch.tensor([[True, False]])
    metric.update(torch.tensor([[4.0, 9.0]]), Batch(ones, ones, 2 * ones * mask, mask, 1))
    final = metric.final()
    assert final.bpb == pytest.approx((1 + 2 + 4) / (6 + 2) / math.log(2))
    assert final.bpb_by_domain == {
        "a": pytest.approx(3 / 6 / math.log(2)),
        "b": pytest.approx(4 / 2 / math.log(2)),
    }
    assert (final.eval_bytes, final.eval_tokens) == (8, 3)
    assert final.nats_per_token == pytest.approx(7 / 3)


def test_router_load_by_hand():
    load_metric = ExpertLoad(("a", "b"), {1: ("ffn 0", "ffn 1", "zero 0")})
    load_metric.update([None, {"counts": torch.tensor([3, 1, 4])}], 0)
    load_metric.update([None, {"counts": torch.tensor([3, 1, 0])}], 1)
    (layer,) = load_metric.loads()
    assert (layer.layer, layer.n_ffn_experts, layer.counts) == (1, 2, (6, 2, 4))
    assert layer.counts_by_domain == {"a": (3, 1, 4), "b": (3, 1, 0)}
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert layer.entropy == pytest.approx(-(p * p.log()).sum().item() / math.log(2))
    assert (layer.largest_share, layer.dead) == (0.75, 0)
    assert layer.zero_computation_share == pytest.approx(4 / 12)


def test_a_run_directory_is_complete(tmp_path):
    recipe = tiny_recipe(
        [{"name": "swiglu", "d_ff": 64}, {"name": "moe_plus_plus", "n_experts": 4}]
    )
    result = train(recipe, tmp_path)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert {
        "recipe.yaml", "meta.json", "metrics.csv", "result.json", "weights.safetensors",
        "checkpoints/last.ckpt",
    } <= files  # fmt: skip
    assert not [name for name in files if name.endswith(".part")]
    model = build_model(recipe)
    assert result["cost"]["params"] == sum(p.numel() for p in model.parameters())
    assert expert_names(model).keys() == {1}
    (layer,) = result["load"]
    n_tokens = result["final"]["eval_tokens"]
    assert n_tokens == 111_540  # every byte of the validation part once
    assert sum(layer["counts"]) == 2 * n_tokens  # top 2
    assert [p["step"] for p in result["curve"]] == [3, 4, 6, 8]
    assert [p["eval_bpb"] is not None for p in result["curve"]] == [False, True, False, True]
    assert result["speed"]["tokens_per_s"] > 0
    assert result["losses"].keys() == {"balance", "z"}
    text = continue_text(
        tmp_path,
        result["sample"]["prompt"],
        max_new_tokens=200,
        temperature=1.0,
        top_k=None,
        seed=0,
    )
    assert text == result["sample"]["text"]


def test_recomputing_learns_the_same(tmp_path):
    ffn = {"name": "mlp", "d_ff": 64}
    plain = train(tiny_recipe(ffn, "precision=fp32"), tmp_path / "plain")
    again = tiny_recipe(ffn, "precision=fp32", "trainer.activation_checkpointing=true")
    train(again, tmp_path / "again")
    a, b = (load_file(tmp_path / name / "weights.safetensors") for name in ("plain", "again"))
    for name, weight in a.items():
        torch.testing.assert_close(b[name], weight)
    assert plain["curve"][-1]["train_bpb"] < plain["curve"][0]["train_bpb"] < 8.5


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, capsys):
    recipe = tiny_recipe("mlp", "optim.lr=1e30", "optim.clip_norm=null")
    result = train(recipe, tmp_path)
    told = capsys.readouterr().out
    assert re.search(r"the loss became (nan|inf) by step 3: lower optim\.lr", told)
    assert (result["diverged"], result["diverged_step"], result["steps"]) == (True, 3, 3)
    assert result["final"]["bpb"] is None
    assert not (tmp_path / "weights.safetensors").exists()
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert train(recipe, tmp_path) == result  # kept, not run again


def test_settings_are_put_back():
    before = torch.get_num_threads(), MATMUL.fp32_precision
    with settings(tiny_recipe("mlp", "trainer.threads=2").trainer):
        assert torch.get_num_threads() == 2
        if use_fast_exact_matmul():
            a, b = torch.randn(64, 300), torch.randn(300, 80)
            error = (a @ b).double() - a.double() @ b.double()
            assert error.abs().max() < 1e-4  # bf16 would be off by 0.1
    assert (torch.get_num_threads(), MATMUL.fp32_precision) == before


def test_outputs_of_layers_are_what_the_task_expects():
    """FFNOutput names losses and stats as ExpertLoad and `weighted` read them."""
    assert FFNOutput._fields == ("y", "losses", "stats", "carry", "later")


@pytest.mark.slow
def test_a_compiled_run_learns_as_an_eager_one_does(tmp_path):
    """About a minute where nothing is compiled yet."""
    ffn = ["swiglu", {"name": "moe", "n_experts": 4}]
    eager = train(tiny_recipe(ffn, "precision=fp32"), tmp_path / "eager")
    compiled = train(tiny_recipe(ffn, "precision=fp32", "trainer.compile=true"), tmp_path / "c")
    assert compiled["final"]["bpb"] == pytest.approx(eager["final"]["bpb"], abs=1e-2)
