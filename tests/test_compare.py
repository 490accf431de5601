"""Comparisons: equal budgets, refusals, and numbers that survive being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from recipe_toys import TINY, refused, timeless

from recipes import load
from recipes.compare import compare
from recipes.comparison import Comparison, read_comparison
from recipes.planning import plan
from recipes.report.records import read_results
from recipes.train import train

DENSE = {"name": "swiglu", "d_ff": 96}
ASKED = {
    "name": "toy",
    "recipe": TINY,
    "variants": [
        DENSE,
        {"name": "mlp"},
        {"name": "moe", "n_experts": 4, "top_k": 2},
    ],
    "seeds": [0],
    "extra_seeds": [1],
    "baseline": {"variant": "swiglu", "precision": "bf16"},
    "multiple_of": 16,
}


def asked(**changes):
    return load.merge(Comparison, {**ASKED, **changes}, (), what="comparison")


def test_the_shipped_comparisons_can_be_planned():
    settled = plan(*read_comparison("quick"))
    assert len(settled.runs) == 11
    assert {run.recipe.data.corpus for run in settled.runs} == {"classics7"}
    assert max(abs(match.residual) for match in settled.matched) <= 0.02


@pytest.mark.parametrize("hold", ["active_flops", "params", "active_params", "weight_bytes"])
def test_widths_are_solved_to_the_budget(hold):
    settled = plan(asked(hold=hold, multiple_of=1, tolerance=0.01))
    by_name = {match.variant: match for match in settled.matched}
    assert by_name["swiglu"].residual == 0
    assert by_name["swiglu"].width == 96
    assert all(abs(match.residual) < 0.01 for match in settled.matched)
    recipes = {run.variant: run.recipe for run in settled.runs}
    assert recipes["mlp"].model.ffn["d_ff"] == by_name["mlp"].width
    assert recipes["moe"].model.ffn["d_expert"] == by_name["moe"].width
    assert by_name["mlp"].width == 144  # 3 x 96 / 2: two matrices in place of three


def test_runs_and_their_order():
    settled = plan(asked(precisions=["bf16", "nvfp4"], seeds=[0, 5]))
    ids = [run.id for run in settled.runs]
    assert ids[:3] == ["swiglu-bf16-s0", "swiglu-nvfp4-s0", "mlp-bf16-s0"]
    assert ids[-1] == "swiglu-bf16-s1"
    assert len(set(ids)) == len(ids) == 2 * 3 * 2 + 1


def test_overrides_reach_comparison_or_recipe(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(ASKED))
    said = ["trainer.max_steps=3", "seeds=[4]", "out=elsewhere", "extra_seeds=[]"]
    settled = plan(*read_comparison(path, said))
    assert {run.recipe.trainer.max_steps for run in settled.runs} == {3}
    assert {run.recipe.seed for run in settled.runs} == {4}
    assert settled.out == Path("elsewhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": []}, "variants is empty"),
        ({"variants": [{"name": "swigl"}]}, "unknown variant of the baseline 'swiglu'"),
        ({"variants": [{"name": "swiglu"}, {"name": "moo"}]}, "unknown FFN variant 'moo'"),
        ({"variants": [{"name": "swiglu"}, {"name": "swiglu"}]}, "two variants are labelled"),
        ({"variants": [{"d_ff": 3}]}, "needs either `name` or `ffn`"),
        ({"variants": [{"name": "swiglu"}, {"name": "mlp", "d_fff": 3}]}, "unknown option of mlp"),
        ({"variants": [DENSE, {"name": "mlp", "d_ff": 999}]}, "from the baseline's"),
        ({"multiple_of": 4096}, "no width comes within 2.0%"),
        ({"precisions": ["fp32"]}, "unknown precision of the baseline 'bf16'"),
        ({"precisions": ["bf16", "fp3"]}, "unknown precision 'fp3'"),
        ({"recipe": "debog"}, "Did you mean 'debug'"),
        ({"recipe": {**TINY, "optimm": {}}}, "unknown recipe key 'optimm'. Did you mean 'optim'?"),
        ({"name": "a/b"}, "usable as a folder's"),
        (
            {"variants": [DENSE, {"name": "mlp", "recipe": {"optim": {"lr": 0.1}}}]},
            "differ in optim.lr",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(changes, message):
    with refused(message):
        plan(asked(**changes))


def test_allowed_keys_may_differ():
    variants = [{"name": "swiglu", "d_ff": 96}, {"name": "mlp", "recipe": {"optim": {"lr": 0.1}}}]
    settled = plan(asked(variants=variants, allow=["optim.lr"]))
    assert {run.variant: run.recipe.optim.lr for run in settled.runs} == {
        "swiglu": 0.01,
        "mlp": 0.1,
    }


def small(out, **changes):
    """Two runs of four steps."""
    trainer = {**TINY["trainer"], "max_steps": 4, "checkpoint_every_steps": 1}  # pyright: ignore
    variants = [DENSE]
    recipe = {**TINY, "trainer": trainer}
    return {**ASKED, "recipe": recipe, "variants": variants, "out": str(out), **changes}


def in_process(path):
    command = [sys.executable, "-m", "recipes.cli", "compare", str(path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def alive(directory):
    """Processes that train into a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            errors = (process / "fd" / "2").readlink()
        except OSError:
            continue
        if errors.is_relative_to(directory):
            found.append(int(process.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_and_started_again_ends_alike(tmp_path):
    cut = tmp_path / "cut"
    settled = plan(load.merge(Comparison, small(cut), (), what="comparison"))
    whole = [train(r.recipe, tmp_path / r.id, variant=r.variant) for r in settled.runs]
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(small(cut)))
    first, second = (cut / "runs" / f"swiglu-bf16-s{seed}" for seed in (0, 1))

    with in_process(path) as process:
        wait_for(second / "checkpoints" / "last.ckpt", process)
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not alive(cut))  # the run dies with the comparison
    assert not (cut / "results.json").exists()
    finished = (first / "result.json").stat().st_mtime_ns

    compare(settled)
    assert (first / "result.json").stat().st_mtime_ns == finished  # not run twice
    runs = json.loads((cut / "results.json").read_text())["runs"]
    assert [timeless(run) for run in runs] == [timeless(run) for run in whole]
    checked = read_results(cut)
    assert checked.comparison
    assert checked.comparison.noise
    assert checked.comparison.noise.n == 2
    assert (cut / "report.html").stat().st_size > 100_000
    assert len((cut / "results.csv").read_text().splitlines()) == 3

    other = load.merge(Comparison, small(cut, seeds=[7]), (), what="comparison")
    with pytest.raises(ValueError, match=r"holds another comparison \(differs in seeds\)"):
        compare(plan(other))


def wait_until(true, seconds=400.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def wait_for(path, process):
    wait_until(lambda: path.exists() or process.poll() is not None)
    assert path.exists(), process.stderr.read()


def test_a_failing_run_is_named_in_one_line(tmp_path):
    trainer = {**TINY["trainer"], "max_steps": 4, "accelerator": "none"}  # pyright: ignore
    recipe = {**TINY, "trainer": trainer}
    settled = plan(load.merge(Comparison, small(tmp_path, recipe=recipe), (), what="comparison"))
    with refused("no run of the baseline has a result: swiglu-bf16-s0 failed: "):
        compare(settled)
    assert not (tmp_path / "results.json").exists()


def test_two_at_once_in_one_directory_are_refused(tmp_path):
    from recipes.record import locked

    settled = plan(load.merge(Comparison, small(tmp_path), (), what="comparison"))
    with locked(tmp_path / ".lock", "busy"), pytest.raises(ValueError, match="in use by another"):
        compare(settled)
