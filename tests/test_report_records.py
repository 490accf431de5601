"""What the report reads and refuses, and what it writes beside the page."""

import csv
import io
import json
import re
import sys
from copy import deepcopy
from math import inf
from pathlib import Path

import pytest
import report_data

from recipes.report.export import results_csv
from recipes.report.figures import MAX_POINTS, thinned
from recipes.report.frontier import pareto
from recipes.report.page import render, write_report
from recipes.report.records import Point, read_results
from recipes.report.runs import read_runs
from recipes.report.static import write_figures
from recipes.report.text import bpb, el, join, seconds, si, signed


@pytest.fixture(scope="module")
def results():
    return report_data.comparison()


def spoilt(results, path, value):
    """A copy with the entry at `path` replaced, or dropped where value is None."""
    changed = deepcopy(results)
    *way, last = path
    inner = changed
    for step in way:
        inner = inner[step]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 2, "results: schema must be 1, got 2"),
        (("runs",), [], "runs is empty"),
        (("runs",), {"a": 1}, r"results.runs: expected a list, got \{'a': 1\}"),
        (("runs", 3, "final", "bpb"), None, r"runs\[3\].final: key 'bpb' is missing"),
        (("runs", 3, "final", "bpb"), "2.4", r"runs\[3\].final.bpb: expected a number, got '2.4'"),
        (("runs", 0, "seed"), 0.5, r"runs\[0\].seed: expected a whole number, got 0.5"),
        (("runs", 0, "steps"), True, "expected a whole number, got True"),
        (("runs", 0, "presicion"), "bf16", "unknown key 'presicion'. Did you mean 'precision'"),
        (("runs", 0, "sample"), "text\nmore", "sample: expected an object, got 'text"),
        (("runs", 1, "id"), "swiglu-bf16-s0", "are the same: 'swiglu-bf16-s0'"),
        (("runs", 1, "precision"), "bf16", r"are the same: \('swiglu', 'bf16', 0\)"),
        (("runs", 4, "load", 1, "counts"), [1, 2], r"load\[1\]: counts has 2 numbers for 8 exp"),
        (("runs", 4, "load", 0, "n_ffn_experts"), 9, r"n_ffn_experts must be in \[0, 8\], got 9"),
        (("comparison", "held_equal"), "flop", "unknown held_equal 'flop'. Did you mean 'flops'"),
        (("comparison", "baseline", "variant"), "x", "no run of the baseline 'x' in 'bf16'"),
    ],
)
def test_malformed_results_give_one_line(results, path, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        render(spoilt(results, path, value))
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_hold_no_results_give_one_line(tmp_path):
    bad = tmp_path / "results.json"
    for content in (b'{"schema": 1,\n', b"\xff\xfe", b"[]", b"null"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(bad))) as caught:
            write_report(tmp_path, tmp_path / "out.html")
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="cannot be read"):
        write_report(tmp_path / "none.json", tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def write_run(directory: Path, run: dict) -> Path:
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps(run))
    return directory


def test_runs_from_several_directories(results, tmp_path):
    runs = [r for r in results["runs"] if r["variant"] == "moe"]
    dirs = [write_run(tmp_path / r["id"], r) for r in runs]
    found = read_runs(dirs)
    assert (found["runs"], found["comparison"]) == (runs, None)
    assert "laid side by side" in render(found)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "results.json").write_text(json.dumps(results))
    assert read_runs([tmp_path / "whole"]) == results
    both = read_runs([tmp_path / "whole", dirs[0]])
    assert len(both["runs"]) == len(results["runs"]) + 1
    assert f"moe-bf16-s0 ({dirs[0].name})" in {r["id"] for r in both["runs"]}
    read_results(both)  # the twin is told apart, so it reads


def test_a_directory_without_a_run_is_named(results, tmp_path):
    with pytest.raises(ValueError, match=r"no result\.json or results\.json"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="at least one"):
        read_runs([])
    broken = write_run(tmp_path / "broken", {**results["runs"][0], "steps": "many"})
    with pytest.raises(ValueError, match=r"broken/result.json.steps: expected a whole number"):
        read_runs([broken])


def test_csv_has_a_row_per_run_that_reads_back_to_the_digit(results):
    rows = list(csv.DictReader(io.StringIO(results_csv(results))))
    assert [row["id"] for row in rows] == [run["id"] for run in results["runs"]]
    for row, run in zip(rows, results["runs"], strict=True):
        assert float(row["bpb"]) == run["final"]["bpb"]
        assert int(row["tokens"]) == run["tokens"]
        assert float(row["bpb_verse"]) == run["final"]["bpb_by_domain"]["verse"]
        assert (
            float(row["weight_bytes_per_token_256"])
            == (run["cost"]["weight_bytes_per_token"]["256"])
        )
        assert (row["load_entropy"] == "") == (not run["load"])


def test_figures_for_papers(results, tmp_path):
    pytest.importorskip("matplotlib")
    written = write_figures(results, tmp_path / "figures", formats=("svg",))
    names = [path.name for path in written]
    assert names[:3] == ["loss.svg", "gap.svg", "load.svg"]
    assert len(names) == 6
    for path in written:
        assert path.read_text().lstrip().startswith("<?xml")
    assert "moe_plus_plus · nvfp4" in written[0].read_text()
    dense = report_data.comparison(variants=("swiglu", "mlp"), precisions=("bf16",))
    few = write_figures(dense, tmp_path / "few", formats=("png",))
    assert {"load.png", "gap.png"}.isdisjoint(path.name for path in few)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in few)


def test_figures_say_what_they_lack(results, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown figure format 'pgn'\. Did you mean 'png'"):
        write_figures(results, tmp_path, formats=("pgn",))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"moe-zoo\[figures\]"):
        write_figures(results, tmp_path)


def test_pareto():
    xs, ys = [1.0, 2.0, 3.0, 2.5], [5.0, 4.0, 4.5, 3.0]
    assert pareto(xs, ys, more_is_better=False) == [(1.0, 5.0), (2.0, 4.0), (2.5, 3.0)]
    assert pareto(xs, ys, more_is_better=True) == [(3.0, 4.5), (2.5, 3.0)]


def test_long_curves_are_thinned_but_keep_every_evaluation():
    points = [
        Point(step=i, tokens=i, flops=i, train_s=i, eval_bpb=2.0 if i % 997 == 0 else None)
        for i in range(10_000)
    ]
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS + 12
    assert [p for p in points if p.eval_bpb] == [p for p in kept if p.eval_bpb]
    assert kept[-1] is points[-1]
    assert thinned(points[:50]) == points[:50]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (si(819_200), "819 k"),
        (si(1_580_000, "FLOP"), "1.58 MFLOP"),
        (si(999_600), "1.00 M"),
        (si(0), "0"),
        (si(12), "12"),
        (si(0.25, "B"), "0.25 B"),
        (seconds(41.25), "41.2 s"),
        (seconds(200), "3 min 20 s"),
        (seconds(7500), "2 h 05 min"),
        (signed(-0.0724, 3), "\u22120.072"),
        (signed(-0.0001, 3), "0.000"),
        (bpb(inf, 3), "diverged"),
    ],
)
def test_numbers_read_well(shown, expected):
    assert shown == expected


def test_markup_escapes_all_but_markup():
    inner = el("b", "<i>", data_x='"')
    assert inner == '<b data-x="&quot;">&lt;i&gt;</b>'
    assert el("p", inner, None, 3, hidden=True, title=None) == f"<p hidden>{inner}3</p>"
    assert join("a&b", inner) == f"a&amp;b{inner}"
