"""The pictures of a study's report: what is planted stands where it should, and nothing else."""

import re
from math import log

import numpy as np
import pytest
from study_report_data import MadeUpStudy
from test_report import Page, figures_of

from recipes.report.records import RunCost
from recipes.study.gather import gather
from recipes.study.records import ControlRecord, Machine, ModelRecord
from recipes.study.report.binds import what_binds
from recipes.study.report.controls import KINDS, beside_controls, controls
from recipes.study.report.derive import Derived
from recipes.study.report.forest import MOST_ROWS, Row, forest
from recipes.study.report.isoflop import best_sizes, isoflops, size_ticks, valleys
from recipes.study.report.page import parts_of, render, write_study_report
from recipes.study.report.roofline import decode_bound, training_bound


class Controlled(MadeUpStudy):
    """Every kind of control."""

    def labels(self):
        return {
            f"{v}:{kind}": ControlRecord(kind=kind, of=v) for kind in KINDS
            for v in self.variants[1:]
        }  # fmt: skip


VARIANTS = ("swiglu", "moe", "moe_b")
GAINS = {"moe": 0.02, "moe:dense_total": 0.05, "moe_b:dense_total": 0.01, "moe_b:off": 0.02}


def derived(directory, kind=Controlled, **planted):
    return Derived(gather(kind(**planted).write(directory)))


def circles(markup):
    """Of each row: where its point is, in percent, and whether it is filled; None: no point."""
    rows = markup.split('class="forest-row"')[1:]
    found = [re.search(r'<circle cx="([\d.]+)%" cy="50%" r="5.5" fill="([^"]+)"', r) for r in rows]
    return [m and (float(m[1]), m[2] != "var(--surface)") for m in found]


def test_controls_stand_by_variant_and_ceilings_apart_on_one_scale(tmp_path):
    d = derived(tmp_path, variants=VARIANTS, gains=GAINS, sizes=("s", "m"), noise=1e-4)
    beaten, ceilings = beside_controls(d)
    assert [(r.variant, r.to) for r in beaten] == [
        (v, KINDS[kind][0]) for v in ("moe", "moe_b") for kind in ("random_router", "off")
    ]
    assert [r.variant for r in ceilings] == ["moe", "moe_b"]
    assert [r.so for r in (*beaten, *ceilings)] == [
        "beats it", "beats it", "does not beat it", "loses to it",
        "below its ceiling", "below its ceiling",
    ]  # fmt: skip
    picture, _, table = controls(d).partition("Every size")
    found = [
        d.against_controls[f"{v}:{kind}", "m"]
        for kinds in (("random_router", "off"), ("dense_total",))
        for v in ("moe", "moe_b")
        for kind in kinds
    ]
    reach = 1.05 * max(abs(x.value) + x.half for x in found)
    assert circles(picture) == [
        (pytest.approx(50 + 50 * x.value / reach, abs=0.006), x.resolved) for x in found
    ]
    assert picture.index("What must be beaten") < picture.index("Ceilings to approach")
    assert table.count("<tr>") == 1 + 3 * 2 * 2


def test_a_control_that_diverged_has_no_point_and_says_so(tmp_path):
    d = derived(tmp_path, sizes=("s",), diverge=("s-moe:off-bf16-lr0.002-s1",))
    random, off = circles(controls(d).partition("Ceilings")[0])
    assert random is not None
    assert off is None
    assert "a run diverged" in controls(d)


def test_controls_are_drawn_at_the_largest_complete_size_alone(tmp_path):
    d = derived(tmp_path, missing=("xl-moe-bf16-lr0.002-s1",))
    assert d.top == "l"
    assert "What must be beaten: size l, equal active FLOPs per token" in controls(d)
    assert {r.found.value for r in beside_controls(d)[0]} == {
        d.against_controls[f"moe:{kind}", "l"].value for kind in ("random_router", "off")
    }
    none = derived(tmp_path / "none", missing=(":",))
    assert "No control has a result" in controls(none)


def test_rows_beyond_the_most_are_folded_not_lost(tmp_path):
    d = derived(tmp_path, sizes=("s",))
    row = Row("moe", d.table["moe", "s", "active_flops"])
    markup = forest(d, [row] * (MOST_ROWS + 3), "zero")
    shown, _, folded = markup.partition("3 more rows")
    assert (shown.count("<circle"), folded.count("<circle")) == (MOST_ROWS, 3)
    assert forest(d, [], "zero") is None


