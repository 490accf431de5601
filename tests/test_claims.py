"""Claims: how they are read, when a test is reproduced, what is run and what the page says."""

import functools
import json
import re
from typing import Any

import claim_toys
import pytest
import report_data
from claim_toys import BETTER, Planted
from recipe_toys import refused
from scipy import stats
from study_toys import RECIPE

import zoo
from layers.precision.operands import OPERANDS
from recipes.claiming.go import chosen, show_plan, try_claims
from recipes.claiming.judge import judge, overall
from recipes.claiming.measures import MEASURES, value_of
from recipes.claiming.schema import Test, names, read_claim, read_tests
from recipes.claiming.trial import outcome, prepare
from recipes.report.records import Run
from recipes.report.strict import read_as

NOISE = [0.001, -0.002, 0.0015, -0.0005]  # of the seeds, in pairs
BASE = {0: 3.0, 1: 3.1, 2: 2.9, 3: 3.05}


def a_test(**said: Any) -> Test:
    return Test(**said)


def verdict_of(shift: float, *, noise: float = 1.0, **said: Any) -> Any:
    """The one test of a claim, its side `shift` above the other but for the noise."""
    of = {seed: BASE[seed] + shift + noise * NOISE[seed] for seed in BASE}
    (found,) = judge([(a_test(of=None, against="swiglu", measure="bpb", **said), of, BASE)])
    return found


LOWER, HIGHER = {"direction": "lower"}, {"direction": "higher"}
EQUAL = {"direction": "equal", "margin": 0.01}


@pytest.mark.parametrize(
    ("shift", "said", "verdict"),
    [
        (-0.05, LOWER, "reproduced"),
        (0.0, LOWER, "not resolved"),
        (0.05, LOWER, "contradicted"),
        (0.05, HIGHER, "reproduced"),
        (-0.05, HIGHER, "contradicted"),
        (0.01, {**LOWER, "threshold": 0.02}, "reproduced"),
        (0.02, {**LOWER, "threshold": 0.02}, "not resolved"),
        (0.03, {**LOWER, "threshold": 0.02}, "contradicted"),
        (0.0, EQUAL, "reproduced"),
        (0.01, EQUAL, "not resolved"),
        (0.05, EQUAL, "contradicted"),
        (-0.05, EQUAL, "contradicted"),
        (0.05, {**EQUAL, "threshold": 0.05}, "reproduced"),
        (0.0, {**EQUAL, "threshold": 0.05}, "contradicted"),
        (0.06, {**HIGHER, "scale": "ratio", "threshold": 1.01}, "reproduced"),
        (0.03, {**HIGHER, "scale": "ratio", "threshold": 1.01}, "not resolved"),
        (0.0, {**HIGHER, "scale": "ratio", "threshold": 1.01}, "contradicted"),
        (0.0, {**EQUAL, "scale": "ratio"}, "reproduced"),
        (0.06, {**EQUAL, "scale": "ratio"}, "contradicted"),
    ],
)
def test_a_planted_effect_gives_its_verdict(shift, said, verdict):
    assert verdict_of(shift, **said).verdict == verdict


@pytest.mark.parametrize("threshold", [0.0, -0.01])
def test_the_interval_and_p_are_those_of_students_t_in_pairs(threshold):
    found = verdict_of(-0.004, noise=3.0, threshold=threshold, **LOWER)
    pairs = [-0.004 + 3 * x for x in NOISE]
    expected: Any = stats.ttest_1samp(pairs, threshold)
    assert found.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.estimate == pytest.approx(sum(pairs) / 4)


def test_a_ratio_is_judged_on_logarithms():
    of = {seed: 1.02 * x * (1 + NOISE[seed]) for seed, x in BASE.items()}
    test = a_test(of=None, against="x", measure="bpb", scale="ratio", **HIGHER)
    found: Any = judge([(test, of, BASE)])[0]
    assert found.estimate == pytest.approx(1.02, rel=1e-3)
    assert found.low < 1.02 < found.high
    assert (found.of, found.against) == (pytest.approx(3.073, abs=2e-3), pytest.approx(3.0125))


def test_a_figure_by_itself_is_held_against_the_threshold():
    test = a_test(of=None, measure="loops", direction="lower", threshold=4.0)
    (found,) = judge([(test, {0: 3.0, 1: 3.1, 2: 2.9}, None)])
    assert (found.verdict, found.against) == ("reproduced", None)
    assert found.estimate == pytest.approx(3.0)


def test_what_is_counted_needs_no_seeds():
    test = a_test(of=None, against="x", measure="params", scale="ratio", **LOWER)
    (found,) = judge([(test, {0: 90.0}, {0: 100.0})])
    assert (found.verdict, found.how, found.p) == ("reproduced", "counted", None)
    assert found.estimate == pytest.approx(0.9)
    (found,) = judge([(test, {0: 110.0}, {0: 100.0})])
    assert found.verdict == "contradicted"


