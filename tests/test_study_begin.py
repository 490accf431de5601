"""Variants that begin from another's run: what they come to, in which order they are trained."""

import json
import threading
from collections import defaultdict

import pytest
from recipe_toys import refused
from study_toys import RECIPE, MadeUp, small

from recipes import load, record
from recipes.planned import RunFailed
from recipes.study.begin import Begin, make
from recipes.study.calibrate import key_of
from recipes.study.run import results_of, run_study
from zoo.model import build
from zoo.pretrained import write_weights

DENSE = {"name": "swiglu", "d_ff": 64}
ON = {"label": "on", "begin": {"from": "swiglu"}}
UP = {"label": "up", "begin": {"from": "swiglu", "to": "upcycle", "n_experts": 4}}
VERSATILE = {"label": "wide", "begin": {"from": "swiglu", "to": "versatile", "anneal": "run"}}
STEPS = {"recipe": {"trainer": {"max_steps": 2}}}


def begun(out, *variants, **keys):
    """A study of a dense model and what begins from it, any size allowed."""
    said = {"lrs": [], "controls": [], "hold": ["params"], "tolerance": 10.0, "seeds": [0, 1]}
    return small(out, **{**said, "variants": [DENSE, *variants], **keys})


class Made:
    """Converts nothing: writes down what it was asked for."""

    def __init__(self, fail=()):
        self.fail, self.asked = fail, []

    def __call__(self, source, out, begin):
        assert (source / "result.json").is_file(), "the run to begin from is not there yet"
        if any(part in out.name for part in self.fail):
            raise RunFailed("no such split")
        self.asked.append((source.name, out.name, begin.to))


def test_a_layer_comes_from_the_conversion_and_the_rest_from_the_recipe(tmp_path):
    found = begun(tmp_path, ON, UP, VERSATILE)
    runs = {run.variant: run for run in found.reporting() if run.seed == 1}
    assert runs["on"].recipe.model.ffn == DENSE
    up, wide = runs["up"].recipe, runs["wide"].recipe
    assert (up.model.ffn["name"], up.model.ffn["n_experts"], up.model.ffn["d_expert"]) == (
        "moe", 4, 64,
    )  # fmt: skip
    assert (wide.model.ffn["name"], wide.model.ffn["anneal"]) == ("versatile_ffn", "run")
    assert runs["swiglu"].recipe.init_from is None
    assert runs["on"].recipe.init_from == str(tmp_path / "runs" / "swiglu-bf16-s1")
    assert up.init_from == str(tmp_path / "begun" / "up-bf16-s1")
    assert up.loss_weights == RECIPE["loss_weights"]  # the study's before the conversion's
    assert (runs["swiglu"].recipe.seed, up.seed, runs["up"].seed) == (1, 1001, 1)
    assert runs["up"].source == "swiglu-bf16-s1"


def test_weights_of_a_conversions_losses_are_added_where_the_recipe_says_none(tmp_path):
    recipe = {**RECIPE, "loss_weights": {}}
    with refused("differ in loss_weights, loss_weights.balance, loss_weights.z"):
        begun(tmp_path, VERSATILE, recipe=recipe)
    found = begun(tmp_path, VERSATILE, recipe=recipe, allow=["loss_weights"])
    assert found.reporting()[-1].recipe.loss_weights == {"balance": 1e-5, "z": 0.0}


def test_steps_of_its_own_where_they_are_allowed(tmp_path):
    with refused("differ in trainer.max_steps"):
        begun(tmp_path, {**ON, **STEPS})
    found = begun(tmp_path, {**ON, **STEPS}, allow=["trainer.max_steps"])
    steps = {run.variant: run.recipe.trainer.max_steps for run in found.reporting()}
    assert steps == {"swiglu": 4, "on": 2}


def test_a_factor_llm_keeps_its_teacher_unless_its_loss_weighs_nothing(tmp_path):
    factor = {"label": "f", "begin": {"from": "swiglu", "to": "factor_llm", "teach_steps": 3}}
    untaught = {**factor, "label": "g", "recipe": {"loss_weights": {"prior": 0.0}}}
    found = begun(tmp_path, factor, untaught, allow=["loss_weights"])
    runs = {run.variant: run.recipe for run in found.reporting() if run.seed == 0}
    assert runs["f"].prior_teacher == str(tmp_path / "runs" / "swiglu-bf16-s0")
    assert runs["g"].prior_teacher is None


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"begin": {"from": "swiglu"}}, "it needs a `label`"),
        ({**ON, "name": "moe"}, "has no layer of its own, got ['begin', 'label', 'name']"),
        ({"label": "on", "begin": "swiglu"}, "begin needs `from`"),
        ({"label": "on", "begin": {"from": "swiglu", "n_experts": 4}}, "'n_experts' has no place"),
        ({"label": "on", "begin": {"from": "swigul"}}, "Did you mean 'swiglu'"),
        ({"label": "on", "begin": {"from": "on"}}, "on begin from one another"),
        ({"label": "on", "begin": {"from": "swiglu", "to": "upcycel"}}, "Did you mean 'upcycle'"),
        ({"label": "on", "begin": {"from": "swiglu", "to": "upcycle", "top": 1}}, "option of upc"),
        ({"label": "on", "begin": {"from": "swiglu", "to": "granular", "n_slices": 7}}, "on: "),
    ],
)
def test_what_no_beginning_means_is_refused(tmp_path, variant, message):
    with refused(message):
        begun(tmp_path, variant)


