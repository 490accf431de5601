"""Claims: how they are read, what is run and what the page says."""

import functools
import json
import re

import claim_toys
import pytest
from claim_toys import BETTER, Planted
from recipe_toys import refused
from study_toys import RECIPE

import zoo
from layers.precision.operands import OPERANDS
from recipes.claiming.go import chosen, show_plan, try_claims
from recipes.claiming.schema import names, read_claim, read_tests
from recipes.claiming.trial import outcome, prepare


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"test": []}, "Did you mean 'tests'"),
        ({"tests": []}, "tests is empty"),
        ({"tests": [{**BETTER, "measure": "bbp"}]}, "tests[0]: unknown measure 'bbp'. Did you"),
        ({"tests": [{**BETTER, "direction": "less"}]}, "direction must be one of lower, higher"),
        ({"tests": [{**BETTER, "margin": 0.1}]}, "equal takes a margin, lower"),
        ({"tests": [{**BETTER, "direction": "equal"}]}, "equal takes a margin"),
        ({"tests": [{**BETTER, "against": None, "scale": "ratio"}]}, "a ratio needs something"),
        ({"tests": [{**BETTER, "of": {"varaint": "moe"}}]}, "Did you mean 'variant'"),
        ({"tests": [{**BETTER, "of": "meo"}]}, "unknown variant of a test 'meo'. Did you mean"),
        ({"tests": [{**BETTER, "of": {"precision": "fp8"}}]}, "unknown precision of a test"),
        ({"study": {"name": "x"}}, "study.name comes from the claim"),
        ({"study": {"variant": ["swiglu"]}}, "claim small: unknown study key 'variant'"),
    ],
)  # fmt: skip
def test_what_no_claim_means_is_refused(tmp_path, keys, message):
    with refused(message):
        prepare(claim_toys.small(**keys), tmp_path)


@functools.cache
def shipped(name):
    """A shipped claim, planned with two seeds: the others' runs are as these."""
    (trial,), _ = chosen([name, "out=/nowhere", "seeds=[0,1]"])
    return trial


def test_the_shipped_claims_are_those_promised():
    assert set(names()) >= {
        "fp4_formats", "loss_free", "matformer", "moe_plus_plus", "nvfp4", "spark",
        "ultramem_v2_facts", "ultramem_v2_text", "upcycling", "versatile_ffn",
    }  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_every_shipped_claim_plans_without_training(name):
    trial = shipped(name)
    claim, n_seeds = trial.claim, len(trial.claim.study["seeds"])
    runs = [*trial.plan.tuning, *trial.plan.reporting()]
    assert claim.name == name
    assert re.fullmatch(r"\d{4}\.\d{5}", claim.paper.arxiv)
    assert claim.paper.numbers
    assert claim.limits
    assert n_seeds >= 3
    assert len(trial.plan.tuning) + (len(runs) - len(trial.plan.tuning)) / 2 * n_seeds <= 45
    assert all(run.recipe.trainer.threads == 1 for run in runs)
    assert max(run.recipe.model.d_model for run in runs) <= 128
    assert not trial.directory.exists()


def test_ablations_of_nvfp4_leave_out_what_they_say():
    policies = {p.name: p for p in map(zoo.policy_of, shipped("nvfp4").plan.study.precisions)}
    full = policies["nvfp4"].default
    changed = {
        name: {x for x in OPERANDS if getattr(policy.default, x) != getattr(full, x)}
        for name, policy in policies.items()
    }
    given = {name: json.dumps(policy.to_plain()) for name, policy in policies.items()}
    assert changed["no_sr"] == {"dgrad_dy", "wgrad_dy"}
    assert changed["no_rht"] == {"wgrad_dy", "wgrad_x"}
    assert changed["w_1d"] == {"fprop_w", "dgrad_w"}
    assert changed["no_tail"] == set()
    assert "stochastic" not in given["no_sr"]
    assert "hadamard" not in given["no_rht"]
    assert "2d" not in given["w_1d"]
    assert [name for name, plain in given.items() if "last 15%" not in plain] == [
        "bf16", "no_tail", "none_of_the_four",
    ]  # fmt: skip


def test_missing_runs_are_trained_judged_and_told(tmp_path):
    worse = claim_toys.small(name="worse", tests=[{**BETTER, "direction": "higher"}])
    trials = [prepare(claim, tmp_path) for claim in (claim_toys.small(), worse)]
    train = Planted({"moe": 0.1})
    path = try_claims(trials, tmp_path, workers=1, trainer=train)
    assert len(train.trained) == 12
    text, told = path.read_text(), json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert (told["small"]["verdict"], told["worse"]["verdict"]) == ("reproduced", "contradicted")
    assert told["small"]["runs"] == {"finished": 6, "planned": 6}
    test = told["small"]["tests"][0]
    estimate = f"{test['estimate']:+.4f} ({test['low']:+.4f} to {test['high']:+.4f})"
    costs = f"{sum(r['training_flops'] for r in told.values()) / 2:.3g} training FLOPs"
    for part in (
        "perplexity 34.1 against 41.2", "> Sparse is better.", "arXiv:1701.06538, table 1",
        "Verdict here: **reproduced**", "Verdict here: **contradicted**", estimate, costs,
        "6 of 6 runs", "- Four steps.", f"{test['p_holm']:.3g}", "| < 0 |", "were not tuned",
    ):  # fmt: skip
        assert part in text
    again = Planted({"moe": 0.1})
    assert try_claims(trials, tmp_path, workers=1, trainer=again) == path
    assert again.trained == []
    assert path.read_text() == text


