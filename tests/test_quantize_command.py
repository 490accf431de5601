"""A finished run quantised: what the new directory holds, and that its model was measured."""

import json
from dataclasses import replace

import pytest
import torch
from recipe_toys import evaluate_briefly, refused, tiny_recipe
from safetensors.torch import load_file

from layers.precision import (
    leaves,
    quantize,
)
from recipes.metrics import evaluate
from recipes.quantize import quantize_run, read_model, show
from recipes.report.records import read_results
from recipes.report.runs import read_runs
from recipes.sample import continue_text
from recipes.train import train

FAST = {"calibration_batches": 2, "calibration_rows": 64}


def briefly(monkeypatch):
    """Evaluate on a sliver of the validation part."""
    evaluate_briefly(monkeypatch)

    def short(task, data):
        return evaluate(task.model, data.eval_loader("validation", 2048), data.domains)

    monkeypatch.setattr("recipes.quantize.final_evaluation", short)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained model of one dense layer and one of experts."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    ffn = [{"name": "swiglu", "d_ff": 48}, {"name": "moe", "n_experts": 3, "top_k": 2,
                                            "d_expert": 32}]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        briefly(patch)
        train(tiny_recipe(ffn, "trainer.max_steps=20", "trainer.eval_every_steps=20"), out)
    return out


@pytest.fixture
def quick(monkeypatch):
    briefly(monkeypatch)


METHODS = {
    "rtn": {"method": "rtn", "format": "mxfp4"},
    "rtn_weights": {"method": "rtn", "format": "nvfp4", "activations": "bf16"},
    "llm_fp4": {"method": "llm_fp4", "rounds": 1},
    "llm_fp4_weights": {"method": "llm_fp4", "activations": "bf16", "rounds": 1},
    "zeroquant_fp": {"method": "zeroquant_fp", "rank": 2, "group": 16},
    "zeroquant_fp_weights": {"method": "zeroquant_fp", "rank": 2, "activations": "bf16"},
}


@pytest.mark.parametrize("case", METHODS)
def test_the_directory_is_a_run_whose_model_was_measured(case, run, tmp_path, quick, capsys):
    out = tmp_path / "q"
    result = quantize_run(run, out=out, **METHODS[case], **FAST)
    assert json.loads((out / "quantize.json").read_text()) == result
    assert not list(tmp_path.glob(".*"))
    low = {leaf["name"] for leaf in result["leaves"]}
    model = read_model(run).model
    roles = {name: leaf.role for name, leaf in leaves(model).items()}
    assert low == {n for n, role in roles.items() if role in ("ffn", "expert", "attention")}
    assert all(0 < leaf["output_error"] < 0.5 for leaf in result["leaves"])
    assert result["bytes"]["after"] < 0.75 * result["bytes"]["before"]  # tables stay high
    assert 0 < abs(result["bpb"]["after"] - result["bpb"]["before"]) < 1

    again = read_model(out).model  # from disk
    for name, leaf in leaves(again).items():
        assert (leaf.precision != leaves(model)[name].precision) == (name in low)
    both = read_results(read_runs([run, out]))  # as a report would
    assert both.runs[1].final.bpb == result["bpb"]["after"]
    assert both.runs[1].precision.startswith("bf16+")
    read = [r.cost.weight_bytes_per_token["1"] for r in both.runs]
    assert 0.2 * read[0] < read[1] < 0.9 * read[0]
    show(result)
    assert "bits/byte" in capsys.readouterr().out


@pytest.mark.parametrize("case", METHODS)
def test_reading_it_back_gives_the_same_logits(case, run, tmp_path, quick, monkeypatch):
    kept = []

    def keep(task, data):
        kept.append(task.model)
        return evaluate(task.model, data.eval_loader("validation", 2048), data.domains)

    monkeypatch.setattr("recipes.quantize.final_evaluation", keep)
    quantize_run(run, out=tmp_path / "q", **METHODS[case], **FAST)
    tokens = torch.randint(256, (2, 40))
    with torch.no_grad():
        expected, found = (
            m.eval()(tokens).logits for m in (kept[1], read_model(tmp_path / "q").model)
        )
    assert torch.equal(found, expected)


def test_weights_are_rounded_where_the_format_says(run, tmp_path, quick):
    quantize_run(run, method="rtn", format="mxfp4", out=tmp_path / "q", **FAST)
    before, after = (load_file(d / "weights.safetensors") for d in (run, tmp_path / "q"))
    assert before.keys() == after.keys()
    for name in before:
        if name.split(".")[-2] in ("gate_up", "down", "qkv", "out"):
            values = quantize(before[name], "mxfp4", axis=-1, dtype=torch.float32).values
            assert torch.equal(after[name], values)
        else:
            assert torch.equal(after[name], before[name])
    for leaf in leaves(read_model(tmp_path / "q").model).values():
        assert leaf.precision is not None
        low = "mxfp4" if leaf.role in ("ffn", "expert", "attention") else "bf16"
        assert leaf.precision.fprop_w.format == low  # which gives the weights back, and packs


