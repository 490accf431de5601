"""The report: what it reads, how it judges, and that its page needs nothing from outside."""

import base64
import csv
import hashlib
import io
import json
import re
from copy import deepcopy
from html.parser import HTMLParser
from math import inf, isfinite, nan

import plotly.graph_objects as go
import pytest
import report_data

from recipes.report.export import results_csv
from recipes.report.page import render, write_report
from recipes.report.records import read_results
from recipes.report.study import study


@pytest.fixture(scope="module")
def results():
    return report_data.comparison()


@pytest.fixture(scope="module")
def page(results):
    return render(results)


class Page(HTMLParser):
    """Tags with their attributes, scripts and styles whole, and the text that a reader sees."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        attributes = self.tags[-1][1] if self.tags else {}
        if self.cdata_elem == "script":
            self.scripts.append((attributes, data))
        elif self.cdata_elem == "style":
            self.styles.append(data)
        else:
            self.text += data


def figures_of(html: str) -> dict[str, dict]:
    """What the page's script draws, by the id of its data."""
    found = {str(a["id"]): json.loads(s) for a, s in Page(html).scripts if a.get("id")}
    assert found
    return found


def sections_of(html: str) -> list[str | None]:
    return [a["id"] for tag, a in Page(html).tags if tag == "section"]


def test_the_page_asks_for_nothing_from_outside(page):
    parsed = Page(page)
    assert not {tag for tag, _ in parsed.tags} & {
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
    }
    for tag, attributes in parsed.tags:
        assert "src" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag
        href = attributes.get("href", "#")
        assert href is not None
        assert href.startswith(("#", "data:text/csv;base64,")), href
    assert parsed.styles
    assert not re.search(r"url\(|@import|@font-face", "".join(parsed.styles))
    (own,) = (text for a, text in parsed.scripts if "use strict" in text[:40] and not a)
    assert not re.search(r"https?:|fetch\(|XMLHttp|import\(", own)


