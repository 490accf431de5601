"""A finished dense run converted: what the new directory holds, and that it can go on."""

import json
import math

import pytest
import torch
from recipe_toys import TINY, refused, tiny_recipe
from safetensors.torch import load_file

import zoo
from layers.moe import MoE
from recipes import load
from recipes.convert import convert_run, show
from recipes.data import TextData
from recipes.metrics import evaluate
from recipes.quantize import quantize_run, read_model
from recipes.report.records import read_results
from recipes.report.runs import read_runs
from recipes.sample import continue_text
from recipes.train import train
from zoo.conversion import METHODS

OPTIONS = {
    "upcycle": {"n_experts": 3},
    "granular": {"n_copies": 2, "n_slices": 2},
    "drop": {"n_experts": 3, "fraction": 0.25},
    "factor_llm": {"n_experts": 4, "top_k": 3, "split": "kmeans"},
    "spt": {"n_experts": 4, "top_k": 2, "rank": 4},
    "versatile": {"n_experts": 4, "top_k": 2, "max_loops": 3},
    "spark": {"density": 0.2},
}
FFN = {"spt": "spt_ffn", "versatile": "versatile_ffn", "spark": "spark_ffn"}
OWN = {"z": 0.5, "balance": 0.01}  # weights that the dense run's recipe gives
EXACT = ("upcycle", "granular")


def short_evaluation(task, data):
    """On a sliver of the validation part."""
    return evaluate(task.model, data.eval_loader("validation", 2048), data.domains, 1e-3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("recipes.convert.final_evaluation", short_evaluation)
    monkeypatch.setattr("recipes.quantize.final_evaluation", short_evaluation)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained dense model, in bf16."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.train.final_evaluation", short_evaluation)
        recipe = tiny_recipe({"name": "swiglu", "d_ff": 48}, "loss_weights.z=0.5")
        train(load.load(load.to_plain(recipe), ["trainer.max_steps=20"]), out)
    return out


@pytest.mark.parametrize("to", METHODS)
def test_the_directory_is_a_run_with_a_receipt(to, run, tmp_path, capsys):
    out = tmp_path / "made"
    result = convert_run(run, to=to, out=out, **OPTIONS[to])
    assert json.loads((out / "convert.json").read_text()) == result
    assert {path.name for path in tmp_path.rglob("*")} == {
        "made", "convert.json", "recipe.yaml", "weights.safetensors", "result.json",
    }  # fmt: skip
    assert result["to"] == to
    assert result["run"] == "toy"
    assert OPTIONS[to].items() <= result["options"].items()
    assert [layer["layer"] for layer in result["layers"]] == [0, 1]
    largest = max(layer["largest"] for layer in result["layers"])
    bpb, params, active = result["bpb"], result["params"], result["active_params"]
    if to in EXACT:
        assert largest < 1e-5
        assert bpb["after"] == pytest.approx(bpb["before"], abs=2e-3)  # sums rounded to bf16
    else:
        assert largest > 0.05
        assert 0 < abs(bpb["after"] - bpb["before"]) < 2
    made = read_model(out).model
    assert params["after"] == sum(p.numel() for p in made.parameters())
    router = active["after"] - active["before"]
    if to == "granular":  # as many of its FFN's numbers run as of the dense one's
        assert router == 2 * sum(p.numel() for p in made.blocks[0].ffn.router.parameters())
    elif to == "factor_llm":  # three of four
        assert params["before"] < params["after"] < 1.05 * params["before"]
        assert router < 0

    recipe = load.load(out / "recipe.yaml")
    # the run's own win; the published one of factor_llm is of a sum over layers
    assert recipe.loss_weights == TINY["loss_weights"] | OWN | (
        {"prior": 0.05 * 2} if to == "factor_llm" else {}
    )
    assert recipe.init_from == str(out)
    assert recipe.prior_teacher == (str(run) if to == "factor_llm" else None)
    assert recipe.precision == "bf16"
    both = read_results(read_runs([run, out])).runs  # as a report would
    assert [each.final.bpb for each in both] == [bpb["before"], bpb["after"]]
    assert [each.ffn for each in both] == ["swiglu", FFN.get(to, "moe")]
    assert [each.variant for each in both] == ["swiglu", f"swiglu-{to}"]
    assert [each.cost.params for each in both] == [params["before"], params["after"]]
    assert [len(each.load) for each in both] == [0, 0 if to == "spark" else 2]
    show(result)
    assert "bits/byte" in capsys.readouterr().out


@pytest.mark.parametrize("to", METHODS)
def test_text_goes_on_from_a_converted_run(to, run, tmp_path):
    convert_run(run, to=to, out=tmp_path / "made", **OPTIONS[to])
    say = {"max_new_tokens": 8, "temperature": 0.0, "top_k": None, "seed": 0}
    text = continue_text(tmp_path / "made", "The ", **say)
    assert len(text) == 8
    assert text == continue_text(tmp_path / "made", "The ", **say)


