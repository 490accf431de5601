"""What a study must not say: of too few seeds, or of curves without an answer."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from study_report_data import MadeUpStudy
from test_report import Page
from test_study_pictures import SharedBudgets

from recipes.statistics.bootstrap import Interval
from recipes.study.gather import gather
from recipes.study.report.isoflop import best_sizes, isoflops, valleys
from recipes.study.report.page import parts_of, render
from recipes.study.report.rule import rulings

DRAWS = 200


def made(directory, kind=MadeUpStudy, **planted: Any):
    study = kind(**{"controls": False, **planted})
    return parts_of(gather(study.write(directory)), draws=DRAWS)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_one_or_two_seeds_of_a_variant_are_never_better(tmp_path, seeds):
    """However clear it is, and although the baseline's three measure the noise."""
    lost = tuple(f"moe-bf16-lr0.002-s{s}" for s in range(3) if s not in seeds)
    formats: Any = {"precisions": ("bf16", "nvfp4"), "sizes": ("s", "m")}
    parts = made(tmp_path, gains={"moe": 0.05}, fail=lost, controls=True, **formats)
    d = parts.d
    for size in d.plan.sizes:
        found = d.table["moe", size, "active_flops"]
        assert (found.word, found.p_holm) == ("not resolved", None)
        assert found.half is not None
        assert abs(found.value) > 3 * found.half
        assert f"{len(seeds)} seed{'s' * (len(seeds) > 1)} in common" in found.how
        assert d.against_controls["moe:dense_total", size].word == "not resolved"
        assert d.gaps["moe", "nvfp4", size].word == "not resolved"
        assert d.gaps["swiglu", "nvfp4", size].word == "worse"  # three seeds each
    (ruling,) = parts.rulings
    assert ruling.conditions[0].holds is None
    html = render(parts)
    assert f"{d.top}--results" in html  # the sections of one comparison say the same
    assert "by noise<" not in html


def test_three_seeds_each_but_others_are_not_compared(tmp_path):
    lost = [f"swiglu-bf16-lr0.002-s{s}" for s in (0, 1)]
    lost += [f"moe-bf16-lr0.002-s{s}" for s in (3, 4)]
    planted: Any = {"seeds": tuple(range(5)), "sizes": ("s",), "fail": tuple(lost)}
    parts = made(tmp_path, gains={"moe": 0.05}, **planted)
    arms = [parts.d.arm(v, "s") for v in ("swiglu", "moe")]
    assert [len(arm.runs) for arm in arms if arm] == [3, 3]
    found = parts.d.table["moe", "s", "active_flops"]
    assert found.word == "not resolved"
    assert found.how == "Welch's test: other seeds; 1 seed in common, and no claim below 3"


class Flat(MadeUpStudy):
    """A baseline that more compute makes no better but for noise."""

    def result(self, run):
        plain = super().result(run)
        if run.variant == "swiglu":
            slope, noise = 0.01 * self.sizes.index(run.size), Random(run.id).gauss(0, 0.03)
            plain["final"]["bpb"] = 30.0 + slope + noise
        return plain


def test_a_curve_that_does_not_fall_shows_no_leverage_above_one(tmp_path):
    parts = made(tmp_path, Flat)
    (ladder,) = parts.ladders
    assert ladder.leverages == {}
    assert ladder.refused["moe"] == "no budget brings the baseline's fitted curve to this loss"
    (ruling,) = parts.rulings
    assert ruling.conditions[0].holds
    assert ruling.conditions[1].holds is None
    assert "nan" not in ruling.conditions[1].told


@pytest.mark.parametrize(
    ("change", "holds", "told"),
    [
        ({}, True, "3×"),
        ({"interval": Interval(low=0.9, high=4.0)}, False, ""),
        ({"settled": False}, None, "the fit's starts disagree"),
        ({"interval": Interval(low=2.0, high=4.0, lost=0.61)}, None, "61% of the resamples"),
        ({"value": float("inf")}, None, "no budget"),
        ({"read_beyond": 2.5}, None, "read 2.5× outside"),
    ],
)
def test_the_leverage_of_the_rule_must_be_known(tmp_path, change, holds, told):
    """Above one it may be known to be, though how far is extrapolated."""
    parts = made(tmp_path, leverage={"moe": 3.0}, noise=2e-4)
    (ladder,) = parts.ladders
    found = ladder.leverages["moe"]
    assert found.extrapolated
    changed = replace(ladder, leverages={"moe": replace(found, **change)})
    (ruling,) = rulings(parts.d, changed, parts.seconds)
    assert ruling.conditions[1].holds is holds
    assert told in ruling.conditions[1].told
    assert ("so not even" in ruling.conditions[1].told) == (holds is None)


class Vault(SharedBudgets):
    """Of the budgets in `bent`, the size between the others has the highest loss."""

    bent = "a"

    def result(self, run):
        plain = super().result(run)
        if run.size[0] in self.bent:
            plain["final"]["bpb"] = 4.0 + 0.2 * (run.size[1] == "1") + 1e-4 * run.seed
        return plain


class Vaults(Vault):
    bent = "ab"


def test_a_budget_without_a_best_size_is_left_out_of_the_line(tmp_path):
    sizes = tuple(f"{budget}{i}" for budget in "abc" for i in range(3))
    parts = made(tmp_path / "one", Vault, sizes=sizes, noise=1e-4)
    fits, refused = isoflops(parts.d, valleys(parts.d, "active_flops"))
    assert refused == {}
    for fit in fits.values():
        assert fit.exponent == pytest.approx(0.5, abs=0.02)
        assert [b.size_interval is None for b in fit.budgets] == [True, False, False]
    parts = made(tmp_path / "two", Vaults, sizes=sizes, noise=1e-4)
    fits, refused = isoflops(parts.d, valleys(parts.d, "active_flops"))
    assert fits == {}
    assert set(refused) == {"swiglu", "moe"}
    told = "No line of swiglu: of 3 budgets 1 have a size of lowest loss"
    assert told in (best_sizes(parts.d) or "")
    assert told in Page(render(parts)).text