def test_a_roofline_by_hand():
    cost = RunCost(
        params=1000, active_params=1000, nonembedding_params=1000, flops_per_token=2000.0,
        training_flops_per_token=6000.0, weight_bytes_per_token={"1": 2000.0},
    )  # fmt: skip
    model = ModelRecord(
        size="s", variant="v", active_strict=0, active_with_head=0, weight_bytes=4000,
        gradient_bytes=4000, optimizer_bytes=8000, tokens_per_step=100, traced_as=2000.0,
    )  # fmt: skip
    machine = Machine(name="m", threads=1, flops_per_s=1e6, bytes_per_s=1e5)
    one, step = decode_bound(cost, machine), training_bound(cost, model, machine)
    assert (one.compute_s, one.memory_s, one.binds) == (0.002, 0.02, "memory bandwidth")
    assert one.ratio == pytest.approx(10)
    assert (one.intensity, one.attainable) == (1.0, pytest.approx(1e5))
    assert step.compute_s == pytest.approx(0.006)
    assert step.memory_s == pytest.approx((2 * 4000 + 2 * 4000 + 2 * 12000) / 100 / 1e5)
    assert step.binds == "compute"
    assert (step.intensity, step.attainable) == (pytest.approx(15), pytest.approx(1e6))


def test_every_variant_stands_on_the_roof_and_its_runs_below_it(tmp_path):
    d = derived(tmp_path, variants=VARIANTS, sizes=("s", "m"))
    (view,) = figures_of(what_binds(d))["data-study-roofline"]["views"]
    roof, _, *points = view["data"]
    machine = d.results.machine
    assert roof["x"][1] == machine.flops_per_s / machine.bytes_per_s
    assert roof["y"] == [roof["x"][0] * machine.bytes_per_s, *[machine.flops_per_s] * 2]
    assert [p["name"] for p in points] == list(VARIANTS)  # controls are in the table only
    for p in points:
        run = d.arm(p["name"], "m").runs[0]
        decode, step = run.cost.flops_per_token, run.cost.training_flops_per_token
        assert p["marker"]["symbol"] == ["circle", "square", "x"]
        assert p["x"][0] == decode / run.cost.weight_bytes_per_token["1"]
        assert p["x"][1] == p["x"][2] == step / ((2 + 2) * 4e6 + 2 * (8e6 + 4e6)) * 4096
        for x, y in zip(p["x"][:2], p["y"][:2], strict=True):
            assert y == pytest.approx(min(machine.flops_per_s, x * machine.bytes_per_s))
        assert p["y"][2] == pytest.approx(d.arm(p["name"], "m").tokens_per_s * step)


def test_what_runs_reached_is_told_of_their_own_machine_only(tmp_path):
    directory = Controlled(sizes=("s",)).write(tmp_path)
    machine = directory / "machine.json"
    machine.write_text(machine.read_text().replace("a made-up CPU", "another"))
    (view,) = figures_of(what_binds(Derived(gather(directory))))["data-study-roofline"]["views"]
    assert all(p["marker"]["symbol"] == ["circle", "square"] for p in view["data"][2:])


class SharedBudgets(MadeUpStudy):
    """Sizes at budgets a, b, ...; the best has 1e6, 2e6, ... parameters."""

    best_params = 1e6

    def compute(self, size):
        return 1e7 * 4 ** "abc".index(size[0]), 1e6

    def result(self, run):
        budget, i = "abc".index(run.size[0]), int(run.size[1])
        plain = super().result(run)
        params = 5e5 * 2 ** (i + budget)
        off = log(params / (self.best_params * 2**budget))
        plain["cost"]["params"] = int(params)
        plain["final"]["bpb"] *= 1 + 0.05 * off**2
        return plain


TWO_BUDGETS = ("a0", "a1", "a2", "b0", "b1", "b2")


def budgets(directory, sizes=TWO_BUDGETS, kind=SharedBudgets, **planted):
    return derived(directory, kind, sizes=sizes, controls=False, noise=1e-4, **planted)


