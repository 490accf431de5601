"""What is published: a directory that a report is made from again, and README's tables."""

import importlib.util
import sys
from pathlib import Path

import pytest
from study_report_data import MadeUpStudy

from recipes.study.gather import gather
from recipes.study.report.markdown import verdicts
from recipes.study.report.page import parts_of, write_study_report

DRAWS = 20
ROOT = Path(__file__).resolve().parents[1]


def benchmark(name):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_published_makes_the_same_report_without_the_runs(tmp_path):
    ran = MadeUpStudy(gains={"moe": 0.01}, sizes=("s", "m")).write(tmp_path / "ran")
    (ran / "study.yaml").write_text("name: made up\n")
    out = tmp_path / "out"
    first = {p.name: p.read_bytes() for p in write_study_report(ran, to=out, draws=DRAWS)}
    assert {path.name for path in out.iterdir()} == set(first)
    assert set(first) >= {"report.html", "results.json", "study.yaml", "verdicts.md"}
    again = {p.name: p.read_bytes() for p in write_study_report(out, draws=DRAWS)}
    for name, content in again.items():
        assert content == first[name], name


def test_the_table_says_every_verdict_and_control(tmp_path):
    planted = {"gains": {"moe": 0.01}, "sizes": ("s", "m"), "noise": 2e-4}
    parts = parts_of(gather(MadeUpStudy(**planted).write(tmp_path)), draws=DRAWS)
    text = verdicts(parts.d)
    lines = text.splitlines()
    heads = next(line for line in lines if line.startswith("| variant | s"))
    row = next(line for line in lines if line.startswith("| `moe` |"))
    assert len(heads.split("|")) == len(row.split("|"))
    assert row.count("better") == 2
    assert "\u22121.0" in row or "\u22120.9" in row, "a gain of one percent"
    for label, control in parts.d.controls.items():
        assert any(f"`{control.of}`" in line for line in lines), label


@pytest.mark.parametrize("name", ["study_small", "claims"])
def test_readme_says_what_is_published(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    text = (ROOT / "README.md").read_text()
    assert benchmark("readme").with_block(text, name, benchmark(name).table()) == text
