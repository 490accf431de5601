"""The report of a study: what was planted is found, what went wrong is named."""

import csv
import json
import time

import pytest
from recipe_toys import refused
from study_report_data import LRS, MadeUpStudy
from study_toys import MadeUp, small
from test_report import Page, figures_of, sections_of
from typer.testing import CliRunner

from recipes.statistics.power import power_of
from recipes.study.cli import app
from recipes.study.gather import POINTS, gather, largest_complete, study_directory
from recipes.study.records import read_plan, read_study_results
from recipes.study.report.page import comparison_at, parts_of, render, write_study_report
from recipes.study.run import run_study

DRAWS = 200
OWN = [
    "verdict-rule", "learning-rates", "ladder", "time-to-target", "controls", "costs-and-limits",
    "failures",
]  # fmt: skip


def made(directory, **planted):
    """What the report derives from a made-up study."""
    return parts_of(gather(MadeUpStudy(**planted).write(directory)), draws=DRAWS)


def words(parts, variant="moe", hold="active_flops"):
    return [parts.d.table[variant, size, hold].word for size in parts.d.plan.sizes]


def test_one_percent_is_found_at_every_size(tmp_path):
    parts = made(tmp_path, gains={"moe": 0.01})
    assert words(parts) == ["better"] * 4
    worse = made(tmp_path / "worse", gains={"moe": -0.01})
    assert words(worse) == ["worse"] * 4
    for size in parts.d.plan.sizes:
        d = parts.d.table["moe", size, "active_flops"]
        assert d.value == pytest.approx(-0.01 * parts.d.base(size).bpb, rel=0.15)
        assert d.how == "paired over 3 seeds"


@pytest.mark.parametrize(
    ("noise", "allowed"), [(2e-4, {"equivalent"}), (8e-3, {"not resolved"})], ids=str
)
def test_no_difference_is_never_better(tmp_path, noise, allowed):
    parts = made(tmp_path, noise=noise)
    assert set(words(parts)[1:]) <= allowed
    assert not any(ruling.better for ruling in parts.rulings)


def test_what_is_the_same_in_two_matchings_counts_once_in_the_correction(tmp_path):
    one = made(tmp_path / "1", gains={"moe": 0.003}, controls=False)
    two = made(tmp_path / "2", gains={"moe": 0.003}, controls=False,
               holds=("active_flops", "params"))  # fmt: skip
    for size in one.d.plan.sizes:
        p = one.d.table["moe", size, "active_flops"].p_holm
        assert two.d.table["moe", size, "params"].p_holm == p


def test_a_leverage_of_two_is_recovered_and_the_rule_spelt_out(tmp_path):
    parts = made(tmp_path, leverage={"moe": 2.0}, noise=2e-4, holds=("active_flops", "params"))
    found = parts.ladders[0].leverages["moe"]
    assert found.value == pytest.approx(2.0, rel=0.04)
    assert found.interval.low > 1.8
    assert found.interval.high < 2.2
    time_ = parts.seconds.leverages["moe"]  # twice the seconds eat it up
    assert time_.value == pytest.approx(1.0, rel=0.04)
    (ruling,) = parts.rulings
    assert [c.letter for c in ruling.conditions] == ["a", "b", "c", "d"]
    assert ruling.better
    page = Page(render(parts)).text
    assert "better by the rule" in page
    assert "the lower bound of the compute leverage is above 1" in page


def test_three_sizes_are_not_fitted_and_the_rule_cannot_be_told(tmp_path):
    parts = made(tmp_path, gains={"moe": 0.01}, sizes=("s", "m", "l"), controls=False)
    assert parts.ladders[0].fit is None
    (ruling,) = parts.rulings
    assert [c.holds for c in ruling.conditions] == [True, None, None, None]
    assert ruling.words == "not better by the rule: (b, c, d) cannot be told"
    assert "the baseline has 3 budgets and a fit needs 4" in Page(render(parts)).text


