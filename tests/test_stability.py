"""The stability protocol: sharpness, divergence and spikes, learning rates, its report."""

from copy import deepcopy
from itertools import product
from math import inf, isnan, log, nan
from random import Random
from statistics import fmean, stdev

import pytest
import report_data
import stability_data
import torch
import torch.nn.functional as F
from recipe_toys import TINY, refused, tiny_recipe
from torch.testing import assert_close

from recipes import compare as comparing
from recipes import load, planned, record, show
from recipes.batches import Batch
from recipes.comparison import Comparison, read_comparison
from recipes.planning import plan
from recipes.report.page import render
from recipes.report.records import read_results
from recipes.report.runs import read_runs
from recipes.report.study import study
from recipes.report.trials import tally, trials_of
from recipes.sharpness import Sharpness, last_tokens, loss_and_rise, sharpness, worst_logits
from recipes.stability import WINDOW, diverged_at, spikes
from recipes.train import train

# Sharpness


def drawn(n, v, scale=3.0):
    return scale * torch.randn(n, v, dtype=torch.float64), torch.randint(v, (n,))


@pytest.mark.parametrize("eps", [5e-4, 1e-3, 0.3])
def test_the_closed_form_is_the_best_corner_and_no_inner_point_beats_it(eps):
    logits, targets = drawn(7, 6)
    corners = torch.tensor(list(product((-1.0, 1.0), repeat=6)), dtype=torch.float64)  # [64, 6]
    inside = torch.rand(500, 6, dtype=torch.float64) * 2 - 1
    reach = eps * (logits.abs() + 1)
    for z, tight in ((corners, True), (inside, False)):
        moved = logits[:, None] + z * reach[:, None]  # [7, Z, 6]
        losses = F.cross_entropy(
            moved.flatten(0, 1), targets.repeat_interleave(len(z)), reduction="none"
        ).view(7, -1)
        rise = losses.amax(1) - F.cross_entropy(logits, targets, reduction="none")
        _, closed = loss_and_rise(logits, targets, eps)
        if tight:
            assert_close(closed, rise)
        else:
            assert (rise < closed).all()


def test_projected_gradient_ascent_climbs_to_the_closed_form():
    logits, targets = drawn(5, 40)
    eps = 1e-2
    reach = eps * (logits.abs() + 1)
    z = ((torch.rand_like(logits) * 2 - 1) * reach).requires_grad_()
    for _ in range(60):
        loss = F.cross_entropy(logits + z, targets)
        (slope,) = torch.autograd.grad(loss, z)
        with torch.no_grad():
            z += 0.1 * reach * slope.sign()
            z.copy_(z.clamp(-reach, reach))
    assert_close((logits + z).detach(), worst_logits(logits, targets, eps))
    base = F.cross_entropy(logits, targets)
    phi = 100 * (F.cross_entropy(logits + z, targets) - base) / (1 + base)
    assert sharpness(logits, targets, eps) == pytest.approx(phi.item(), rel=1e-12)


def test_sharpness_of_even_logits_by_hand():
    """All zero over V: wrong ones at +eps, the right one at -eps; L = ln V."""
    v, eps = 256, 1e-3
    by_hand = log((v - 1) * torch.tensor(eps).double().exp() + torch.tensor(-eps).double().exp())
    rise = by_hand + eps - log(v)
    got = sharpness(torch.zeros(3, v), torch.tensor([0, 5, 255]), eps)
    assert got == pytest.approx(100 * rise / (1 + log(v)), rel=1e-5)


def test_only_the_last_real_token_of_each_sequence_counts():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    targets = torch.randint(9, (3, 4))
    logits = torch.randn(3, 4, 9)
    batch = Batch(targets, targets, targets, mask, 0)
    rows, last = last_tokens(batch)
    assert (rows.tolist(), last.tolist()) == ([0, 1], [3, 1])
    metric = Sharpness(1e-2)
    for one in (2, 1, 0):  # batch by batch, one of padding alone first
        row = targets[one : one + 1]
        part = Batch(row, row, row, mask[one : one + 1], 0)
        metric.update(logits[one : one + 1], part)
        assert isnan(metric.value()) == (one == 2)
    assert metric.value() == pytest.approx(
        sharpness(logits[rows, last], targets[rows, last], 1e-2), rel=1e-12
    )
    whole = batch._replace(mask=None)
    assert last_tokens(whole)[1].tolist() == [3, 3, 3]


