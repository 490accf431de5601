"""What traces of losses say: the time to a target, the area between two."""

from math import inf, log

import numpy as np
import pytest

from recipes.statistics.traces import area_between, time_to


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