def test_a_failing_and_a_diverging_run_are_named_and_judge_nothing(tmp_path):
    parts = made(
        tmp_path, gains={"moe": 0.01}, fail=("xl-moe-bf16-lr0.002-s2",),
        diverge=("m-moe-bf16-lr0.002-s1", "s-moe-bf16-lr0.004-s100"),
    )  # fmt: skip
    assert words(parts)[1] == "not resolved"
    assert parts.d.table["moe", "m", "active_flops"].how == "a run diverged"
    page = Page(render(parts)).text
    for told in ("Failed: 1", "out of memory", "Diverged: 2", "m-moe-bf16-lr0.002-s1"):
        assert told in page
    states = {r["id"]: r for r in rows(write_study_report(tmp_path, draws=DRAWS)[1])}
    assert states["xl-moe-bf16-lr0.002-s2"]["state"] == "failed"
    assert states["m-moe-bf16-lr0.002-s1"]["state"] == "diverged"
    assert states["m-moe-bf16-lr0.002-s1"]["bpb"] == "nan"


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("planted", "place", "beyond"),
    [({"best": 4e-3}, "at the upper edge of the grid", "0.008"),
     ({"best": 1e-3}, "at the lower edge of the grid", "0.0005"),
     ({"diverge": ("lr0.004-s100",)}, "beside a rate that diverged", "0.00283")],
)  # fmt: skip
def test_an_optimum_at_an_edge_is_called_none(tmp_path, planted, place, beyond):
    parts = made(tmp_path, sizes=("s",), seeds=(0, 1), controls=False, **planted)
    assert [s.edge for s in parts.sweeps] == [True, True]
    page = Page(render(parts)).text
    assert "2 of 2 optima are none" in page
    assert place in page
    assert beyond in page


def test_an_interior_optimum_is_where_it_was_planted(tmp_path):
    parts = made(tmp_path, sizes=("s",), seeds=(0, 1), noise=1e-6, controls=False)
    for sweep in parts.sweeps:
        assert sweep.best.lr == pytest.approx(2e-3, rel=0.01)
        assert sweep.best.interior
        assert sweep.sensitivity == pytest.approx(0.04 / 3 * sweep.best.loss, rel=0.01)
    assert "optima are none" not in render(parts)


def test_an_unfinished_study_has_a_report(tmp_path):
    parts = made(tmp_path, missing=("xl-", "l-moe-bf16-lr0.002-s1"))
    assert parts.d.top == "m"  # the largest that is complete
    assert len(parts.d.missing) == 4 * 3 + 1
    html = render(parts)
    assert "Not run yet" in html
    assert "m--results" in sections_of(html)
    empty = made(tmp_path / "empty", missing=("lr",), controls=False)
    assert empty.d.top is None
    assert "Nothing is reported yet" in render(empty)
    tuning = made(tmp_path / "tuning", missing=("-s0", "-s1", "-s2"))
    assert tuning.d.table == {}
    assert "learning-rates" in sections_of(render(tuning))


def test_controls_are_judged_beside_their_variant(tmp_path):
    parts = made(tmp_path, gains={"moe": 0.02, "moe:dense_total": 0.03})
    found = {label: d.word for (label, size), d in parts.d.against_controls.items() if size == "l"}
    assert found == {"moe:dense_total": "worse", "moe:random_router": "better"}
    page = Page(render(parts)).text
    assert "below its ceiling" in page
    assert "beats it" in page


def test_precision_gaps_are_a_map_with_intervals(tmp_path):
    parts = made(tmp_path, precisions=("bf16", "nvfp4"), sizes=("s", "m"), controls=False)
    assert set(parts.d.gaps) == {
        (v, "nvfp4", size) for v in ("swiglu", "moe") for size in ("s", "m")
    }
    html = render(parts)
    assert "precision-over-sizes" in sections_of(html)
    gap = parts.d.gaps["moe", "nvfp4", "s"]
    share = gap.value / parts.d.arm("moe", "s").bpb
    assert share == pytest.approx(0.01, abs=0.003)
    assert f"+{100 * share:.2f} ± " in Page(html).text