@pytest.mark.parametrize("eps", [0.0, -1e-3, nan])
def test_a_reach_that_is_none_is_refused(eps):
    with refused("sharpness_eps must be positive"):
        worst_logits(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), eps)
    with refused("trainer.sharpness_eps must be positive"):
        tiny_recipe("mlp", f"trainer.sharpness_eps={'.nan' if isnan(eps) else eps}")


# Curves

NOISE = 0.02


def falling(n=300, start=8.0, end=3.0, seed=0):
    rng = Random(seed)
    return [end + (start - end) * 2.718281828 ** (-i / 40) + rng.gauss(0, NOISE) for i in range(n)]


def test_calm_curves_neither_diverge_nor_spike():
    for seed in range(20):
        assert diverged_at(falling(seed=seed)) is None
        assert spikes(falling(seed=seed)) == ()
    flat = [8.0 + Random(i).gauss(0, NOISE) for i in range(300)]
    assert diverged_at(flat) is None  # never learned, never fell apart
    assert diverged_at([]) is None
    assert spikes([]) == spikes([8.0]) == ()
    assert spikes([2.0] * 99) == ()


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_loss_that_is_no_number_is_a_divergence_and_no_spike(bad):
    curve = falling()
    curve[120] = bad
    assert diverged_at(curve) == 120
    assert spikes(curve) == ()
    assert diverged_at([bad]) == 0


def test_a_loss_that_stays_above_its_start_diverged_even_if_it_comes_down():
    curve = falling()
    curve[100:160] = [9.0] * 60
    at = diverged_at(curve)
    assert at is not None
    assert 100 + WINDOW // 2 < at < 100 + WINDOW  # its mean needs most of a window
    assert (
        fmean(curve[at - WINDOW + 1 : at + 1]) > 1.02 * curve[0] >= fmean(curve[at - WINDOW : at])
    )
    assert spikes(curve)[0] == 100


def test_a_short_peak_is_a_spike_and_the_end_decides_alone():
    curve = falling()
    curve[100:110] = [9.0] * 10
    assert diverged_at(curve) is None
    assert spikes(curve) == (100,)
    curve[-1] = 9.0
    assert diverged_at(curve) == len(curve) - 1
    assert spikes(curve) == (100, 299)


def test_spikes_are_told_by_the_window_before():
    curve = falling()
    before = curve[200 - WINDOW : 200]
    mean, sd = fmean(before), stdev(before) * ((WINDOW - 1) / WINDOW) ** 0.5
    for height, found in ((4.99, ()), (5.01, (200,))):
        curve[200] = mean + height * sd
        assert spikes(curve) == found
    curve[200:203] = [3.0 + 1.0] * 3
    curve[205] = 4.0  # its own: the loss was back between them, and the first is not in the window
    assert spikes(curve) == (200, 205)


def test_a_new_level_is_one_spike():
    curve = falling()
    curve[150:] = [loss + 2 for loss in curve[150:]]
    assert spikes(curve) == (150,)
    curve[260] += 1
    assert spikes(curve) == (150, 260)


def test_windows_that_cannot_be_are_refused():
    with refused("window must be 2 or more"):
        spikes([1.0], window=1)
    with refused("window must be positive"):
        diverged_at([1.0], window=0)


# Learning rates

ASKED = {
    "name": "toy",
    "recipe": {k: v for k, v in TINY.items() if k != "optim"} | {"optim": {"clip_norm": None}},
    "variants": [{"name": "swiglu", "d_ff": 96}],
    "lrs": [1e-2, 4e-2],
    "baseline": {"variant": "swiglu", "precision": "bf16"},
}


def asked(**changes):
    return load.merge(Comparison, {**ASKED, **changes}, (), what="comparison")


