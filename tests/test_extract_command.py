"""`zoo extract`: a submodel of a finished run as a run of its own."""

import json

import pytest
import torch
from recipe_toys import refused, tiny_recipe

from recipes import load
from recipes.data import TextData
from recipes.extract import extract_run, label, show
from recipes.metrics import evaluate
from recipes.quantize import quantize_run, read_model
from recipes.report.records import read_results
from recipes.report.runs import read_runs
from recipes.runtime import settings
from recipes.sample import continue_text
from recipes.train import train
from zoo.mixnmatch import least_slope

FFN = {"name": "matformer", "d_ff": 64, "gated": True}


def short_evaluation(task, data):
    """On a sliver of the validation part."""
    return evaluate(task.model, data.eval_loader("validation", 2048), data.domains, 1e-3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for module in ("extract", "quantize"):
        monkeypatch.setattr(f"recipes.{module}.final_evaluation", short_evaluation)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A nested model, trained by sampled granularities in fp32."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.train.final_evaluation", short_evaluation)
        patch.setattr("recipes.train.final_widths", lambda task, data: ())
        train(tiny_recipe(FFN, "precision=fp32", "nested.mode=sample"), out)
    return out


def test_the_directory_is_a_run_of_a_plain_model(run, tmp_path, capsys):
    out = tmp_path / "made"
    result = extract_run(run, widths=[16, 32], out=out)
    assert json.loads((out / "extract.json").read_text()) == result
    assert {path.name for path in tmp_path.rglob("*")} == {
        "made", "extract.json", "recipe.yaml", "weights.safetensors", "result.json",
    }  # fmt: skip
    assert (result["run"], result["widths"]) == ("toy", [16, 32])

    recipe = load.load(out / "recipe.yaml")
    assert recipe.nested is None
    assert recipe.init_from == str(out)
    assert recipe.model.ffn == [
        {"name": "swiglu", "d_ff": d_ff, "activation": "silu"} for d_ff in (16, 32)
    ]
    before, after = read_model(run).model.eval(), read_model(out).model.eval()
    tokens = torch.randint(256, (2, 50))
    with torch.no_grad():
        assert after(tokens).logits.equal(before(tokens, widths=[16, 32]).logits)

    both = read_results(read_runs([run, out])).runs  # as a report would
    assert [each.final.bpb for each in both] == list(result["bpb"].values())
    assert both[0].final.bpb != both[1].final.bpb
    assert [each.ffn for each in both] == ["matformer", "swiglu"]
    assert [each.variant for each in both] == ["matformer", "matformer-w1x16+1x32"]
    assert [each.cost.params for each in both] == list(result["params"].values())
    assert result["params"]["after"] == sum(p.numel() for p in after.parameters())
    assert result["flops_per_token"]["after"] < result["flops_per_token"]["before"]
    assert both[1].widths == ()
    show(result)
    assert capsys.readouterr().out.startswith("widths 16, 32; heads all\n")


def test_its_bits_per_byte_are_the_submodels(run, tmp_path):
    result = extract_run(run, widths=16, out=tmp_path / "made")
    task = read_model(run)
    data = TextData(task.recipe.data, task.recipe.seed)
    narrow = task.model.forward
    task.model.forward = lambda *args, **more: narrow(*args, **more, widths=[16, 16])
    with settings(task.recipe.trainer):  # the same paths of matmuls
        assert short_evaluation(task, data).bpb.final().bpb == result["bpb"]["after"]


@pytest.mark.parametrize("said", [{"hidden": 100}, {"params": 22e3}, {"flops": 70e3}])
def test_a_budget_says_the_widths(said, run, tmp_path):
    config = read_model(run).model.config
    result = extract_run(run, out=tmp_path / "made", **said)
    assert result["widths"] == list(least_slope(config, **said))
    [(name, budget)] = said.items()
    found = {"hidden": sum(result["widths"]), "params": result["params"]["after"]}
    if name in found:
        assert found[name] <= budget
    finer = extract_run(run, out=tmp_path / "finer", multiple_of=2, **said)
    assert sum(finer["widths"]) > sum(result["widths"])


def test_it_can_be_trained_on_sampled_and_quantised(run, tmp_path, monkeypatch):
    extract_run(run, widths=16, out=tmp_path / "made")
    say = {"max_new_tokens": 8, "temperature": 0.0, "top_k": None, "seed": 0}
    assert len(continue_text(tmp_path / "made", "The ", **say)) == 8
    quantize_run(tmp_path / "made", format="mxfp8_e4m3", out=tmp_path / "low")
    monkeypatch.setattr("recipes.train.final_evaluation", short_evaluation)
    result = train(load.load(tmp_path / "made" / "recipe.yaml"), tmp_path / "on")
    after = json.loads((tmp_path / "made" / "result.json").read_text())["final"]["bpb"]
    assert result["curve"][0]["step"] == 0
    assert result["final"]["bpb"] < after


def test_labels():
    assert label([64, None, 64], None) == "w64"
    assert label([32, 32, 64, None, 64, 64], 4) == "w2x32+3x64-h4"
    assert label([None, None], 4) == "h4"


def test_heads_alone(run, tmp_path):
    result = extract_run(run, heads=1, out=tmp_path / "made")
    assert (result["widths"], result["heads"]) == ([None, None], 1)
    made = read_model(tmp_path / "made").model
    assert (made.config.n_heads, made.config.d_head) == (1, 16)
    assert [block.ffn.config.hidden for block in made.blocks] == [64, 64]
    with refused("heads must be in [1, n_heads=2], got 3"):
        extract_run(run, heads=3)


def test_errors(run, tmp_path):
    with refused("is it a finished run?"):
        extract_run(tmp_path, widths=8)
    with refused("extract takes one of widths, hidden, params, flops, or heads alone, got none"):
        extract_run(run)
    with refused("one of widths, hidden, params, flops, or heads alone, got ['widths', 'params']"):
        extract_run(run, widths=8, params=1e4)
    with refused("multiple_of is of a budget: leave it out"):
        extract_run(run, widths=8, multiple_of=2)
    with refused("widths must be a number, or a list of one for each layer, got wide"):
        extract_run(run, widths="wide")
    with refused("hidden must be positive, got -1"):
        extract_run(run, hidden=-1)
    with refused("layer 1: width must be in [1, 64], what the layer has, got 65"):
        extract_run(run, widths=[8, 65])
    with refused("widths must have one entry for each of 2 layers, got 3"):
        extract_run(run, widths=[8, 8, 8])
    with refused("params=1000.0 is below the narrowest submodel's"):
        extract_run(run, params=1000)
    with refused("unknown extract key 'width'. Did you mean 'widths'?"):
        extract_run(run, width=8)
    (tmp_path / "there").mkdir()
    with refused("is already there"):
        extract_run(run, widths=8, out=tmp_path / "there")
    made = tmp_path / "made"
    extract_run(run, widths=8, out=made)
    with refused("no layer of this model is nested"):
        extract_run(made, widths=8)
    quantize_run(run, format="mxfp8_e4m3", out=tmp_path / "low")
    with refused("is quantised: extract from the run that it came from"):
        extract_run(tmp_path / "low", widths=8)