def test_the_page_can_be_written_from_whatever_is_there(tmp_path):
    trial = prepare(claim_toys.small(), tmp_path)
    train = Planted({"moe": 0.1})
    text = try_claims([trial], tmp_path, train=False, trainer=train).read_text()
    assert train.trained == []
    assert "Verdict here: **not run**" in text
    assert "0 of 6 runs" in text
    failing = Planted({"moe": 0.1}, fail=["moe-bf16-s2"])
    try_claims([trial], tmp_path, workers=1, trainer=failing)
    text = try_claims([trial], tmp_path, train=False).read_text()
    assert "not resolved: 2 seeds, and no claim below 3" in text
    assert "5 of 6 runs" in text
    assert "- moe-bf16-s2: out of memory" in text


def test_precisions_are_sides_and_so_are_rates_that_were_tuned(tmp_path):
    sides = {"of": {"precision": "nvfp4"}, "against": {"precision": "bf16"}}
    gap = {**sides, "measure": "bpb", "direction": "lower", "scale": "ratio"}
    study = {"variants": ["swiglu"], "precisions": ["bf16", "nvfp4"], "lrs": [1e-3, 2e-3]}
    tests = [{**gap, "threshold": 1.1}, {**gap, "threshold": 1.01}]
    trial = prepare(claim_toys.small(study=study, tests=tests), tmp_path)
    train = Planted(by_precision={"nvfp4": -0.15})
    text = try_claims([trial], tmp_path, workers=2, trainer=train).read_text()
    assert "were tried on seed 100" in text
    assert "At an edge of these, so perhaps not at its best: swiglu bf16 (0.002)" in text
    found = outcome(trial)
    assert [j.verdict for j in found.judged] == ["reproduced", "contradicted"]
    assert found.verdict == "contradicted"
    assert (found.finished, found.planned) == (8, 8)
    assert {run.lr for g in found.groups for run in g.runs.values()} == {2e-3}


def test_where_a_first_run_fails_what_begins_from_it_is_told(tmp_path):
    on = {"label": "on", "begin": {"from": "swiglu"}}
    study = {"variants": [{"name": "swiglu", "d_ff": 64}, on]}
    trial = prepare(claim_toys.small(study=study, tests=[{**BETTER, "of": "on"}]), tmp_path)
    failing = Planted({"on": 0.1}, fail=["swiglu-bf16-s1"])
    text = try_claims([trial], tmp_path, workers=2, trainer=failing).read_text()
    assert "- on-bf16-s1: not begun, because swiglu-bf16-s1 failed" in text
    try_claims([trial], tmp_path, workers=2, trainer=Planted({"on": 0.1}))
    found = outcome(trial)
    assert (found.verdict, found.failures) == ("reproduced", {})
    assert sorted(found.groups[1].runs) == [0, 1, 2]  # by the study's seed, not the batches'


def test_names_files_and_overrides_are_told_apart(tmp_path):
    said = ["loss_free", f"out={tmp_path}", "seeds=[4,5,6]", "trainer.max_steps=2"]
    (trial,), out = chosen(said)
    assert (out, trial.directory) == (tmp_path, tmp_path / "loss_free")
    assert {run.seed for run in trial.plan.reporting()} == {4, 5, 6}
    assert {run.recipe.trainer.max_steps for run in trial.plan.reporting()} == {2}
    with refused("Did you mean 'loss_free'"):
        chosen(["loss_fre"])
    with refused("claim loss_free is named twice"):
        chosen(["loss_free", "loss_free"])
    with refused("unknown key of a study or its recipe 'sedes'"):
        chosen(["loss_free", "sedes=[0,1]"])


def test_the_plan_shows_runs_and_flops(tmp_path, capsys):
    show_plan([prepare(claim_toys.small(), tmp_path)], details=True)
    shown = capsys.readouterr().out
    assert "reporting: 6 runs" in shown
    assert re.search(r"small +arXiv:1701.06538 +1 +6 +3,072 ", shown)  # 6 runs of 4 * 4 * 32
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_seed_opens_every_test_of_what_training_made(tmp_path):
    """Three of four seeds went well; the fourth must not be left out of any figure."""
    shares = {**BETTER, "direction": "higher"}
    tests = [{**shares, "measure": m} for m in ("bpb", "nats", "tokens_per_s")]
    tests.append({**BETTER, "measure": "params"})
    study = {"seeds": [0, 1, 2, 3]}
    trial = prepare(claim_toys.small(study=study, tests=tests), tmp_path)
    train = Planted({"moe": -0.1}, diverge=["moe-bf16-s1"])
    text = try_claims([trial], tmp_path, workers=2, trainer=train).read_text()
    judged = outcome(trial).judged
    assert [(j.how, j.seeds) for j in judged[:3]] == [("a run diverged", 4)] * 3
    assert judged[3].how == "counted"
    assert "not resolved: a run diverged" in text
    told = json.loads((tmp_path / "claims.json").read_text())["claims"]["small"]["tests"]
    assert told[0]["of"] is None


def test_tests_of_a_claim_have_their_defaults():
    (test,) = read_tests(read_claim(claim_toys.small(study={"recipe": RECIPE})))
    assert (test.of.variant, test.against.variant, test.bound) == ("moe", "swiglu", 0.0)