def test_every_precision_runs_at_every_rate_with_every_seed():
    settled = plan(asked(precisions=["bf16", "nvfp4"], seeds=[0, 5], lrs=[1e-2, 4e-2, 0.5]))
    ids = [run.id for run in settled.runs]
    assert len(set(ids)) == 2 * 2 * 3
    assert ids[:3] == [
        "swiglu-bf16-lr0.01-s0", "swiglu-nvfp4-lr0.01-s0", "swiglu-bf16-lr0.04-s0",
    ]  # fmt: skip
    by_id = {run.id: run.recipe for run in settled.runs}
    recipe = by_id["swiglu-nvfp4-lr0.5-s5"]
    assert (recipe.precision, recipe.optim.lr, recipe.seed) == ("nvfp4", 0.5, 5)


def test_further_seeds_of_the_baseline_run_at_its_rate():
    base = {**ASKED["baseline"], "lr": 4e-2}
    settled = plan(asked(extra_seeds=[1, 2], baseline=base))
    assert [run.id for run in settled.runs][2:] == [
        "swiglu-bf16-lr0.04-s1",
        "swiglu-bf16-lr0.04-s2",
    ]


def test_without_rates_nothing_changes():
    settled = plan(asked(lrs=[]))
    assert [run.id for run in settled.runs] == ["swiglu-bf16-s0"]
    assert "lrs" not in settled.resolved
    assert settled.resolved["baseline"] == ASKED["baseline"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lrs": [1e-2, -1.0]}, "lrs[1] must be positive, got -1.0"),
        ({"baseline": {**ASKED["baseline"], "lr": 3.0}}, "baseline.lr must be one of lrs="),
        ({"lrs": [], "baseline": {**ASKED["baseline"], "lr": 3.0}}, "baseline.lr must be left out"),
        ({"extra_seeds": [1]}, "extra_seeds need baseline.lr"),
        (
            {"variants": [{"name": "swiglu", "d_ff": 96, "recipe": {"optim": {"lr": 0.1}}}]},
            "swiglu must leave optim.lr to lrs=",
        ),
    ],
)
def test_rates_that_cannot_be_are_refused(changes, message):
    with refused(message):
        plan(asked(**changes))
    with refused("the overrides must leave optim.lr to lrs="):
        plan(asked(), {"optim": {"lr": 1e-3}})


def test_a_policy_written_out_can_be_the_baseline():
    policy = {"name": "mine", "default": "bf16"}
    base = {"variant": "swiglu", "precision": "mine"}
    settled = plan(asked(precisions=[policy, "nvfp4"], baseline=base, extra_seeds=[3], lrs=[]))
    assert [run.id for run in settled.runs][-1] == "swiglu-mine-s3"


def test_the_shipped_grid_can_be_planned():
    settled = plan(*read_comparison("stability"))
    assert {run.recipe.trainer.log_every_steps for run in settled.runs} == {1}
    c = settled.comparison
    assert len(settled.runs) == len(c.precisions) * len(c.lrs) * len(c.seeds) >= 30


# Records and report


@pytest.fixture(scope="module")
def grid():
    return stability_data.grid()


def test_each_group_stands_at_its_best_rate_and_the_noise_is_of_one(grid):
    s = study(read_results(grid))
    assert {g.key[1]: (g.lr, len(g.runs)) for g in s.groups} == dict.fromkeys(
        stability_data.WIDTH, (4e-3, 3)
    )
    at = [r["final"]["bpb"] for r in grid["runs"] if r["precision"] == "bf16" and r["lr"] == 4e-3]
    assert s.noise
    assert s.noise.std == pytest.approx(stdev(at))


def test_a_rate_at_which_a_run_diverged_is_not_the_best_even_if_it_ended_low(grid):
    changed = deepcopy(grid)
    for run in changed["runs"]:
        if run["precision"] == "nvfp4" and run["lr"] == 4e-3:
            run["final"]["bpb"] = 1.0
            run["diverged"] = run["seed"] == 2
    by_key = {g.precision: g.lr for g in study(read_results(changed)).groups}
    assert by_key == {"bf16": 4e-3, "mxfp4": 4e-3, "nvfp4": 1e-3}


