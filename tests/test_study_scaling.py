"""What a study's report says beyond its differences: hold-outs, times to a target, shared rates."""

from dataclasses import dataclass
from math import log

import pytest
from study_report_data import MadeUpStudy
from test_report import Page, sections_of

from recipes.study.gather import gather
from recipes.study.report.costs import costs
from recipes.study.report.derive import Derived
from recipes.study.report.headline import headline
from recipes.study.report.holdout import hold_outs
from recipes.study.report.page import parts_of, render
from recipes.study.report.scaling import scaling
from recipes.study.report.targets import SHARED, targets, targets_of, trace_of

DRAWS = 200
FIVE = ("xs", "s", "m", "l", "xl")
ORDINARY = (6, 7, 8)  # seeds; the draws of 0 to 2 are among the 5 % that miss by chance


def made(planted, directory):
    """What the report derives from a made-up study."""
    return parts_of(gather(planted.write(directory)), draws=DRAWS)


@dataclass
class OffTheLine(MadeUpStudy):
    """A variant whose largest size does not go on as the smaller ones began."""

    off: float = 0.0  # share of its loss

    def result(self, run):
        plain = super().result(run)
        if run.size == self.sizes[-1] and run.variant == "moe":
            plain["final"]["bpb"] *= 1 + self.off
        return plain


def test_the_largest_budget_is_predicted_by_the_smaller_ones(tmp_path):
    parts = made(MadeUpStudy(sizes=FIVE, seeds=ORDINARY, controls=False, noise=2e-4), tmp_path)
    found = hold_outs(parts.d, parts.ladders[0])
    assert set(found) == {"swiglu", "moe"}
    for h in found.values():
        assert h.at / h.below == pytest.approx(8)
        assert h.at == pytest.approx(parts.d.base("xl").flops)
        assert abs(h.relative) < 2e-3
        assert not h.missed
    page = Page(render(parts)).text
    assert "8× beyond what it saw, errs by" in page
    assert "All within the noise" in page


def test_a_curve_that_does_not_go_on_is_named_with_its_error(tmp_path):
    parts = made(
        OffTheLine(sizes=FIVE, seeds=ORDINARY, controls=False, noise=2e-4, off=0.01), tmp_path
    )
    found = hold_outs(parts.d, parts.ladders[0])
    assert found["moe"].relative == pytest.approx(0.01, abs=2e-3)
    assert [v for v, h in found.items() if h.missed] == ["moe"]
    told = f"Beyond the noise: moe (+{100 * found['moe'].relative:.2f}"
    assert told in Page(render(parts)).text


def test_four_budgets_leave_none_to_hold_out_and_three_fit_nothing(tmp_path):
    four = made(MadeUpStudy(controls=False), tmp_path / "four")
    assert hold_outs(four.d, four.ladders[0]) == {}
    assert "No budget could be held out: that takes 5 of them" in Page(render(four)).text
    three = made(MadeUpStudy(sizes=("s", "m", "l"), controls=False), tmp_path / "three")
    assert "held out" not in Page(render(three)).text


@dataclass
class Curves(MadeUpStudy):
    """Held-out loss falls by the logarithm of the tokens; moe needs `share` of them for as much."""

    share: float = 0.5
    evals: int = 10
    offset: float = 0.0  # of moe's loss

    def result(self, run):
        plain = super().result(run)
        flops, tokens = self.compute(run.size)
        moe = run.variant == "moe"
        worth, extra = (1 / self.share, self.offset) if moe else (1.0, 0.0)
        second = 1e-3 * (2 if moe else 1)
        curve = []
        for i in range(1, self.evals + 1):
            at = tokens * i / self.evals
            curve.append({
                "step": i, "tokens": int(at), "flops": flops * at, "train_s": second * at,
                "eval_bpb": 4 - 0.1 * log(at * worth) + extra + 0.001 * (run.seed - 1),
            })  # fmt: skip
        return plain | {"curve": curve}


def cells_of(html, size="s"):
    """Text of the rows of a size's table, by variant."""
    table = next(t for t in html.split("<table") if f'<tr><th>{size}</th><th scope="col"' in t)
    rows = table.split("</table>")[0].split("<tbody>")[1].split("<tr>")[1:]
    return {row.split("<b>")[1].split("</b>")[0]: Page(row).text for row in rows}


def test_half_the_tokens_are_half_the_flops_and_as_many_seconds(tmp_path):
    parts = made(Curves(sizes=("s",), controls=False), tmp_path)
    trace = trace_of(parts.d.base("s").runs)
    goals = targets_of(trace)
    assert list(goals) == [0.25, 0.5, 1.0]
    assert goals == {part: pytest.approx(4 - 0.1 * log(1e6 * part)) for part in goals}
    html = render(parts)
    assert "time-to-target" in sections_of(html)
    moe = cells_of(html)["moe"]
    assert moe.count("0.50×") == 6  # FLOPs and tokens, to each of three targets
    assert moe.count("1.00×") == 3  # twice the seconds a token
    assert "500 G" in moe
    assert "500 k" in moe
    assert cells_of(html)["swiglu"].count("1.00×") == 9
    page = Page(html).text
    assert "10 evaluations a run" in page
    assert "So few cannot" not in page
    assert SHARED in page