def test_rates_are_not_tried_where_a_run_begins_from_another(tmp_path):
    with refused("say optim.lr in its recipe, and leave lrs out"):
        begun(tmp_path, ON, lrs=[1e-3, 2e-3])


def test_a_baseline_may_begin_from_another_whose_width_is_said(tmp_path):
    found = begun(tmp_path, ON, UP, baseline={"variant": "on"})
    assert found.cells[0].matched[1].residual == 0
    with refused("the baseline begins from swiglu, which must say its d_ff"):
        begun(tmp_path, variants=["swiglu", ON], baseline={"variant": "on"})


def test_what_begins_from_a_variant_that_is_left_out_is_left_out(tmp_path):
    pkm = {"name": "pkm", "n_keys": 32, "top_k": 8}
    found = small(
        tmp_path, variants=["swiglu", pkm, {"label": "more", "begin": {"from": "pkm"}}],
        hold=["active_flops", "params"], controls=[], lrs=[],
    )  # fmt: skip
    assert found.cells[1].unreachable["more"] == "it begins from pkm, which is left out"
    assert "more-bf16-s0" in [run.id for run in found.reporting()]


def test_runs_wait_for_what_they_begin_from(tmp_path):
    seen, lock, order = defaultdict(set), threading.Lock(), []

    class Trainer(MadeUp):
        def __call__(self, run, directory):
            with lock:
                order.append(run.id)
                seen[run.id] = {p.parent.name for p in (tmp_path / "runs").glob("*/result.json")}
            super().__call__(run, directory)

    chain = {"label": "again", "begin": {"from": "up"}}  # listed before what it begins from
    made = Made()
    progress = run_study(begun(tmp_path, chain, UP, ON), workers=2, train=Trainer(), begin=made)
    assert progress.failures == {}
    assert len(order) == 8
    for seed in (0, 1):
        assert f"swiglu-bf16-s{seed}" in seen[f"up-bf16-s{seed}"] & seen[f"on-bf16-s{seed}"]
        assert f"up-bf16-s{seed}" in seen[f"again-bf16-s{seed}"]
    assert sorted(made.asked) == [(f"swiglu-bf16-s{s}", f"up-bf16-s{s}", "upcycle") for s in (0, 1)]


def test_a_second_go_takes_up_what_is_missing(tmp_path):
    run_study(begun(tmp_path), workers=1, train=MadeUp())
    train, made = MadeUp(), Made()
    progress = run_study(begun(tmp_path, UP), workers=1, train=train, begin=made)
    assert train.trained == ["up-bf16-s0", "up-bf16-s1"]
    assert progress.kept == 2
    again = MadeUp()
    run_study(begun(tmp_path, UP), workers=1, train=again, begin=made)
    assert again.trained == []
    assert len(made.asked) == 2


@pytest.mark.parametrize(("how", "why"), [("fail", "failed"), ("diverge", "diverged")])
def test_where_the_first_fails_what_begins_from_it_is_recorded_as_that(tmp_path, how, why):
    chain = {"label": "again", "begin": {"from": "on"}}
    found = begun(tmp_path, chain, ON, UP)
    first = ["swiglu-bf16-s0"]
    train = MadeUp(fail=first) if how == "fail" else MadeUp(diverge=first)
    progress = run_study(found, workers=2, train=train, begin=Made(fail=["up-bf16-s1"]))
    expected = {
        "on-bf16-s0": f"not begun, because swiglu-bf16-s0 {why}",
        "up-bf16-s0": f"not begun, because swiglu-bf16-s0 {why}",
        "again-bf16-s0": "not begun, because on-bf16-s0 failed",
        "up-bf16-s1": "no such split",
    }
    if how == "fail":
        expected["swiglu-bf16-s0"] = "out of memory"
    assert progress.failures == expected
    assert record.load_json(tmp_path / "failures.json") == expected
    assert progress.done == progress.total == 8
    if how == "fail":  # the next go tries all of them again
        assert run_study(found, workers=2, train=MadeUp(), begin=Made()).failures == {}
        assert all(results_of(found, found.reporting()).values())


def test_a_short_run_is_measured_without_what_it_begins_from(tmp_path):
    runs = [run for run in begun(tmp_path, ON).reporting() if run.variant == "on"]
    assert len({key_of(run) for run in runs}) == 1


def test_a_conversion_is_made_once_and_another_one_is_not_taken_for_it(tmp_path):
    recipe = load.load({**RECIPE, "model": {**RECIPE["model"], "ffn": DENSE}})
    source = tmp_path / "dense"
    record.write_text(source / "recipe.yaml", load.to_yaml(recipe))
    write_weights(build(recipe.model), source / "weights.safetensors")
    up = Begin(source="swiglu", to="upcycle", options={"n_experts": 4})
    make(source, tmp_path / "up", up)
    made = json.loads((tmp_path / "up" / "convert.json").read_text())
    assert (made["to"], made["options"]["n_experts"]) == ("upcycle", 4)
    assert made["bpb"]["after"] == pytest.approx(made["bpb"]["before"], rel=1e-4)
    before = (tmp_path / "up" / "convert.json").stat().st_mtime_ns
    make(source, tmp_path / "up", up)
    assert (tmp_path / "up" / "convert.json").stat().st_mtime_ns == before
    with refused("holds another conversion"):
        make(
            source, tmp_path / "up", Begin(source="swiglu", to="upcycle", options={"n_experts": 8})
        )
    with refused("7"):
        make(source, tmp_path / "cut", Begin(source="", to="granular", options={"n_slices": 7}))