def test_the_rate_of_the_baseline_can_be_said(grid):
    changed = deepcopy(grid)
    changed["comparison"]["baseline"]["lr"] = 1e-3
    s = study(read_results(changed))
    assert (s.baseline.lr, len(s.baseline.runs)) == (1e-3, 3)
    assert s.verdicts["swiglu", "nvfp4"].word == "better"
    changed["comparison"]["baseline"]["lr"] = 7.0
    with refused("no run of the baseline at learning rate 7"):
        read_results(changed)


def test_counts_are_those_of_the_runs(grid):
    trials = trials_of(read_results(grid))
    assert [(t.precision, t.lr) for t in trials] == [
        (p, lr) for p in stability_data.WIDTH for lr in stability_data.LRS
    ]
    last = {t.precision: tally(t.runs) for t in trials if t.lr == stability_data.LRS[-1]}
    assert [last[p].diverged for p in stability_data.WIDTH] == [0, 3, 3]
    assert last["mxfp4"].sharpness == 2.0
    broken = next(t for t in trials if t.precision == "mxfp4" and t.lr == stability_data.LRS[-1])
    assert isnan(broken.bpb)


def test_the_section_is_there_where_it_has_something_to_tell(grid):
    html = render(grid)
    start = html.index('<section id="stability"')
    section = html[start : html.index("</section>", start)]
    assert section.count("<figure>") == len(stability_data.WIDTH)
    assert section.count('class="num lost"') == 6
    assert "Every step was logged" in section
    assert "MemoryError" in section
    assert "Of 4 learning rates each variant and precision stands here" in html
    assert '<section id="stability"' not in render(report_data.comparison())


def test_two_rates_of_one_cell_are_told_apart_side_by_side(tmp_path):
    for i, lr in enumerate(stability_data.LRS[:2]):
        record.write_json(tmp_path / str(i) / "result.json", stability_data.run("bf16", lr, 0))
    found = read_runs([tmp_path / "0", tmp_path / "1"])
    assert [run["variant"] for run in found["runs"]] == ["swiglu lr 0.001", "swiglu lr 0.004"]
    assert len(study(read_results(found)).groups) == 2


def test_a_grid_goes_on_over_what_diverges_or_fails(tmp_path, monkeypatch, capsys):
    lrs = [1e-2, 1e30]
    settled = plan(asked(lrs=lrs, precisions=["bf16", "fp32"], out=str(tmp_path)))
    monkeypatch.setattr(planned.Processes, "__call__", in_this_process)
    comparing.compare(settled)
    read = read_results(tmp_path)
    assert {run.id: run.diverged for run in read.runs} == {
        "swiglu-bf16-lr0.01-s0": False,
        "swiglu-bf16-lr1e+30-s0": True,
        "swiglu-fp32-lr1e+30-s0": True,
    }
    assert list(read.failures) == ["swiglu-fp32-lr0.01-s0"]
    assert [run.lr for run in read.runs] == [1e-2, 1e30, 1e30]
    capsys.readouterr()
    show.results(tmp_path / "results.json")
    told = capsys.readouterr().out
    assert "0 of 1" in told
    assert "1 of 1" in told
    assert "failed: swiglu-fp32-lr0.01-s0: out of memory" in told
    with refused("1 of 4 runs failed, the report leaves them out and the same command tries"):
        comparing.check_failures(settled)
    assert '<section id="stability"' in (tmp_path / "report.html").read_text()


def in_this_process(self, run, directory):
    """As the worker does it, but for one run."""
    if run.id == "swiglu-fp32-lr0.01-s0":
        raise planned.RunFailed("out of memory")
    train(run.recipe, directory, variant=run.variant, run_id=directory.name)


def test_a_run_keeps_its_sharpness_and_its_rate(tmp_path):
    result = train(tiny_recipe("mlp"), tmp_path)
    assert result["lr"] == 1e-2
    evaluated = [p["sharpness"] for p in result["curve"] if p["eval_bpb"] is not None]
    assert evaluated
    assert all(0 < phi < 10 for phi in [*evaluated, result["sharpness"]])
    assert all(p["sharpness"] is None for p in result["curve"] if p["eval_bpb"] is None)
    assert (result["diverged"], result["diverged_step"]) == (False, None)
