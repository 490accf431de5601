"""The section on probes: shown where runs have some, with their numbers, whatever they hold."""

import json
import re
from copy import deepcopy
from random import Random

import plotly.graph_objects as go
import pytest
import report_data

from layers.precision.operands import OPERANDS
from recipes.report.page import render
from recipes.report.probe_figures import MAX_LABELLED, MAX_STEPS
from recipes.report.records import read_results

ID = "what-the-formats-did-to-the-operands"
LEAVES = [f"blocks.{i}.ffn.{part}" for i in range(2) for part in ("gate_up", "down")]


def operand(leaf, name, rng, last, format="nvfp4"):
    exact = format == "fp32"
    return {
        "leaf": leaf,
        "operand": name,
        "format": format,
        "elements": 4096,
        "snr_db": None if exact else rng.uniform(15, 22),
        "clipped": rng.uniform(0, 0.04),
        "underflowed": rng.uniform(0, 0.3),
        "scales": {"-2": 1024, "0": 3072} if last else {},
    }


def probed(results, steps=(10, 20, 30), leaves=LEAVES, precisions=("nvfp4",), **options):
    """Runs of some precisions with probes; the same for the same arguments."""
    results, rng = deepcopy(results), Random(0)
    for run in results["runs"]:
        if run["precision"] in precisions:
            run["probes"] = [
                {
                    "step": step,
                    "operands": [
                        operand(leaf, name, rng, step == steps[-1], **options)
                        for leaf in leaves
                        for name in OPERANDS
                    ],
                }
                for step in steps
            ]
    return results


@pytest.fixture(scope="module")
def plain():
    return report_data.comparison(variants=("swiglu", "moe"), baseline_seeds=2)


@pytest.fixture(scope="module")
def results(plain):
    return probed(plain)


@pytest.fixture(scope="module")
def page(results):
    return render(results)


def section_of(html):
    found = re.search(rf'<section id="{ID}">(.*?)</section>', html, re.DOTALL)
    return None if found is None else found[1]


def figure_of(html, key):
    (found,) = re.findall(
        rf'<script type="application/json" id="data-{key}">(.*?)</script>', html, re.DOTALL
    )
    return json.loads(found)


KEYS = ("probes-heat", "probes-lines", "probes-scales")


def test_only_probed_runs_bring_the_section(plain, page):
    assert section_of(render(plain)) is None
    body = section_of(page)
    assert body is not None
    assert f'href="#{ID}"' in page
    runs = {v["run"] for v in figure_of(page, "probes-heat")["views"]}
    assert runs == {"swiglu · nvfp4", "moe · nvfp4"}
    for name in OPERANDS:
        assert name.replace("_", " ") in body


def test_runs_whose_leaves_only_cast_bring_none(plain):
    assert section_of(render(probed(plain, leaves=[]))) is None


def test_plotted_numbers_are_those_of_the_runs(results, page):
    run = next(r for r in results["runs"] if r["id"] == "moe-nvfp4-s0")
    last = run["probes"][-1]
    views = figure_of(page, "probes-heat")["views"]
    view = next(v for v in views if (v["run"], v["step"]) == ("moe · nvfp4", "30"))
    (heat,) = view["data"]
    assert (heat["y"], len(heat["x"])) == (LEAVES, 6)
    cells = {(r["leaf"], r["operand"]): r for r in last["operands"]}
    for leaf, row, told in zip(heat["y"], heat["z"], heat["customdata"], strict=True):
        for name, z, words in zip(OPERANDS, row, told, strict=True):
            assert z == round(cells[leaf, name]["snr_db"], 2)
            assert words[2] == f"{100 * cells[leaf, name]['underflowed']:.2f}\u00a0%"
    views = figure_of(page, "probes-lines")["views"]
    view = next(v for v in views if (v["run"], v["measure"]) == ("moe · nvfp4", "underflow"))
    line = next(t for t in view["data"] if t["name"] == "wgrad dy, worst leaf")
    worst = [
        max(r["underflowed"] for r in step["operands"] if r["operand"] == "wgrad_dy")
        for step in run["probes"]
    ]
    assert line["x"] == [10, 20, 30]
    assert line["y"] == [round(w, 6) for w in worst]
    view = next(v for v in figure_of(page, "probes-scales")["views"] if v["run"] == "moe · nvfp4")
    shares = dict(zip(view["data"][0]["x"], view["data"][0]["y"], strict=True))
    assert shares == {-3: 0, -2: 0.25, -1: 0, 0: 0.75, 1: 0}


def test_every_figure_is_one_that_plotly_accepts(page):
    for key in KEYS:
        for view in figure_of(page, key)["views"]:
            made = go.Figure(data=view["data"], layout=view["layout"])  # raises on a wrong name
            assert made.to_dict()["data"]


def test_menus_offer_what_the_views_hold(page):
    body = section_of(page)
    assert body is not None
    for key, menus in zip(KEYS, (("run", "step"), ("run", "measure"), ("run",)), strict=True):
        found = re.findall(rf'<select data-plot="{key}" data-of="(\w+)">(.*?)</select>', body)
        assert [of for of, _ in found] == list(menus)
        for of, options in found:
            values = dict.fromkeys(v[of] for v in figure_of(page, key)["views"])
            assert re.findall(r'<option value="(.*?)">', options) == list(values)


def test_one_run_and_step_need_no_menu(plain):
    one = report_data.comparison(variants=("moe",), precisions=("nvfp4",), baseline_seeds=1)
    body = section_of(render(probed(one, steps=(5,))))
    assert body is not None
    assert re.findall(r'<select data-plot="([\w-]+)"', body) == ["probes-lines"]


def test_operands_without_error_and_without_scales_are_drawn_empty(plain):
    results = probed(plain, format="fp32")
    for run in results["runs"]:
        for step in run.get("probes", ()):
            for row in step["operands"]:
                row["scales"] = {}
    html = render(results)
    heat = figure_of(html, "probes-heat")["views"][0]["data"][0]
    assert all(z is None for row in heat["z"] for z in row)
    for key in KEYS:
        for view in figure_of(html, key)["views"]:
            go.Figure(data=view["data"], layout=view["layout"])


def test_many_steps_and_leaves_stay_readable():
    plain = report_data.comparison(variants=("moe",), precisions=("nvfp4",), baseline_seeds=1)
    leaves = [f"blocks.{i}.ffn.down" for i in range(MAX_LABELLED + 1)]
    html = render(probed(plain, steps=range(1, 40), leaves=leaves))
    views = figure_of(html, "probes-heat")["views"]
    steps = [int(v["step"]) for v in views if v["run"] == "moe · nvfp4"]
    assert len(steps) == MAX_STEPS
    assert (steps[0], steps[-1]) == (39, 1)
    assert all("texttemplate" not in v["data"][0] for v in views)
    assert all(v["layout"]["height"] < 700 for v in views)


def test_no_name_becomes_markup(plain):
    nasty = "</script><script>alert(1)</script>"
    results = probed(plain, leaves=[nasty, *LEAVES])
    html = render(results)
    assert "<script>alert(1)" not in html
    heat = figure_of(html, "probes-heat")["views"][0]["data"][0]
    assert "<script" not in json.dumps(heat["y"])


def test_a_wrong_record_is_named(results):
    changed = deepcopy(results)
    run = next(r for r in changed["runs"] if "probes" in r)
    run["probes"][0]["operands"][0]["operand"] = "wgrad_y"
    with pytest.raises(ValueError, match=r"probes\[0\]\.operands\[0\].*Did you mean 'wgrad_"):
        read_results(changed)