def test_sizes_that_share_budgets_have_a_best_size_each(tmp_path):
    d = budgets(tmp_path)
    found = valleys(d, "active_flops")
    assert [(v.variant, v.compute) for v in found] == [
        (v, c) for v in ("swiglu", "moe") for c in (1e13, 4e13)
    ]
    for fit in isoflops(d, found)[0].values():
        assert [b.size for b in fit.budgets] == pytest.approx([1e6, 2e6], rel=0.02)
        assert fit.exponent == pytest.approx(0.5, abs=0.02)
    views = figures_of(best_sizes(d))["data-study-isoflop"]["views"]
    assert [v["label"] for v in views] == ["All variants", "swiglu", "moe"]
    for view, variants in zip(views, (2, 1, 1), strict=True):
        kinds = [trace["mode"] for trace in view["data"]]
        assert kinds.count("lines") == variants + 2 * variants  # along the minima; parabolas
        ways = view["data"][:variants]
        assert all(way["x"] == pytest.approx([1e6, 2e6], rel=0.02) for way in ways)
    points, parabola, star = views[1]["data"][1:4]
    assert points["x"] == [5e5, 1e6, 2e6]
    means = [d.arm("swiglu", size).bpb for size in TWO_BUDGETS[:3]]
    assert points["y"] == pytest.approx(means)
    through = np.interp(np.log(points["x"]), np.log(parabola["x"]), parabola["y"])
    assert through == pytest.approx(means, rel=1e-3)  # three points lie on their parabola
    assert star["y"][0] == pytest.approx(min(parabola["y"]), rel=1e-4)
    assert size_ticks(found) == pytest.approx([5e5, 1e6, 2e6, 4e6])
    parts = parts_of(d.results, draws=50)
    assert parts.ladders[0].why.startswith("sizes of the baseline share budgets")
    assert "Best size per budget" in Page(render(parts)).text


def test_one_budget_has_a_picture_and_no_law(tmp_path):
    html = best_sizes(budgets(tmp_path, sizes=("a0", "a1", "a2", "b0", "b1")))
    views = figures_of(html)["data-study-isoflop"]["views"]
    stars = [t for t in views[0]["data"] if t.get("marker", {}).get("symbol") == "star"]
    assert [t["x"][0] for t in stars] == pytest.approx([1e6, 1e6], rel=0.02)
    assert "N*" not in Page(html).text


def test_sizes_of_a_ladder_have_no_such_picture(tmp_path):
    assert best_sizes(derived(tmp_path, MadeUpStudy, controls=False)) is None
    assert best_sizes(budgets(tmp_path / "two", sizes=("a0", "a1", "b0", "b1"))) is None


class Small(SharedBudgets):
    best_params = 2e5


def test_a_minimum_outside_the_sizes_tried_is_not_drawn_but_told(tmp_path):
    html = best_sizes(budgets(tmp_path, kind=Small))
    for view in figures_of(html)["data-study-isoflop"]["views"]:
        assert "star" not in [t.get("marker", {}).get("symbol") for t in view["data"]]
    assert Page(html).text.count("below the sizes tried") == 4


def test_the_same_pictures_for_papers(tmp_path):
    pytest.importorskip("matplotlib")
    Controlled(sizes=("s", "m")).write(tmp_path)
    written = {p.name for p in write_study_report(tmp_path, tmp_path / "figures", draws=50)}
    assert {"controls.pdf", "controls.svg", "roofline.pdf", "roofline.svg"} <= written
    assert "isoflop.svg" not in written
    svg = (tmp_path / "figures" / "controls.svg").read_text()
    ceiling = svg.index("moe: dense, as large in all (")
    assert svg.index("moe: random router (") < svg.index("moe: special part off (") < ceiling
    SharedBudgets(sizes=TWO_BUDGETS, controls=False).write(tmp_path / "iso")
    write_study_report(tmp_path / "iso", tmp_path / "iso_figures", draws=50)
    assert "10.0 TFLOP" in (tmp_path / "iso_figures" / "isoflop.svg").read_text()


def test_the_pictures_of_three_hundred_runs_weigh_little(tmp_path):
    variants = ("swiglu", *(f"moe_{i}" for i in range(2, 9)))
    d = derived(tmp_path, variants=variants, sizes=("s", "m", "l"), steps=50)
    assert len(d.plan.runs) >= 300
    shown = [controls(d).partition("Every size")[0], what_binds(d).partition("<table")[0]]
    assert sum(map(len, shown)) < 50_000