def test_the_policy_forbids_requests_and_lets_only_our_scripts_run(page):
    parsed = Page(page)
    (policy,) = (a["content"] for _, a in parsed.tags if "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    code = [text for attributes, text in parsed.scripts if not attributes.get("type")]
    assert len(code) == 2  # plotly, once, and ours
    for text in code:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_every_run_and_section_is_on_the_page(results, page):
    text = Page(page).text
    for run in results["runs"]:
        assert run["id"] in text
    assert sections_of(page) == [
        "results",
        "loss-curves",
        "quality-against-cost",
        "precision-gap",
        "expert-load",
        "domains",
        "samples",
        "cost-by-role",
        "recipes-and-machines",
    ]
    linked = {a["href"] for tag, a in Page(page).tags if tag == "a"}
    assert {f"#{name}" for name in sections_of(page)} <= linked


def test_every_figure_is_one_that_plotly_accepts(page):
    n_traces = 0
    for figure in figures_of(page).values():
        for view in figure.get("views", [figure]):
            made = go.Figure(data=view["data"], layout=view["layout"])  # raises on a wrong name
            n_traces += len(made.to_dict()["data"])
    assert n_traces > 50


def test_plotted_numbers_are_those_of_the_results(results, page):
    figures = figures_of(page)
    curve = next(t for t in figures["data-curves"]["data"] if t["name"] == "moe-nvfp4-s0")
    run = next(r for r in results["runs"] if r["id"] == "moe-nvfp4-s0")
    held_out = [p["eval_bpb"] for p in run["curve"] if p["eval_bpb"] is not None]
    assert [row[4] for row in curve["customdata"] if row[4] is not None] == held_out
    points = figures["data-frontier"]["views"][0]["data"]
    point = next(t for t in points if t["name"] == "moe · nvfp4")
    assert (point["x"], point["y"]) == (
        [run["cost"]["flops_per_token"]],
        [run["final"]["bpb"]],
    )


def test_the_table_keeps_raw_values(results, page):
    values = {a["data-value"] for tag, a in Page(page).tags if tag == "td" and "data-value" in a}
    for run in results["runs"]:
        assert repr(run["final"]["bpb"]) in values
        assert repr(run["speed"]["tokens_per_s"]) in values


def test_the_same_results_give_the_same_page(results, page):
    assert render(deepcopy(results)) == page


def test_the_report_is_written_whole(results, tmp_path):
    path = write_report(results, tmp_path / "new")
    assert path == tmp_path / "new" / "report.html"
    (tmp_path / "results.json").write_text(json.dumps(results))
    named = write_report(tmp_path, tmp_path / "my.html")
    assert named.read_text() == path.read_text() == render(tmp_path / "results.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my.html", "new", "results.json"]


NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\x00\x1b'\"\ud800"


def test_no_text_of_the_results_becomes_markup(results, page):
    changed = deepcopy(results)
    for run in changed["runs"]:
        run["id"] += NASTY
        run["variant"] += NASTY
        run["precision"] += NASTY
        run["commit"] = NASTY
        run["recipe"]["data"] = {"corpus": NASTY, NASTY: NASTY}
        run["sample"] = {"prompt": NASTY, "text": NASTY}
        run["final"]["bpb_by_domain"] = {NASTY: 2.0}
        for layer in run["load"]:
            layer["experts"] = [name + NASTY for name in layer["experts"]]
            layer["counts_by_domain"] = {NASTY: layer["counts"]}
    comparison = changed["comparison"]
    comparison["name"] = NASTY
    comparison["baseline"] = {"variant": f"swiglu{NASTY}", "precision": f"bf16{NASTY}"}
    html = render(changed)
    html.encode()
    before, after = Page(page), Page(html)
    assert {tag for tag, _ in after.tags} == {tag for tag, _ in before.tags}
    assert not [1 for _, a in after.tags if "onerror" in a or "src" in a]
    assert len([1 for a, _ in after.scripts if not a]) == 2
    assert after.text.count("<script>alert(1)</script>") > 20  # seen as the text it is
    assert "\x00" not in html
    for figure in figures_of(html).values():
        for view in figure.get("views", [figure]):
            drawn = [{**trace, "meta": None} for trace in view["data"]]  # meta is only compared
            assert "<img" not in json.dumps([drawn, view["layout"]])


@pytest.mark.parametrize(
    ("without", "section"),
    [
        (lambda r: r.update(curve=[]), "loss-curves"),
        (lambda r: r.update(load=[]), "expert-load"),
        (lambda r: r.pop("sample"), "samples"),
        (lambda r: r["final"].pop("bpb_by_domain"), "domains"),
        (lambda r: r["cost"].update(flops_by_role={}, params_by_role={}), "cost-by-role"),
        (lambda r: (r.update(recipe={}, versions={}, machine={}), r.pop("commit")),
         "recipes-and-machines"),
        (lambda r: r["cost"].pop("weight_bytes_per_token"), None),
        (lambda r: r["speed"].update(peak_memory_bytes=None), None),
    ],
)  # fmt: skip
def test_what_was_not_recorded_is_left_out(results, page, without, section):
    changed = deepcopy(results)
    for run in changed["runs"]:
        without(run)
    expected = [s for s in sections_of(page) if s != section]
    assert sections_of(render(changed)) == expected


def test_one_precision_has_no_gap_and_one_group_no_frontier():
    one = report_data.comparison(precisions=("bf16",))
    assert "precision-gap" not in sections_of(render(one))
    alone = report_data.comparison(variants=("moe",), precisions=("bf16",), baseline_seeds=1)
    assert "quality-against-cost" not in sections_of(render(alone))


def test_a_diverged_run_is_called_so_and_never_wins(results):
    changed = deepcopy(results)
    run = next(r for r in changed["runs"] if r["id"] == "moe-bf16-s0")
    run["final"]["bpb"] = nan
    run["curve"][-1].update(train_bpb=inf, eval_bpb=nan)
    html = render(changed)
    assert "diverged" in Page(html).text
    verdict = study(read_results(changed)).verdicts["moe", "bf16"]
    assert verdict.word == "not resolved"
    for run in changed["runs"]:
        run["final"]["bpb"] = nan
    assert "quality-against-cost" not in sections_of(render(changed))


def test_one_baseline_seed_is_said_on_the_page():
    html = render(report_data.comparison(baseline_seeds=1))
    text = Page(html).text
    assert "No difference is resolved: the baseline has one seed" in text
    chips = re.findall(r'class="chip ([a-z-]+)"', html)
    assert set(chips) == {"not-resolved", "baseline"}


def test_the_page_carries_its_numbers_as_csv(results, page):
    links = {a["download"]: a["href"] for _, a in Page(page).tags if "download" in a}
    files = {
        name: base64.b64decode((href or "").split(",")[1]).decode() for name, href in links.items()
    }
    assert files["results.csv"] == results_csv(results)
    rows = list(csv.DictReader(io.StringIO(files["verdicts.csv"])))
    s = study(read_results(results))
    assert len(rows) == len(s.verdicts) + len(s.gaps)
    assert {row["verdict"] for row in rows} <= {"better", "worse", "not resolved"}
    assert all(float(row["low_95"]) < float(row["high_95"]) for row in rows)


def test_many_runs_fold_instead_of_filling_the_page():
    variants = ("swiglu", *(f"{v}_{i}" for i in range(3) for v in ("moe", "mlp")))
    html = render(report_data.comparison(variants=variants, precisions=("bf16", "mxfp4", "nvfp4")))
    assert html.count("The other precisions") >= 2
    text = Page(html).text
    for v in variants:
        assert f"{v}-nvfp4-s0" in text
    points = figures_of(html)["data-frontier"]["views"][0]["data"][1:]
    labelled = [t for t in points if t["text"][0].strip("\u00a0")]
    assert 0 < len(labelled) < len(points) == 21
    assert all(isfinite(t["y"][0]) for t in points)
