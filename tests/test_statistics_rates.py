"""Learning rates: where the best one lies, what to try next, and how much it matters."""

from math import inf, log2, nan

import numpy as np
import pytest

from recipes.statistics.parabola import vertex
from recipes.statistics.rates import optimum, sensitivity, shared_rates


def sweep(best, *, low=3.0, bend=0.02, lrs=(1e-3, 2e-3, 4e-3, 8e-3, 16e-3)):
    return {lr: low + bend * (log2(lr) - log2(best)) ** 2 for lr in lrs}


@pytest.mark.parametrize("points", [3, 4, 5])
@pytest.mark.parametrize("best", [2.5e-3, 4e-3, 5e-3])
def test_a_parabola_is_found_exactly(best, points):
    found = optimum(sweep(best), points=points)
    assert found.interior
    assert (found.lr, found.loss) == pytest.approx((best, 3.0))
    assert found.misfit == pytest.approx(0.0, abs=1e-12)
    assert (len(found.fitted), found.next_lrs) == (points, ())


def test_three_points_are_fitted_as_by_hand():
    found = optimum({1e-3: 3.2, 2e-3: 3.0, 4e-3: 3.1}, points=3)
    a, b, c = np.polyfit(np.log2([1e-3, 2e-3, 4e-3]), [3.2, 3.0, 3.1], 2)
    assert found.lr == pytest.approx(2 ** (-b / (2 * a)))
    assert found.loss == pytest.approx(c - b * b / (4 * a))


@pytest.mark.parametrize(
    ("best", "place", "following"),
    [(5e-4, "lower edge", 5e-4), (4e-2, "upper edge", 32e-3)],
)
def test_at_an_edge_the_next_rate_beyond_is_named(best, place, following):
    found = optimum(sweep(best))
    assert (found.place, found.interior, found.fitted) == (place, False, ())
    assert found.next_lrs == pytest.approx((following,))
    assert found.lr == found.tried


@pytest.mark.parametrize("lost", [inf, nan])
def test_beside_a_rate_that_diverged_the_one_between_is_next(lost):
    found = optimum({1e-3: 3.2, 2e-3: 3.1, 4e-3: 3.0, 8e-3: lost})
    assert (found.place, found.tried) == ("beside divergence", 4e-3)
    assert found.next_lrs == pytest.approx((4e-3 * 2**0.5,))
    further = optimum({1e-3: 3.2, 2e-3: 3.0, 4e-3: 3.1, 8e-3: lost})
    assert further.interior
    assert 8e-3 not in further.fitted


def test_points_grow_towards_the_lower_side_and_never_jump():
    losses = {1e-3: 3.05, 2e-3: 3.02, 4e-3: 3.0, 8e-3: 3.1, 16e-3: 5.0, 32e-3: 3.01}
    assert optimum(losses, points=4).fitted == (1e-3, 2e-3, 4e-3, 8e-3)


def test_a_flat_optimum_asks_for_both_half_steps():
    flat = {1e-3: 3.0, 2e-3: 3.0, 4e-3: 3.0}
    found = optimum({**flat, 5e-4: 3.0, 8e-3: 3.0} | {2e-3: 2.9999999}, points=5)
    assert found.interior
    level = optimum({5e-4: 3.0, 1e-3: 3.0 - 1e-15, 2e-3: 3.0})
    assert level.fitted == ()
    assert level.next_lrs == pytest.approx((5e-4 * 2**0.5, 1e-3 * 2**0.5))


@pytest.mark.parametrize(
    ("losses", "options", "why"),
    [
        ({1e-3: 3.0, 2e-3: 3.1}, {}, "3 learning rates at least, got 2"),
        ({1e-3: nan, 2e-3: inf, 4e-3: nan}, {}, "all of 3 learning rates diverged"),
        ({0.0: 3.0, 2e-3: 3.1, 4e-3: 3.2}, {}, "must be positive"),
        (sweep(4e-3), {"points": 6}, "points must be 3 to 5, got 6"),
    ],
)
def test_sweeps_that_say_nothing_are_refused(losses, options, why):
    with pytest.raises(ValueError, match=why):
        optimum(losses, **options)


def test_sensitivity_is_the_mean_loss_above_the_best():
    losses = {1e-3: 3.2, 2e-3: 3.0, 4e-3: 3.1, 8e-3: 9.0, 16e-3: nan}
    initial = 8.0
    assert sensitivity(losses, initial) == pytest.approx((0.2 + 0.0 + 0.1 + 5.0 + 5.0) / 5)
    assert sensitivity(dict.fromkeys(losses, 3.0), initial) == 0.0
    assert sensitivity(sweep(4e-3, bend=0.05), 9.0) > sensitivity(sweep(4e-3), 9.0)


def test_shared_rates_are_those_of_every_sweep():
    a, b = sweep(4e-3), sweep(4e-3, lrs=(5e-4, 1e-3, 2e-3, 4e-3))
    assert shared_rates([a, b]) == (1e-3, 2e-3, 4e-3)
    assert shared_rates([a]) == tuple(sorted(a))
    assert shared_rates([a, sweep(4e-3, lrs=(3e-3,))]) == ()
    assert shared_rates([]) == ()


def test_vertices_in_batches_are_those_one_by_one():
    rng = np.random.default_rng(0)
    x = np.log(np.array([1e6, 2e6, 4e6, 8e6, 8e6]))
    y = 3.0 + 0.1 * (x - x[1]) ** 2 + 0.01 * rng.standard_normal((4, 5))
    w = np.array([[1, 1, 1, 1, 1], [2, 1, 1, 1, 0], [0, 0, 1, 2, 2], [1, 2, 3, 0, 0]], float)
    many = vertex(x, y, w)
    for i in (0, 1, 3):
        a, b, _ = np.polyfit(x, y[i], 2, w=np.sqrt(w[i]))
        assert many.at[i] == pytest.approx(-b / (2 * a))
        assert many.curvature[i] == pytest.approx(a)
    assert np.isnan(many.at[2])  # two different sizes are no parabola
    assert np.isnan(vertex(x[:3], [3.0, 3.1, 3.0]).at)  # a hill has no lowest point