def test_the_page_of_a_hundred_runs_is_small_and_whole(tmp_path, capsys):
    planted = MadeUpStudy(variants=("swiglu", "moe", "moe_b"), steps=600)
    directory = planted.write(tmp_path)
    n = len(read_plan(directory).runs)
    assert n >= 100
    started = time.process_time()
    results = gather(directory)
    gathered = time.process_time()
    read_study_results(directory)
    read = time.process_time()
    written = write_study_report(directory, draws=DRAWS)
    done = time.process_time()
    size = written[0].stat().st_size
    record = (directory / "results.json").stat().st_size
    with capsys.disabled():
        print(f"\n{n} runs, CPU: gathered in {gathered - started:.2f} s, record read in "
              f"{read - gathered:.2f} s, report in {done - read:.2f} s; page {size / 1e6:.2f} MB, "
              f"record {record / 1e6:.2f} MB")  # fmt: skip
    assert size < 12e6  # plotly's script is 5 MB of it
    assert [path.name for path in written] == [
        "report.html", "runs.csv", "differences.csv", "results.tex", "verdicts.md",
    ]  # fmt: skip
    html = written[0].read_text()
    ids = sections_of(html)
    assert ids[: len(OWN)] == OWN
    assert len(set(ids)) == len(ids)
    assert {"data-study-rates", "data-study-ladder", "data-study-residuals"} <= set(
        figures_of(html)
    )
    light = [r.run for r in results.runs if not r.run.id.startswith("xl-")]
    assert all(len(run.curve) < 2 * POINTS + 80 and not run.load for run in light)


def test_the_tables_carry_every_difference(tmp_path):
    planted = {"precisions": ("bf16", "nvfp4"), "sizes": ("s", "m_1")}
    MadeUpStudy(gains={"moe": 0.01}, **planted).write(tmp_path)
    _, _, differences, tex, _ = write_study_report(tmp_path, draws=DRAWS)
    tables = [row["table"] for row in rows(differences)]
    assert {t: tables.count(t) for t in tables} == {"baseline": 2, "control": 4, "precision": 4}
    text = tex.read_text()
    assert text.count(r"\\") == 3
    assert r"m\_1" in text
    assert r"^{\star}$" in text
    assert all(line in text for line in (r"\toprule", r"\midrule", r"\bottomrule"))


def test_figures_for_papers_as_pdf_and_svg(tmp_path):
    pytest.importorskip("matplotlib")
    MadeUpStudy(controls=False, precisions=("bf16", "nvfp4"), sizes=("s", "m")).write(tmp_path)
    names = [p.name for p in write_study_report(tmp_path, tmp_path / "figures", draws=DRAWS)[5:]]
    stems = [
        "verdicts", "rates_s_bf16", "ladder_active_flops", "roofline", "precision_s", "precision_m",
    ]  # fmt: skip
    assert names == [f"{stem}.{ending}" for stem in stems for ending in ("pdf", "svg")]
    for name in names:
        start = (tmp_path / "figures" / name).read_bytes()[:5]
        assert start == (b"%PDF-" if name.endswith("pdf") else b"<?xml")


def test_the_record_reads_back_and_serves_the_same_page(tmp_path):
    directory = MadeUpStudy(diverge=("s-moe-bf16-lr0.004",)).write(tmp_path)
    results = gather(directory)
    plain = json.loads((directory / "results.json").read_text())
    assert plain["whole"] == "xl"
    again = read_study_results(directory)
    assert render(parts_of(again, draws=DRAWS)) == render(parts_of(results, draws=DRAWS))
    comparison = comparison_at(parts_of(again, draws=DRAWS).d)
    assert {run.id[:2] for run in comparison.runs} == {"xl"}


def test_runs_that_are_no_part_are_told(tmp_path):
    directory = MadeUpStudy(sizes=("s",), controls=False).write(tmp_path)
    other = directory / "runs" / "s-old-bf16-s0"
    other.mkdir()
    run = json.loads((directory / "runs" / "s-moe-bf16-lr0.002-s0" / "result.json").read_text())
    (other / "result.json").write_text(json.dumps(run))
    assert gather(directory).strays == ("s-old-bf16-s0",)