@pytest.mark.parametrize("to", EXACT)
def test_an_exact_conversion_gives_the_dense_logits(to, run, tmp_path):
    """In float32; in bf16 a mixture rounds its sums where the dense FFN has none."""
    convert_run(run, to=to, out=tmp_path / "made", **OPTIONS[to])
    models = [read_model(path).model.eval() for path in (run, tmp_path / "made")]
    for model in models:
        zoo.set_precision(model, "fp32")
    tokens = torch.randint(256, (2, 40))
    with torch.no_grad():
        before, after = (model(tokens).logits for model in models)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", METHODS)
def test_training_goes_on_from_its_weights(to, run, tmp_path):
    """With its own recipe: every weight that is not frozen moves and the loss falls."""
    convert_run(run, to=to, out=tmp_path / "made", **OPTIONS[to])
    task = read_model(tmp_path / "made")
    task.model.train()
    data = TextData(task.recipe.data, task.recipe.seed, 1)
    batch = next(iter(data.train_dataloader()))
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3)
    start = {name: w.detach().clone() for name, w in task.model.named_parameters()}
    losses = []
    for step in range(5):
        loss = task.training_step(batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert math.isfinite(losses[-1])
    for name, w in task.model.named_parameters():
        assert torch.equal(w, start[name]) != w.requires_grad, name


def test_routers_may_be_taught_first(run, tmp_path, capsys):
    plain = convert_run(run, to="factor_llm", out=tmp_path / "plain", top_k=3)
    taught = convert_run(run, to="factor_llm", out=tmp_path / "taught", top_k=3, teach_steps=20)
    assert plain["teach"] == {"steps": 0, "loss": None}
    assert taught["layers"] == plain["layers"]
    show(taught)
    assert "routers taught for 20 steps" in capsys.readouterr().out
    first, last = taught["teach"]["loss"]
    assert last < first
    assert taught["bpb"]["after"] != plain["bpb"]["after"]
    a, b = (load_file(tmp_path / n / "weights.safetensors") for n in ("plain", "taught"))
    assert {name for name in a if not torch.equal(a[name], b[name])} == {
        f"blocks.{i}.ffn.router.{name}" for i in (0, 1) for name in ("weight", "logit_bias")
    }
    with refused("teach_steps is of factor_llm"):
        convert_run(run, teach_steps=5)
    with refused("teach_steps must not be negative, got -1"):
        convert_run(run, to="factor_llm", teach_steps=-1)
    with refused("teach_steps must be int, got 'some'"):
        convert_run(run, to="factor_llm", teach_steps="some")


def test_chosen_layers_alone(run, tmp_path):
    result = convert_run(run, to="upcycle", layers="last", out=tmp_path / "made")
    assert [layer["layer"] for layer in result["layers"]] == [1]
    made = read_model(tmp_path / "made").model
    assert [isinstance(block.ffn, MoE) for block in made.blocks] == [False, True]
    before, after = (load_file(p / "weights.safetensors") for p in (run, tmp_path / "made"))
    for name, weight in before.items():
        if not name.startswith("blocks.1.ffn."):
            assert torch.equal(after[name], weight)


def test_the_same_command_gives_the_same_weights(run, tmp_path):
    for name in ("a", "b"):
        convert_run(run, to="drop", out=tmp_path / name, noise=0.01)
    a, b = (load_file(tmp_path / name / "weights.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_failure_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.convert.final_evaluation", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_run(run, out=tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_wrong_commands_are_one_line(run, tmp_path):
    with refused("is it a finished run?"):
        convert_run(tmp_path)
    with refused("unknown conversion 'factor'. Did you mean 'factor_llm'?"):
        convert_run(run, to="factor")
    with refused("unknown upcycle option key 'fraction'"):
        convert_run(run, fraction=0.5)
    with refused("n_experts must be int, got 'many'"):
        convert_run(run, n_experts="many")
    with refused("d_ff=48 does not split into 5 equal parts"):
        convert_run(run, to="factor_llm", n_experts=5, out=tmp_path / "made")
    with refused("set renormalize=False or top_k >= 2"):
        convert_run(run, top_k=1, out=tmp_path / "made")
    (tmp_path / "there").mkdir()
    with refused("is already there"):
        convert_run(run, out=tmp_path / "there")
    convert_run(run, out=tmp_path / "made", n_experts=2)
    with refused("layer 0 is a MoE, only swiglu layers are converted"):
        convert_run(tmp_path / "made", out=tmp_path / "again")
    quantize_run(run, format="mxfp4", out=tmp_path / "q", calibration_batches=1)
    with refused("is quantised: convert the run that it came from"):
        convert_run(tmp_path / "q")
    assert not list(tmp_path.glob(".*"))