@pytest.mark.parametrize(
    ("method", "options"),
    [("rtn", {"format": "mxfp4"}), ("llm_fp4", {}), ("zeroquant_fp", {"rank": 2})],
)
def test_text_goes_on_from_a_quantised_run(run, tmp_path, quick, method, options):
    quantize_run(run, method=method, out=tmp_path / "q", **options, **FAST)
    say = {"max_new_tokens": 8, "temperature": 0.0, "top_k": None, "seed": 0}
    assert continue_text(tmp_path / "q", "The ", **say) == continue_text(
        tmp_path / "q", "The ", **say
    )


def test_a_run_in_low_precision_is_measured_as_it_was_trained(tmp_path, quick):
    """Its last step's formats before, the method's after; high layers and inputs stay so."""
    policy = {"base": "nvfp4", "schedule": [{"at": 1, "use": "mxfp4", "name": "*.ffn.down"}]}
    recipe = tiny_recipe({"name": "swiglu", "d_ff": 32}, "trainer.max_steps=2")
    train(replace(recipe, precision=policy), tmp_path / "run")
    formats = {n: x.precision.label for n, x in leaves(read_model(tmp_path / "run").model).items()}
    assert formats["blocks.0.ffn.down"] == "mxfp4"
    assert formats["blocks.0.ffn.gate_up"] == "nvfp4"
    result = quantize_run(tmp_path / "run", method="llm_fp4", activations="bf16", **FAST)
    assert result["bpb"]["before"] != result["bpb"]["after"]
    made = leaves(read_model(tmp_path / "run-llm_fp4-fp4").model)
    assert {x.precision.fprop_w.format for n, x in made.items() if "blocks" in n} == {"fp32"}


def test_the_same_command_gives_the_same_weights(run, tmp_path, quick):
    for name in ("a", "b"):
        quantize_run(run, out=tmp_path / name, **METHODS["zeroquant_fp"], **FAST)
    a, b = (load_file(tmp_path / name / "weights.safetensors") for name in ("a", "b"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_failure_leaves_nothing(run, tmp_path, quick, monkeypatch):
    monkeypatch.setattr("recipes.quantized_run.save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize_run(run, method="rtn", format="mxfp4", out=tmp_path / "q", **FAST)
    assert not list(tmp_path.iterdir())


def test_wrong_commands_are_one_line(run, tmp_path, quick):
    with refused("is it a finished run?"):
        quantize_run(tmp_path)
    with refused("unknown method of quantisation 'rnt'. Did you mean 'rtn'?"):
        quantize_run(run, method="rnt")
    with refused("unknown format 'nvfp5'. Did you mean 'nvfp4'?"):
        quantize_run(run, format="nvfp5")
    with refused("unknown rtn option key 'rank'"):
        quantize_run(run, format="mxfp4", rank=3)
    with refused("rtn takes no static"):
        quantize_run(run, format={"format": "fp8_e4m3", "scope": "static"})
    with refused("unknown format 'fp4_e2m2'"):
        quantize_run(run, method="llm_fp4", format="fp4_e2m2")
    with refused("no format of inputs has the values of 'fp3'"):
        quantize_run(run, method="llm_fp4", activations="fp3")
    with refused("rank must be 0"):
        quantize_run(run, method="zeroquant_fp", rank=-1)
    with refused("takes one format by name"):
        quantize_run(run, method="zeroquant_fp", format="fp4")
    with refused("calibration_rows must be positive"):
        quantize_run(run, format="mxfp4", calibration_rows=0)
    with refused("calibration_rows must be int, got 'many'"):
        quantize_run(run, format="mxfp4", calibration_rows="many")
    with refused("a format is a name or a mapping of its options, got 4"):
        quantize_run(run, format=4)
    (tmp_path / "there").mkdir()
    with refused("is already there"):
        quantize_run(run, format="mxfp4", out=tmp_path / "there")
    quantize_run(run, format="mxfp4", out=tmp_path / "q", **FAST)
    with refused("is quantised already"):
        quantize_run(tmp_path / "q", format="mxfp4")


@pytest.mark.parametrize("case", ["llm_fp4", "zeroquant_fp", "zeroquant_fp_weights"])
def test_decoding_meets_scales_and_corrections_too(case, run, tmp_path, quick):
    """A cached step of one token computes what the whole sequence does."""
    quantize_run(run, out=tmp_path / "q", **METHODS[case], **FAST)
    model = read_model(tmp_path / "q").model.eval()
    tokens = torch.randint(256, (1, 6))
    cache = model.new_cache(6)
    with torch.no_grad():
        whole = model(tokens).logits
        steps = torch.cat([model(t, cache=cache).logits for t in tokens.split(1, 1)], 1)
    torch.testing.assert_close(steps, whole, rtol=0.02, atol=0.02)