@pytest.mark.parametrize(
    ("of", "against", "verdict", "how"),
    [
        ({}, {0: 1.0}, "not run", "no finished run has that figure"),
        ({0: 1.0, 1: 1.0}, {0: 3.0, 1: 3.1}, "not resolved", "2 seeds, and no claim below 3"),
        ({0: 1.0, 1: float("nan"), 2: 1.0}, {0: 3.0, 1: 3.1, 2: 3.0}, "not resolved",
         "a run diverged"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, {0: 3.0, 1: 4.0, 2: 5.0}, "not resolved", "alike"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_says_why(of, against, verdict, how):
    (found,) = judge([(a_test(of=None, against="x", measure="bpb", **LOWER), of, against)])
    assert found.verdict == verdict
    assert how in found.how


def test_p_is_corrected_over_the_tests_of_a_claim():
    def case(shift, wide):
        of = {s: BASE[s] + shift + wide * NOISE[s] for s in BASE}
        return a_test(of=None, against="x", measure="bpb", **LOWER), of, BASE

    alone: Any = judge([case(-0.01, 3.0)])
    assert (alone[0].verdict, alone[0].p < 0.05) == ("reproduced", True)
    three: Any = judge([case(-0.01, 3.0), case(0.0, 1.0), case(0.0, 1.0)])
    assert three[0].p == alone[0].p
    assert three[0].p_holm == pytest.approx(min(1.0, 3 * alone[0].p))
    assert three[0].high < 0  # uncorrected it clears the threshold
    assert three[0].verdict == "not resolved"


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [
        (["reproduced", "reproduced"], "reproduced"),
        (["reproduced", "not resolved"], "not resolved"),
        (["reproduced", "not run"], "not resolved"),
        (["reproduced", "not resolved", "contradicted"], "contradicted"),
        (["not run", "not run"], "not run"),
    ],
)
def test_the_claim_follows_from_its_tests(verdicts, verdict):
    shift = {"reproduced": -0.05, "not resolved": 0.0, "contradicted": 0.05}
    nothing = judge([(a_test(**LOWER), {}, {})])[0]
    found = [verdict_of(shift[v], direction="lower") if v in shift else nothing for v in verdicts]
    assert overall(found) == verdict


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


def record_of(**keys):
    """A run with more in its record."""
    plain = report_data.run("moe_plus_plus", "bf16", 0, steps=200)
    return read_as(Run, {**plain, **keys}, "run")


def test_measures_read_what_a_run_keeps():
    run = record_of(
        density=[{"layer": i, "n_neurons": 10, "target": 0.1, "active": x}
                 for i, x in enumerate((0.1, 0.3))],
        loops=[{"layer": 0, "counts": [1.0, 0.0, 3.0]}],
        widths=[{"widths": [8, None, 8], "trained": True, "params": 7, "active_params": 5.0,
                 "nonembedding_params": 3, "flops_per_token": 11.0, "bpb": 2.5, "agreement": 1.0,
                 "kl": 0.0}],
    )  # fmt: skip

    def value(measure, width=None, tokens=1):
        return value_of(run, measure, width, tokens)

    assert value("bpb") == run.final.bpb
    assert value("density") == pytest.approx(0.2)
    assert value("loops") == pytest.approx(2.5)
    assert (value("bpb", 8), value("params", 8), value("flops_per_token", 8)) == (2.5, 7, 11.0)
    assert value("bpb", 16) is None
    assert value("weight_bytes_per_token", tokens=16) == run.cost.weight_bytes_per_token["16"]
    assert value("weight_bytes_per_token", tokens=3) is None
    shares = [layer.zero_computation_share for layer in run.load]
    assert value("zero_computation_share") == pytest.approx(sum(shares) / len(shares))
    violations = [layer.max_violation for layer in run.load]
    assert value("max_violation") == pytest.approx(sum(violations) / len(violations))
    assert value("training_flops") == run.curve[-1].flops
    assert value("accuracy") is None
    assert value("dropped") is None
    point = {**report_data.run("moe", "bf16", 0, steps=200)["curve"][-1]}
    dropping = record_of(curve=[{**point, "router": {"load/dropped": x}} for x in (0.6, 0.1)])
    assert value_of(dropping, "dropped", None, 1) == 0.1
    starting = record_of(curve=[{**point, "step": 0, "eval_bpb": 7.5}, point])
    assert value_of(starting, "start_bpb", None, 1) == 7.5


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_every_measure_may_be_missing_but_never_fails(name):
    bare = record_of(curve=[], load=[])
    value = value_of(bare, name, None, 1)
    assert value is None or format(value, MEASURES[name].form)
    assert value_of(bare, name, 64, 1) is None


def test_tests_of_a_claim_have_their_defaults():
    (test,) = read_tests(read_claim(claim_toys.small(study={"recipe": RECIPE})))
    assert (test.of.variant, test.against.variant, test.bound) == ("moe", "swiglu", 0.0)
