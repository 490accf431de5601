"""A study gone on with: under its own recipe, wherever it lies; what is refused changes nothing."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import claim_toys
import pytest
from recipe_toys import refused
from study_toys import RECIPE, MadeUp, small

from recipes import load, record
from recipes.claiming.go import try_claims
from recipes.claiming.trial import prepare
from recipes.planned import ensure
from recipes.study import calibrate, gather
from recipes.study.ray_runs import RayTasks
from recipes.study.run import directory_of, run_study

KEYS = {"controls": [], "lrs": [], "seeds": [0, 1]}
DENSE = {"name": "swiglu", "d_ff": 64}
BEGUN = [
    DENSE,
    {"label": "on", "begin": {"from": "swiglu"}},
    {"label": "f", "begin": {"from": "swiglu", "to": "factor_llm", "teach_steps": 3}},
]
ANY = {**KEYS, "hold": ["params"], "tolerance": 10.0, "allow": ["loss_weights"], "variants": BEGUN}


def convert_nothing(source, out, begin):
    """In place of a conversion."""


def go(found, **keys):
    """Run it on made-up results. Returns the ids that were trained."""
    train = keys.pop("train", MadeUp())
    run_study(found, workers=1, train=train, begin=convert_nothing, **keys)
    return train.trained


def files(directory):
    """What a report of the study would begin with."""
    return [(directory / name).read_bytes() for name in ("study.yaml", "plan.json")]


@pytest.mark.parametrize(
    ("key", "fail"), [("data.batch_size", []), ("optim.lr", ["bf16"])],
    ids=["finished", "not finished"],
)  # fmt: skip
def test_a_changed_recipe_is_refused_and_the_old_plan_stays(tmp_path, key, fail):
    go(small(tmp_path, **KEYS), train=MadeUp(fail=fail))
    before = files(tmp_path)
    part, _, name = key.partition(".")
    other = small(tmp_path, recipe=load.merged(RECIPE, {part: {name: 8}}), **KEYS)
    train = MadeUp()
    with refused(f"holds a run of another recipe (differs in {key}): delete it"):
        go(other, train=train)
    assert train.trained == []
    assert files(tmp_path) == before
    assert len(go(small(tmp_path, **KEYS))) == (4 if fail else 0)


def test_a_run_that_trained_something_else_is_not_handed_back(tmp_path):
    found = small(tmp_path, **KEYS)
    run = found.reporting()[0]
    other = replace(run, recipe=replace(run.recipe, seed=7))
    with refused("differs in seed"):
        ensure(run, directory_of(found, run), lambda run, directory: MadeUp()(other, directory))


@pytest.fixture
def unmeasured(monkeypatch):
    """A record of the runs alone: no trace and no limits of the machine."""
    monkeypatch.setattr(gather, "traces_of", lambda directory, runs: {})
    monkeypatch.setattr(gather, "machine_of", lambda directory, threads: None)


@pytest.mark.usefixtures("unmeasured")
def test_a_result_of_another_recipe_is_a_stray_where_the_plan_says_its_recipe(tmp_path):
    go(small(tmp_path, **KEYS))
    path = tmp_path / "runs" / "moe-bf16-s0" / "result.json"
    plain = json.loads(path.read_text())
    plain["recipe"]["data"]["batch_size"] = 8
    path.write_text(json.dumps(plain))
    found = gather.gather(tmp_path)
    assert found.strays == ("moe-bf16-s0",)
    assert "moe-bf16-s0" not in [entry.run.id for entry in found.runs]
    plan = json.loads((tmp_path / "plan.json").read_text())
    for run in plan["runs"]:  # a plan from before it was kept
        del run["recipe_sha256"], run["inside"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert len(gather.gather(tmp_path).runs) == 4


@pytest.mark.usefixtures("unmeasured")
def test_begun_runs_are_the_same_however_their_study_is_spelled_or_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = go(small(Path("here"), **ANY))
    assert len(trained) == 6
    assert go(small(tmp_path / "here", **ANY)) == []
    (tmp_path / "here").rename(tmp_path / "there")
    moved = small(tmp_path / "there", **ANY)
    assert go(moved) == []
    assert gather.gather(tmp_path / "there").strays == ()
    path = tmp_path / "there" / "runs" / "on-bf16-s1" / "result.json"
    path.write_text(path.read_text().replace("here/runs/swiglu-bf16-s1", "here/runs/f-bf16-s1"))
    with refused("on-bf16-s1 holds a run of another recipe (differs in init_from)"):
        go(moved)


def test_a_moved_run_that_is_not_finished_begins_from_where_its_source_lies_now(tmp_path):
    go(small(tmp_path / "here", **ANY), train=MadeUp(fail=["f-bf16-s0"]))
    (tmp_path / "here").rename(tmp_path / "there")
    moved = small(tmp_path / "there", **ANY)
    assert go(moved) == ["f-bf16-s0"]
    there = load.read_yaml(tmp_path / "there" / "runs" / "f-bf16-s0" / "recipe.yaml")
    assert there["init_from"] == str(tmp_path / "there" / "begun" / "f-bf16-s0")
    assert there["prior_teacher"] == str(tmp_path / "there" / "runs" / "swiglu-bf16-s0")


def test_ray_is_refused_where_a_run_begins_from_another(tmp_path):
    far = RayTasks.__new__(RayTasks)  # no cluster is asked
    with refused("whose weights lie on this machine alone: leave out Ray"):
        run_study(small(tmp_path, **ANY), workers=1, train=far)


class SlowToStart:
    """Processes whose worker takes a while to start, and runs that take none."""

    made, start_s = [], 0.4

    def __init__(self, stdout):
        self.ready, self.stopped = False, False
        self.made.append(self)

    def start(self):
        time.sleep(0 if self.ready else self.start_s)
        self.ready = True

    def __call__(self, run, directory):
        self.start()
        plain = MadeUp().result(SimpleNamespace(**{**vars(run), "precision": "bf16"}))
        plain["speed"]["train_s"] = 0.0
        record.write_json(directory / "result.json", plain)

    def stop(self):
        self.stopped = True


def test_a_workers_start_is_no_part_of_what_a_run_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "Processes", SlowToStart)
    monkeypatch.setattr(SlowToStart, "made", [])
    found = small(tmp_path, **KEYS)
    measured = calibrate.calibrate(found, found.reporting())
    assert len(measured) == 2
    assert all(m.overhead_s < SlowToStart.start_s for m in measured.values())
    assert [processes.stopped for processes in SlowToStart.made] == [True]


@pytest.mark.parametrize("train", [True, False])
def test_a_claim_that_is_refused_is_told_and_the_others_go_on(tmp_path, capsys, train):
    study = {"seeds": [0, 1, 2]}
    claims = [claim_toys.small(name=name, study=study) for name in ("first", "second")]
    trials = [prepare(claim, tmp_path) for claim in claims]
    made = claim_toys.Planted({"moe": 0.05})
    try_claims(trials, tmp_path, workers=1, trainer=made)
    if train:
        for path in (tmp_path / "second" / "runs").glob("*-s2/result.json"):
            path.unlink()
    changed = load.merged(RECIPE, {"data": {"batch_size": 8}})
    claims[0] = claim_toys.small(name="first", study={**study, "recipe": changed})
    trials = [prepare(claim, tmp_path) for claim in claims]
    made = claim_toys.Planted({"moe": 0.05})
    page = try_claims(trials, tmp_path, workers=1, train=train, trainer=made).read_text()
    assert len(made.trained) == (2 if train else 0)
    plain = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert (plain["first"]["verdict"], plain["second"]["verdict"]) == ("not run", "reproduced")
    assert re.search(r"- first: .*holds a run of another recipe \(differs in data.batch", page)
    assert ("failed: first: " in capsys.readouterr().out) == train