def test_what_is_never_reached_is_never_and_few_evaluations_are_told(tmp_path):
    planted = Curves(sizes=("s",), controls=False, share=1.0, evals=4, offset=0.05)
    html = render(made(planted, tmp_path))
    assert cells_of(html)["moe"].count("never") == 3
    gap = 0.05 + 0.1 * log(2)  # offset, and as it takes twice the seconds a token
    assert cells_of(html)["moe"].endswith(f"+{gap:.4f}")
    assert "by themselves 0 of 3 seeds reach it" in html
    assert "So few cannot place a time better than between two of them" in Page(html).text


def test_one_evaluation_a_run_is_no_curve(tmp_path):
    parts = made(Curves(sizes=("s",), controls=False, evals=1), tmp_path)
    assert trace_of(parts.d.base("s").runs) is None
    assert "time-to-target" not in sections_of(render(parts))


def test_a_target_met_at_once_is_at_most_that_and_a_diverged_run_has_no_time(tmp_path):
    slow = Curves(sizes=("s",), controls=False, share=50)
    assert cells_of(render(made(slow, tmp_path / "slow")))["moe"].count("never") == 9
    fast = Curves(sizes=("s",), controls=False, share=1 / 50)
    moe = cells_of(render(made(fast, tmp_path / "fast")))["moe"]
    assert (moe.count("≤ 100 k"), moe.count("0.10×")) == (3, 2)  # a tenth of all, at the first one
    lost = Curves(sizes=("s",), controls=False, diverge=("s-moe-bf16-lr0.002-s1",))
    assert "diverged" in cells_of(render(made(lost, tmp_path / "lost")))["moe"]


def test_sensitivity_is_over_the_rates_that_all_have(tmp_path):
    rates = (5e-4, 1e-3, 2e-3, 4e-3)
    planted = {"sizes": ("s",), "controls": False, "noise": 1e-6, "lrs": rates}
    whole = made(MadeUpStudy(**planted), tmp_path / "whole")
    assert {s.shared for s in whole.sweeps} == {rates}
    assert "Not every sweep" not in Page(render(whole)).text
    part = made(MadeUpStudy(missing=("moe-bf16-lr0.0005",), **planted), tmp_path / "part")
    assert {s.shared for s in part.sweeps} == {rates[1:]}
    swiglu, moe = part.sweeps
    assert swiglu.sensitivity == pytest.approx(0.04 / 3 * swiglu.best.loss, rel=0.01)
    assert moe.sensitivity == pytest.approx(swiglu.sensitivity, rel=0.01)
    assert whole.sweeps[0].sensitivity == pytest.approx(0.12 / 4 * swiglu.best.loss, rel=0.01)
    assert "s in bf16: of 0.001, 0.002, 0.004 alone" in Page(render(part)).text
    lost = ("moe-bf16-lr0.0005", "swiglu-bf16-lr0.004")
    few = made(MadeUpStudy(missing=lost, **planted), tmp_path / "few")
    assert [s.sensitivity for s in few.sweeps] == [None, None]
    assert "s in bf16: of none, for fewer than 3 are shared" in Page(render(few)).text


@pytest.mark.parametrize(
    ("planted", "lacks"),
    [
        ({"sizes": ("s", "m")}, ["it has 2 sizes: 2 more are missing", "at equal parameters"]),
        ({"sizes": ("s", "m", "l"), "holds": ("active_flops", "params")}, ["1 more is missing"]),
        ({"sizes": FIVE, "holds": ("active_flops", "params"), "seeds": (0, 1)}, ["3 seeds"]),
        ({"sizes": FIVE, "holds": ("active_flops", "params")}, []),
    ],
)
def test_what_a_study_cannot_say_stands_at_its_top(tmp_path, planted, lacks):
    d = Derived(gather(MadeUpStudy(controls=False, steps=20, **planted).write(tmp_path)))
    text = Page(headline(d)).text
    assert ("cannot call anything better by the rule" in text) is bool(lacks)
    for told in lacks:
        assert told in text
    letters = {f"({letter}) asks" for letter in "abc" if f"({letter}) asks" in text}
    assert len(letters) == len(lacks)


def test_seconds_of_a_shared_machine_are_told_wherever_they_stand(tmp_path):
    parts = made(MadeUpStudy(controls=False), tmp_path)
    assert parts.seconds.leverages
    for shown in (scaling(parts.d, parts.ladders, parts.seconds), costs(parts.d), targets(parts.d)):
        assert SHARED in Page(shown).text
