"""Studies: what they plan, how they go on, which learning rates and seeds they come to."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from recipe_toys import refused
from study_toys import RECIPE, MadeUp, small

from recipes import load, record
from recipes.study.plan import Tuned
from recipes.study.run import directory_of, rates_of, results_of, run_study
from recipes.study.schema import read_study


def test_every_variant_is_tried_at_every_rate_and_reported_on_other_seeds(tmp_path):
    found = small(tmp_path, controls=[])
    assert [run.id for run in found.tuning][:3] == [
        "swiglu-bf16-lr0.001-s100", "moe-bf16-lr0.001-s100", "swiglu-bf16-lr0.002-s100",
    ]  # fmt: skip
    assert len(found.tuning) == 2 * 3
    assert {run.seed for run in found.reporting()} == {0, 1, 2}
    assert {run.stage for run in found.reporting()} == {"reporting"}


def test_controls_come_by_themselves(tmp_path):
    found = small(tmp_path)
    assert {label: tuple(c) for label, c in found.controls.items()} == {
        "swiglu:as-large-as-moe": ("dense_total", "moe"),
        "moe:random-router": ("random_router", "moe"),
    }
    (cell,) = found.cells
    dense = cell.variant("swiglu:as-large-as-moe")
    runs = {run.variant: run for run in found.reporting() if run.seed == 0}
    assert dense is not None
    params = {v: MadeUp().result(run)["cost"]["params"] for v, run in runs.items()}
    assert abs(params["swiglu:as-large-as-moe"] / params["moe"] - 1) < 0.02
    assert runs["moe:random-router"].recipe.model.ffn["router"] == {"name": "random"}
    assert (
        runs["moe:random-router"].recipe.model.ffn["d_expert"]
        == (runs["moe"].recipe.model.ffn["d_expert"])
    )


def test_a_width_that_is_the_same_in_two_matchings_is_trained_once(tmp_path):
    found = small(tmp_path, hold=["active_flops", "params"], controls=[])
    runs = {run.id: run.holds for run in found.reporting() if run.seed == 0}
    assert runs == {
        "swiglu-bf16-s0": ("active_flops", "params"),
        "moe-bf16-s0": ("active_flops",),
        "moe-params-bf16-s0": ("params",),
    }


def test_a_budget_out_of_reach_is_said_and_only_the_primary_one_must_be_met(tmp_path):
    pkm = {"name": "pkm", "n_keys": 32, "top_k": 8}
    found = small(tmp_path, variants=["swiglu", pkm], hold=["active_flops", "params"], controls=[])
    assert found.cells[0].unreachable == {}
    assert "no width comes within" in found.cells[1].unreachable["pkm"]
    assert "pkm-params-bf16-s0" not in [run.id for run in found.reporting()]
    with refused("size base: pkm: params: no width comes within"):
        small(tmp_path, variants=["swiglu", pkm], hold=["params"])


SIZES = [
    {"label": "s", "model": {"d_model": 32}},
    {"label": "m", "model": {"d_model": 48}, "trainer": {"max_steps": 8}},
    {"label": "l", "model": {"d_model": 64}},
]


def test_a_size_takes_the_rate_of_the_nearest_that_was_tuned(tmp_path):
    found = small(
        tmp_path, sizes=SIZES, tuning={"sizes": ["m"]}, precisions=["bf16", "fp32"], controls=[]
    )
    assert {run.size for run in found.tuning} == {"m"}
    assert {run.precision for run in found.tuning} == {"bf16"}
    for size in ("s", "m", "l"):
        assert found.tuned_as(size, "moe", "fp32") == Tuned("m", "moe", "bf16")
    rates = {Tuned("m", "swiglu", "bf16"): 1e-3, Tuned("m", "moe", "bf16"): 4e-3}
    told = {(r.size, r.variant): r.recipe.optim.lr for r in found.reporting(rates)}
    assert told["l", "moe"] == 4e-3
    assert told["s", "swiglu"] == 1e-3
    steps = {run.size: run.recipe.trainer.max_steps for run in found.reporting(rates)}
    assert steps == {"s": 4, "m": 8, "l": 4}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seeds": [0, 100]}, "seed 100 is tuned on and reported"),
        ({"seeds": [0]}, "a difference needs two seeds or more"),
        ({"seeds": [0, 0]}, "seeds names one twice"),
        ({"controls": ["dense"]}, "control of a study"),
        ({"hold": ["flop"]}, "budget in hold"),
        ({"sizes": [{"model": {}}]}, "sizes[0] needs a `label`"),
        ({"sizes": [{"label": "s", "modle": {}}]}, "Did you mean 'model'"),
        ({"sizes": SIZES, "tuning": {"sizes": ["x"]}}, "size in tuning.sizes"),
        ({"tuning": {"precisions": ["fp8"]}}, "precision in tuning.precisions"),
        ({"resolution": 2.0}, "resolution must be in (0, 1)"),
        ({"baseline": {"variant": "swiglu", "lr": 1e-3}}, "rate is tuned like any other: leave it"),
        ({"variants": ["swiglu", {"name": "moe", "recipe": {"optim": {"lr": 1.0}}}]},
         "moe must leave optim.lr to lrs"),
        ({"variants": ["swiglu", {"name": "moe", "recipe": {"optim": {"clip_norm": 0.1}}}]},
         "differ in optim.clip_norm"),
    ],
)  # fmt: skip
def test_what_no_study_means_is_refused(tmp_path, keys, message):
    with refused(message):
        small(tmp_path, **keys)


def test_unknown_keys_are_told_with_the_nearest_name():
    with refused("Did you mean 'resolution'"):
        read_study({"variants": ["swiglu"]}, ["resolutoin=0.1"])


def test_each_variant_is_reported_at_the_rate_that_was_best_for_it(tmp_path):
    found = small(tmp_path, controls=[])
    train = MadeUp(best=4e-3)
    run_study(found, workers=2, train=train)
    rates, without = rates_of(found)
    assert set(rates.values()) == {4e-3}
    assert without == []
    assert len(train.trained) == 6 + 6
    assert all("lr0.004" in run_id for run_id in train.trained[6:])


def test_a_second_go_trains_only_what_is_missing(tmp_path):
    run_study(small(tmp_path, controls=[]), workers=1, train=MadeUp())
    again = MadeUp()
    progress = run_study(small(tmp_path, controls=[]), workers=1, train=again)
    assert again.trained == []
    assert (progress.total, progress.kept) == (6, 6)
    more = MadeUp()
    run_study(small(tmp_path, controls=[], seeds=[0, 1, 2, 3]), workers=1, train=more)
    assert sorted(more.trained) == ["moe-bf16-lr0.002-s3", "swiglu-bf16-lr0.002-s3"]
    other = small(tmp_path, controls=[], recipe=load.merged(RECIPE, {"data": {"batch_size": 8}}))
    with refused("holds a run of another recipe (differs in data.batch_size): delete it"):
        run_study(other, workers=1, train=MadeUp())


def test_a_run_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    found = small(tmp_path, controls=[])
    train = MadeUp(fail=["moe-bf16-lr0.001", "moe-bf16-lr0.002-s2"], diverge=["moe-bf16-lr0.004"])
    progress = run_study(found, workers=2, train=train)
    reason = {
        "moe-bf16-lr0.001-s100": "out of memory", "moe-bf16-lr0.002-s2": "out of memory",
        # a rate that diverged was tried
        "base-moe-bf16": "chosen from 2 of 3 learning rates: runs at 0.001 failed",
    }  # fmt: skip
    assert progress.failures == reason
    assert record.load_json(tmp_path / "failures.json") == reason
    rates, _ = rates_of(found)
    assert rates[Tuned("base", "moe", "bf16")] == 2e-3  # one rate failed, one diverged
    assert len([r for r in results_of(found, found.reporting(rates)).values() if r]) == 5
    progress = run_study(found, workers=2, train=MadeUp())
    assert progress.failures == {}
    assert record.load_json(tmp_path / "failures.json") == {}


def test_a_variant_without_any_rate_is_told_and_not_reported(tmp_path):
    found = small(tmp_path, controls=[])
    progress = run_study(found, workers=2, train=MadeUp(diverge=["moe-bf16"]))
    assert progress.failures == {
        "base-moe-bf16": "no learning rate came through, so nothing is reported of it"
    }
    assert not any(
        path.name.startswith("moe-bf16-lr0.002-s0") for path in (tmp_path / "runs").iterdir()
    )


@pytest.mark.parametrize(("noise", "resolution", "fewest"), [(0.02, 0.005, 6), (1e-4, 0.01, 0)])
def test_seeds_are_added_until_the_wanted_difference_can_be_told(
    tmp_path, noise, resolution, fewest
):
    found = small(tmp_path, controls=[], resolution=resolution, most_seeds=12)
    train = MadeUp(noise=noise)
    progress = run_study(found, workers=2, train=train)
    seeds = {int(re.search(r"-s(\d+)$", run_id)[1]) for run_id in train.trained} - {100}
    if not fewest:
        assert progress.stage == "reporting"
        assert seeds == {0, 1, 2}
    else:
        assert progress.stage == "further seeds"
        assert len(seeds) >= fewest
        assert len(seeds) <= 12


@pytest.mark.parametrize(
    ("noise", "resolution", "stage"),
    [(0.0, 0.01, "reporting"), (0.02, 1e-9, "further seeds")],
)
def test_no_noise_needs_no_seeds_and_too_much_needs_the_most(tmp_path, noise, resolution, stage):
    keys = {"controls": [], "lrs": [], "variants": ["swiglu"], "most_seeds": 4}
    found = small(tmp_path, resolution=resolution, **keys)
    progress = run_study(found, workers=1, train=MadeUp(noise=noise))
    assert progress.stage == stage


def test_killed_and_started_again_a_study_ends_with_every_run(tmp_path):
    out = tmp_path / "killed"
    found = small(out, controls=[], lrs=[], variants=["swiglu"], seeds=[0, 1])
    path = tmp_path / "small.yaml"
    record.write_text(path, load.to_yaml({**found.resolved, "out": str(out)} | {"overrides": None}))
    text = path.read_text().replace("overrides: null\n", "")
    record.write_text(path, text)
    command = [sys.executable, "-m", "recipes.cli", "study", "run", str(path), "--workers", "1"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    first = directory_of(found, found.reporting()[0]) / "result.json"
    deadline = time.monotonic() + 400
    while not first.is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = first.stat().st_mtime_ns
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "reporting: 2 runs, 1 kept" in done.stdout
    assert first.stat().st_mtime_ns == kept
    assert all(results_of(found, found.reporting()).values())
