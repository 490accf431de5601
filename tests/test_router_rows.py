"""What a run tells of its routers: rows of its curve, result.json and the report."""

import json
import re
from dataclasses import asdict

import plotly.graph_objects as go
import pytest
import report_data
import torch
from recipe_toys import evaluate_briefly, killed_after, rows, timeless, tiny_recipe

from recipes.record import read_result
from recipes.report.layer_records import LayerHealth
from recipes.report.page import render
from recipes.report.records import Run
from recipes.report.strict import read_as
from recipes.router_rows import HEALTH_KEYS, LOAD_KEYS, SETTLED_KEYS, assignments, router_keys
from recipes.task import build_model
from recipes.train import train

SMALL = ("data.batch_size=2", "data.eval_bytes_per_domain=1024")
MOE = {"name": "moe", "n_experts": 4, "d_expert": 32}


def test_dropped_assignments_are_summed_over_layers():
    stats = [
        {"counts": torch.tensor([3, 4]), "dropped": torch.tensor(1)}, {},
        {"counts": torch.tensor([2, 2]), "dropped": torch.tensor(4)},
    ]  # fmt: skip
    found = assignments(stats)
    assert {k: v.item() for k, v in found.items()} == {"dropped": 5, "assigned": 16}
    assert assignments([{}, {}]) == {}


def test_a_run_tells_of_its_routers(tmp_path, monkeypatch):
    evaluate_briefly(monkeypatch)
    ffn = [MOE, {"name": "moe_plus_plus", "n_experts": 4, "capacity_factor": 0.5}]
    recipe = tiny_recipe(ffn, *SMALL)
    result = train(recipe, tmp_path)
    keys = router_keys(build_model(recipe))
    assert keys == [
        *(f"load/{key}" for key in LOAD_KEYS),
        *(f"router/{key}" for key in (*HEALTH_KEYS, *SETTLED_KEYS)),
    ]
    head = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {*keys, "load/dropped"} <= set(head)
    first, second = (p["router"] for p in result["curve"] if p["eval_bpb"] is not None)
    assert first.keys() == {*keys, "load/dropped"} - {"router/kept", "router/jaccard"}
    assert second.keys() == {*keys, "load/dropped"}
    assert 0 < second["router/kept"] <= 1
    assert second["router/jaccard"] <= second["router/kept"]
    assert 0.1 < second["load/dropped"] < 0.5
    between = next(p["router"] for p in result["curve"] if p["eval_bpb"] is None)
    assert between.keys() == {"load/dropped"}
    bounded = {*keys, "load/dropped"} - {"load/dead", "router/logit_rms", "load/max_violation"}
    assert all(0 <= second[key] <= 1 for key in bounded)
    assert read_result(tmp_path) == result
    layers = [read_as(LayerHealth, layer, "health") for layer in result["health"]]
    assert [layer.layer for layer in layers] == [0, 1]
    assert [json.loads(json.dumps(asdict(layer))) for layer in layers] == result["health"]
    mean = sum(layer.confidence for layer in layers) / 2
    assert second["router/confidence"] == pytest.approx(mean)  # the last row is of the end


def test_an_older_result_still_reads():
    run = read_as(Run, report_data.run("moe", "bf16", 0), "run")
    assert run.health == ()
    assert run.curve[0].router == {}
    assert run.load[0].max_violation > 0


def test_a_resumed_run_compares_with_the_evaluation_before_it_was_cut(tmp_path, monkeypatch):
    evaluate_briefly(monkeypatch)
    recipe = tiny_recipe(MOE, "trainer.eval_every_steps=2", *SMALL)
    whole = train(recipe, tmp_path / "whole")
    with killed_after(monkeypatch, 4):
        train(recipe, tmp_path / "cut")
    found = train(recipe, tmp_path / "cut")
    assert timeless(found) == timeless(whole)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    (after,) = (p["router"] for p in found["curve"] if p["step"] == 6)
    assert 0 < after["router/kept"] <= 1


def test_unchanged_weights_keep_every_choice(tmp_path, monkeypatch):
    evaluate_briefly(monkeypatch)
    recipe = tiny_recipe(MOE, "optim.lr=1e-30", "optim.weight_decay=0.0", *SMALL)
    result = train(recipe, tmp_path)
    last = result["curve"][-1]["router"]
    assert (last["router/kept"], last["router/jaccard"]) == (1.0, 1.0)


# Report


def figure_of(page, key):
    found = re.search(rf'id="data-{key}">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_report_has_a_section_where_routers_were_watched():
    results = report_data.comparison(variants=("swiglu", "moe", "moe_plus_plus"))
    assert 'id="router-health"' not in render(results)
    page = render(report_data.with_health(results))
    assert page.index('id="expert-load"') < page.index('id="router-health"')
    watched_runs = [r for r in results["runs"] if r["load"]]
    lines = {v["label"]: v["data"] for v in figure_of(page, "health-lines")["views"]}
    assert list(lines) == ["Max violation", "Choices kept", "Confidence", "Dropped"]
    assert [t["name"] for t in lines["Choices kept"]] == [r["id"] for r in watched_runs]
    assert len(lines["Choices kept"][0]["x"]) == 8  # evaluations
    for trace in lines["Dropped"]:
        go.Scatter(trace)


def test_the_map_of_pairs_is_shares_over_chance():
    results = report_data.with_health(report_data.comparison(variants=("swiglu", "moe")))
    views = figure_of(render(results), "health-pairs")["views"]
    moe = [r for r in results["runs"] if r["variant"] == "moe"]
    assert [(v["run"], v["layer"]) for v in views] == [
        (f"moe · {r['precision']}", f"layer {i}") for r in moe for i in range(4)
    ]
    (heat,) = views[1]["data"]
    go.Heatmap({k: v for k, v in heat.items() if k != "meta"})
    pairs = moe[0]["health"][1]["pairs"]
    assert heat["z"][2][5] == pytest.approx(pairs[2][5] / pairs[2][2] * 7, abs=1e-3)
    assert heat["z"][3][3] is None


def test_a_router_of_single_choices_has_no_map_of_pairs():
    results = report_data.with_health(report_data.comparison(variants=("swiglu", "moe")))
    for run in results["runs"]:
        for layer in run.get("health", ()):
            layer["experts_per_token"], layer["near_ties"] = 1.0, None
    page = render(results)
    assert 'id="router-health"' in page
    assert "health-pairs" not in page