def test_the_largest_complete_size(tmp_path):
    plan = read_plan(MadeUpStudy(sizes=("s", "m", "l"), controls=False).write(tmp_path))
    ids = {run.id for run in plan.runs}
    assert largest_complete(plan, ids) == "l"
    assert largest_complete(plan, ids - {"l-moe-bf16-lr0.002-s1"}) == "m"
    none_whole = {i for i in ids if not i.endswith("-s1")}
    assert largest_complete(plan, none_whole) == "l"
    assert largest_complete(plan, set()) is None


class Rising(MadeUpStudy):
    """A baseline that more compute makes worse, which no curve can say anything of."""

    def result(self, run):
        plain = super().result(run)
        if run.variant == "swiglu":
            plain["final"]["bpb"] = 4.0 + 0.5 * self.sizes.index(run.size) + 0.001 * run.seed
        return plain


def test_a_curve_that_cannot_be_read_is_told_and_breaks_nothing(tmp_path):
    parts = parts_of(gather(Rising(controls=False).write(tmp_path)), draws=DRAWS)
    (ladder,) = parts.ladders
    assert ladder.leverages == {}
    assert "gave a number" in ladder.refused["moe"]
    assert "No leverage of moe: none of 200 resamples gave a number" in Page(render(parts)).text
    (ruling,) = parts.rulings
    assert ruling.conditions[1].holds is None


def test_a_diverged_size_is_left_out_of_the_ladder_by_name(tmp_path):
    sizes = ("xs", "s", "m", "l", "xl")
    parts = made(tmp_path, sizes=sizes, controls=False, diverge=("m-moe-bf16-lr0.002-s1",))
    assert parts.ladders[0].left_out == (("moe", "m"),)
    assert len(parts.ladders[0].arms["moe"]) == 4
    assert "A run diverged, so left out: moe at m." in Page(render(parts)).text


def test_the_command(tmp_path):
    MadeUpStudy(controls=False, sizes=("s",)).write(tmp_path)
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert done.output.split() == [
        "report:", str(tmp_path / "report.html"), "written:", str(tmp_path / "runs.csv"),
        "written:", str(tmp_path / "differences.csv"), "written:", str(tmp_path / "results.tex"),
        "written:", str(tmp_path / "verdicts.md"),
    ]  # fmt: skip


def test_power_is_a_number_far_out_in_the_tail():
    assert power_of(1.0, 0.05, 3, alpha=0.05 / 8) == pytest.approx(1.0)


def test_a_study_that_was_run_writes_its_plan_and_is_traced(tmp_path):
    found = small(tmp_path, lrs=list(LRS), seeds=[0, 1], controls=["random_router"])
    run_study(found, workers=1, train=MadeUp(fail=["moe-bf16-lr0.004-s100"]))
    results = gather(study_directory(str(tmp_path)))
    plan = results.plan
    assert [run.stage for run in plan.runs].count("tuning") == 3 * 3
    assert list(results.failures) == ["moe-bf16-lr0.004-s100", "base-moe-bf16"]
    assert set(plan.controls) == {"moe:random-router"}
    assert results.traces.keys() == plan.models.keys()
    for key, traced in results.traces.items():  # every token takes as many experts
        assert traced.flops_per_token == plan.models[key].traced_as, key
    swiglu = plan.models["base/swiglu"]
    assert swiglu.optimizer_bytes == 2 * swiglu.weight_bytes
    assert swiglu.active_with_head - swiglu.active_strict == 32 * 256
    assert results.machine.flops_per_s > 1e6
    write_study_report(tmp_path, draws=DRAWS)
    with refused("has no place"):
        study_directory(str(tmp_path), ["seeds=[0]"])
    with refused("no study was run there"):
        gather(tmp_path / "nowhere")
