"""Workers: runs in forks of a process that outlives them, and none that outlives its study."""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from recipe_toys import timeless, tiny_recipe

from recipes import load, record
from recipes.planned import ROOT, PlannedRun, Processes, RunFailed
from recipes.train import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ENDLESS = 10**6


def planned(tmp_path, name, **trainer):
    """A run of a few steps, its directory ready."""
    recipe = tiny_recipe("swiglu")
    recipe = replace(recipe, trainer=replace(recipe.trainer, **{"max_steps": 2, **trainer}))
    record.write_text(tmp_path / name / "recipe.yaml", load.to_yaml(recipe))
    return PlannedRun(id=name, variant="swiglu", recipe=recipe), tmp_path / name


def children(pid):
    """Processes whose parent that is."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(true, seconds=200.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@contextmanager
def training(tmp_path, processes):
    """A run without end, well begun: its future, its worker, its process."""
    endless, there = planned(tmp_path, "endless", max_steps=ENDLESS)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(processes, endless, there)
        wait_until((there / "metrics.csv").is_file)
        (worker,) = processes._workers
        (child,) = children(worker._process.pid)
        yield future, worker, child


@pytest.fixture
def processes():
    processes = Processes()
    yield processes
    processes.stop()


def test_one_worker_trains_run_after_run_and_one_that_fails_is_told(tmp_path, processes):
    first, there = planned(tmp_path, "first")
    processes(first, there)
    bad, where = planned(tmp_path, "bad", accelerator="none")
    with pytest.raises(RunFailed, match=r"none.*\(see .*bad/stderr\.txt\)"):
        processes(bad, where)
    again, elsewhere = planned(tmp_path, "again")
    processes(again, elsewhere)
    assert len(processes._workers) == 1
    alone = timeless(train(first.recipe, tmp_path / "alone", variant="swiglu"))
    for run in (first, again):
        done = timeless(record.read_result(tmp_path / run.id))
        assert {**done, "id": None} == {**alone, "id": None}


def test_a_run_that_is_killed_is_told_and_its_worker_goes_on(tmp_path, processes):
    with training(tmp_path, processes) as (future, worker, child):
        (tmp_path / "endless" / "stderr.txt").write_text("a warning of old\n")
        os.kill(child, signal.SIGKILL)
        with pytest.raises(RunFailed, match=r"it was killed, .*; its last line: a warning of old"):
            future.result()
    processes(*planned(tmp_path, "next"))
    assert processes._workers == [worker]


def test_a_run_that_left_no_word_is_told_by_its_status(tmp_path, processes):
    run, there = planned(tmp_path, "run")
    with pytest.raises(RunFailed, match=r"^it ended with status 1$"):
        processes(run, there / "nowhere")
    assert len(processes._workers) == 1


def test_an_idle_worker_that_ended_is_replaced(tmp_path, processes):
    processes.start()
    (worker,) = processes._workers
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait()
    processes(*planned(tmp_path, "run"))
    assert worker not in processes._workers
    assert len(processes._workers) == 1


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout, so no commit")
def test_runs_say_the_commit_that_their_worker_imported(tmp_path, processes, monkeypatch):
    git = tmp_path / "bin" / "git"
    record.write_text(git, f"#!/bin/sh\ncat {tmp_path}/head\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "head").write_text("first")
    processes.start()
    (tmp_path / "head").write_text("second")
    processes(*planned(tmp_path, "run"))
    assert record.load_json(tmp_path / "run" / "result.json")["commit"] == "first"


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_no_run_outlives_its_worker(tmp_path, processes, end):
    with training(tmp_path, processes) as (future, worker, child):
        if end == "stop":
            processes.stop()
        else:
            os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(RunFailed, match="its worker ended"):
            future.result()
    wait_until(lambda: not Path(f"/proc/{child}").exists())
    assert processes._workers == []
