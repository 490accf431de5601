"""When a study may say "better": every condition of the rule, by the evidence that decides it."""

from copy import copy
from dataclasses import replace
from math import inf, nan

import pytest
from study_report_data import MadeUpStudy

from recipes.statistics.bootstrap import Interval
from recipes.statistics.leverage import Leverage
from recipes.study.gather import gather
from recipes.study.report.derive import Derived
from recipes.study.report.ladder import ladder, training_flops
from recipes.study.report.rule import rulings

LEVERAGE = Leverage(
    value=1.4,
    interval=Interval(low=1.1, high=1.7),
    x=1e18,
    loss=3.0,
    equivalent=1.4e18,
    beyond=1.4,
    baseline_loss=3.05,
    slope=-0.14,
    settled=True,
)
MOE = ("moe", "s", "active_flops")
AT_PARAMS = ("moe", "s", "params")


@pytest.fixture(scope="module")
def derived(tmp_path_factory):
    planted = MadeUpStudy(
        gains={"moe": 0.01}, sizes=("s",), holds=("active_flops", "params"), controls=False,
        steps=20,
    )  # fmt: skip
    return Derived(gather(planted.write(tmp_path_factory.mktemp("study"))))


def ruled(d, *, leverage=LEVERAGE, seconds=LEVERAGE, differences=None):
    """The ruling on moe by these leverages, some differences of the table put aside for others."""
    changed = copy(d)
    changed.__dict__["table"] = {**d.table, **(differences or {})}
    none = replace(ladder(d, "active_flops", training_flops), why=None)
    flops, time = (
        none if x is None else replace(none, leverages={"moe": x}) for x in (leverage, seconds)
    )
    (found,) = rulings(changed, flops, time)
    return found


def test_better_needs_all_four(derived):
    found = ruled(derived)
    assert [c.holds for c in found.conditions] == [True] * 4
    assert found.better
    assert found.words == "better by the rule"


@pytest.mark.parametrize(
    ("change", "holds", "told"),
    [
        ({"interval": Interval(low=0.9, high=2.0)}, False, "[0.9, 2]"),
        ({"interval": Interval(low=1.0, high=2.0)}, False, "[1, 2]"),
        ({"beyond": 3.0}, True, "only that it is above 1 is claimed"),
        ({"value": nan, "interval": Interval(low=2.37, high=inf)}, None, "no budget brings"),
        ({"value": inf, "interval": Interval(low=inf, high=inf)}, None, "no budget brings"),
        ({"interval": Interval(low=1.1, high=1.7, lost=0.2)}, None, "20% of the resamples"),
        ({"settled": False}, None, "the fit's starts disagree"),
    ],
)
def test_a_leverage_counts_where_it_is_known_to_be_above_one(derived, change, holds, told):
    found = ruled(derived, leverage=replace(LEVERAGE, **change))
    condition = found.conditions[1]
    assert (condition.letter, condition.holds) == ("b", holds)
    assert told in condition.told
    assert found.better is (holds is True)


@pytest.mark.parametrize(
    ("given", "letter", "holds"),
    [
        ({"leverage": None}, "b", None),
        ({"seconds": None}, "d", None),
        ({"seconds": replace(LEVERAGE, value=0.7)}, "d", True),  # printed is all that is asked
    ],
)
def test_what_was_not_measured_cannot_be_told(derived, given, letter, holds):
    found = ruled(derived, **given)
    assert {c.letter: c.holds for c in found.conditions}[letter] is holds
    assert found.better is (holds is True)
    if holds is None:
        assert found.words == f"not better by the rule: ({letter}) cannot be told"


def test_quality_is_the_corrected_difference_at_equal_flops(derived):
    given = derived.table[MOE]
    for change in ({"p_holm": 0.06}, {"value": -given.value}):
        found = ruled(derived, differences={MOE: replace(given, **change)})
        assert found.conditions[0].holds is False
        assert found.words == "not better by the rule: (a) does not hold"
    unknown = replace(given, p=None, p_holm=None, half=None)
    assert ruled(derived, differences={MOE: unknown}).conditions[0].holds is None


@pytest.mark.parametrize(("share", "holds"), [(0.002, True), (0.003, False)])
def test_at_equal_parameters_it_may_lose_a_quarter_percent_at_most(derived, share, holds):
    bpb = derived.base("s", "params").bpb
    worse = replace(derived.table[AT_PARAMS], value=share * bpb)
    found = ruled(derived, differences={AT_PARAMS: worse})
    assert found.conditions[2].holds is holds
    assert found.better is holds
