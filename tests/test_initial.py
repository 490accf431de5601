"""Training that begins from given weights: what is read, what is refused, and that it repeats."""

import json
import shutil

import pytest
import torch
from recipe_toys import evaluate_briefly, killed_after, refused, rows, timeless, tiny_recipe
from safetensors.torch import load_file, save_file

from recipes import load
from recipes.convert import convert_run
from recipes.initial import begin_from, init_sha256
from recipes.metrics import evaluate
from recipes.pack import pack_run
from recipes.task import build_model
from recipes.train import train
from zoo.pretrained import own_tensors

DENSE = {"name": "swiglu", "d_ff": 48}
FEW_BYTES = ["precision=fp32", "trainer.max_steps=4", "data.eval_bytes_per_domain=2048"]


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    evaluate_briefly(monkeypatch)
    monkeypatch.setattr("recipes.convert.final_evaluation", _short)


def _short(task, data):
    return evaluate(task.model, data.val_dataloader(), data.domains)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished dense run, in float32."""
    out = tmp_path_factory.mktemp("runs") / "dense"
    with pytest.MonkeyPatch.context() as patch:
        evaluate_briefly(patch)
        train(tiny_recipe(DENSE, *FEW_BYTES), out)
    return out


def going_on(run, *overrides):
    """The recipe of a run, from its weights on."""
    return load.load(run / "recipe.yaml", [f"init_from={run}", *overrides])


def first(result):
    return result["curve"][0]


def test_the_row_of_step_0_is_the_end_of_the_run_before(run, tmp_path):
    before = json.loads((run / "result.json").read_text())
    result = train(going_on(run, "trainer.max_steps=6"), tmp_path / "more")
    assert first(result)["step"] == first(result)["tokens"] == first(result)["flops"] == 0
    assert first(result)["eval_bpb"] == pytest.approx(before["final"]["bpb"], rel=1e-12)
    assert first(result)["train_bpb"] is None
    assert [point["step"] for point in result["curve"]] == [0, 3, 4, 6]
    assert (tmp_path / "more" / "metrics.csv").read_text().count("\n") == 5
    assert result["final"]["bpb"] < before["final"]["bpb"]
    assert result["init_sha256"] == init_sha256(going_on(run))
    assert len(result["init_sha256"]) == 64
    assert before["init_sha256"] is None
    assert before["curve"][0]["step"] > 0


@pytest.mark.parametrize(
    ("to", "options"),
    [("upcycle", {"n_experts": 3}), ("granular", {"n_copies": 2, "n_slices": 2})],
)
def test_an_exact_mixture_begins_where_the_dense_run_ended(to, options, run, tmp_path):
    made = tmp_path / "made"
    convert_run(run, to=to, out=made, **options)
    before = json.loads((run / "result.json").read_text())["final"]["bpb"]
    recipe = load.load(made / "recipe.yaml", ["trainer.max_steps=6"])
    assert recipe.init_from == str(made)  # its own recipe begins from it
    result = train(recipe, tmp_path / "trained")
    assert first(result)["eval_bpb"] == pytest.approx(before, rel=1e-5)
    assert result["final"]["bpb"] < before
    start = load_file(made / "weights.safetensors")
    end = load_file(tmp_path / "trained" / "weights.safetensors")
    assert all(not torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_that_was_cut_is_the_whole(step, run, tmp_path, monkeypatch):
    recipe = going_on(run, "trainer.max_steps=8")
    expected = train(recipe, tmp_path / "whole")
    with killed_after(monkeypatch, step):
        train(recipe, tmp_path / "cut")
    found = train(recipe, tmp_path / "cut")
    assert timeless(found) == timeless(expected)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    whole, cut = (load_file(tmp_path / n / "weights.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_other_weights_under_the_same_path_are_refused(run, tmp_path, monkeypatch):
    weights, out = tmp_path / "w.safetensors", tmp_path / "out"
    shutil.copy(run / "weights.safetensors", weights)
    recipe = load.load(run / "recipe.yaml", [f"init_from={weights}", "trainer.max_steps=8"])
    with killed_after(monkeypatch, 4):
        train(recipe, out)
    tensors = load_file(weights)
    save_file({name: 1.5 * t for name, t in tensors.items()}, weights)
    with refused(f"{out} began from other weights than init_from={weights} holds now"):
        train(recipe, out)
    save_file(tensors, tmp_path / "same.safetensors")
    shutil.copy(run / "weights.safetensors", weights)
    finished = train(recipe, out)
    save_file({name: 1.5 * t for name, t in tensors.items()}, weights)
    with refused("began from other weights"):  # a finished run, too
        train(recipe, out)
    weights.unlink()
    assert train(recipe, out) == finished  # it needs them no more


def test_a_file_and_its_directory_are_one(run):
    models = []
    for given in (run, run / "weights.safetensors"):
        recipe = load.load(run / "recipe.yaml", [f"init_from={given}", "seed=5"])
        models.append(build_model(recipe))
        begin_from(recipe, models[-1])
    given = load_file(run / "weights.safetensors")
    for model in models:
        assert all(torch.equal(t, given[name]) for name, t in own_tensors(model).items())


def test_scales_of_another_precision_start_anew(run):
    delayed = {"name": "late", "default": {"all": {"format": "fp8_e4m3", "scope": "delayed"}}}
    plain = load.to_plain(going_on(run)) | {"precision": delayed}
    recipe = load.load(plain)
    model = build_model(recipe)
    begin_from(recipe, model)
    leaf = model.blocks[0].ffn.down
    given = load_file(run / "weights.safetensors")
    assert torch.equal(leaf.weight, given["blocks.0.ffn.down.weight"])
    assert (leaf.operand_scales == 1).all()


def test_what_does_not_fit_is_one_line(run, tmp_path):
    def begin(*overrides):
        recipe = going_on(run, *overrides)
        begin_from(recipe, build_model(recipe))

    path = run / "weights.safetensors"
    with refused(
        f"{path}: blocks.0.ffn.gate_up.weight must be [80, 32] for this recipe's model, "
        "got [96, 32]"
    ):
        begin("model.ffn.d_ff=40")
    with refused(
        f"{path}: unknown weight 'blocks.0.ffn.gate_up.weight'. "
        "Did you mean 'blocks.0.ffn.up.weight'?"
    ):
        begin("model.ffn={name: mlp, d_ff: 48}")
    with refused("unknown weight 'blocks.1."):
        begin("model.n_layers=1")
    with refused(f"{path} lacks blocks.2.attention_norm.weight of this model: unknown weight"):
        begin("model.n_layers=3")
    with refused(f"init_from={tmp_path}: no weights at {tmp_path}/weights.safetensors"):
        begin(f"init_from={tmp_path}")
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:500])
    with refused("is not a whole safetensors file"):
        begin(f"init_from={tmp_path}/broken.safetensors")
    pack_run(run, precision="mxfp8", out=tmp_path / "packed")
    with refused("is packed, which cannot be trained: begin from the run that was packed"):
        begin(f"init_from={tmp_path}/packed")
