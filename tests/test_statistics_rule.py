"""When "better" may be said, and what traces of losses say."""

from dataclasses import replace
from math import inf, log

import numpy as np
import pytest

from recipes.statistics.bootstrap import Interval
from recipes.statistics.leverage import Leverage
from recipes.statistics.rule import Evidence, ruling
from recipes.statistics.traces import area_between, time_to
from recipes.statistics.verdicts import Difference, correct

BETTER = correct([Difference(value=-0.02, half=0.01, p=0.01, margin=0.008, how="")])[0]
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
COMPLETE = Evidence(equal_flops=BETTER, equal_params=BETTER, leverage=LEVERAGE, time_leverage=1.2)


def test_better_needs_all_four():
    assert ruling(COMPLETE).better
    assert ruling(COMPLETE).trade_offs == ()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"equal_flops": replace(BETTER, p_holm=0.06)}, "not resolved at equal FLOPs"),
        ({"equal_flops": replace(BETTER, value=0.02)}, "worse at equal FLOPs"),
        ({"leverage": None}, "no leverage at the top rung"),
        (
            {"leverage": replace(LEVERAGE, interval=Interval(low=0.9, high=2.0))},
            "leverage at the top rung may be 0.9",
        ),
        ({"leverage": replace(LEVERAGE, beyond=3.0)}, "3 times outside"),
        ({"time_leverage": None}, "no wall-clock leverage"),
        ({"equal_params": None}, "no comparison at equal parameters"),
    ],
)
def test_what_is_missing_is_named(change, why):
    found = ruling(replace(COMPLETE, **change))
    assert not found.better
    assert len(found.missing) == 1
    assert why in found.missing[0]


def test_trade_offs_stand_beside_it():
    worse = replace(BETTER, value=0.009)
    found = ruling(replace(COMPLETE, equal_params=worse, time_leverage=0.7))
    assert found.better
    assert found.trade_offs == ("worse by 0.009 at equal parameters", "0.7 times as fast in time")
    within = replace(BETTER, value=0.007)
    assert ruling(replace(COMPLETE, equal_params=within)).trade_offs == ()
    with pytest.raises(ValueError, match="equal_params has no margin"):
        ruling(replace(COMPLETE, equal_params=replace(BETTER, margin=None)))


def test_a_target_is_reached_between_two_evaluations():
    x, loss = [1.0, 10.0, 100.0, 1000.0], [5.0, 4.0, 3.0, 3.5]
    assert time_to(3.5, x, loss) == pytest.approx(10**1.5)
    assert time_to(3.0, x, loss) == pytest.approx(100.0)
    assert time_to(6.0, x, loss) == pytest.approx(1.0)
    assert time_to(2.9, x, loss) == inf


def test_the_area_between_two_lines_is_their_distance():
    x, other = np.geomspace(1, 1e4, 9), np.geomspace(10, 1e5, 6)
    lines = 5 - 0.1 * np.log(x), 5 - 0.1 * np.log(other / 2)
    assert area_between(x, lines[0], other, lines[1]) == pytest.approx(-0.1 * log(2))
    assert area_between(x, lines[0], x, lines[0]) == 0.0
    crossing = area_between([1, np.e], [1.0, 0.0], [1, np.e], [0.0, 1.0])
    assert crossing == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="share no range"):
        area_between([1, 2], [1.0, 0.0], [2, 3], [1.0, 0.0])
    with pytest.raises(ValueError, match="must be positive and increase"):
        time_to(1.0, [2.0, 1.0], [1.0, 0.5])
