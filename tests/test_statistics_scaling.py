"""Scaling laws: known ones recovered, leverage of known shifts, intervals against chance."""

from dataclasses import replace
from math import inf, log

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from recipes.statistics.bootstrap import percentile_interval, perturb, resample
from recipes.statistics.checks import bend, hold_out
from recipes.statistics.isoflop import isoflop
from recipes.statistics.leverage import leverage_of_curves
from recipes.statistics.minimise import descend
from recipes.statistics.powerlaw import PowerLaws
from recipes.statistics.resampled import resampled
from recipes.statistics.scaling import fit_chinchilla, fit_frontier, fit_frontiers, runs_of

BUDGETS = np.geomspace(1e16, 1e18, 5)
REPLICATED = (1.8172, 482.01, 0.3478, 2085.43, 0.3658)  # arXiv:2404.10102: E, A, alpha, B, beta


def frontier(compute, floor=2.0, scale=30.0, exponent=0.1):
    return floor + scale * np.asarray(compute) ** -exponent


def noisy(x, loss, sigma, rng):
    return runs_of(x, loss + sigma * rng.standard_normal(len(loss)))


def grid(sizes=6, tokens=5):
    n, d = np.meshgrid(np.geomspace(1e6, 1e9, sizes), np.geomspace(1e8, 2e10, tokens))
    return np.stack([n.ravel(), d.ravel()], axis=1)


def chinchilla(x, law=REPLICATED):
    floor, a, alpha, b, beta = law
    return floor + a * x[:, 0] ** -alpha + b * x[:, 1] ** -beta


def coefficients(law):
    return law.floor, np.exp(law.log_a), law.alpha, np.exp(law.log_b), law.beta


@pytest.fixture(scope="module")
def chinchilla_fit():
    return fit_chinchilla(runs_of(grid(), chinchilla(grid())))


@pytest.mark.parametrize(
    "law", [(2.0, 30.0, 0.1), (0.7, 400.0, 0.15), (3.0, 3.0, 0.05), (0.05, 12.0, 0.04)]
)
def test_a_frontier_without_noise_is_recovered(law):
    fit = fit_frontier(runs_of(BUDGETS, frontier(BUDGETS, *law)))
    found = fit.frontier()
    assert (found.floor, np.exp(found.log_scale), found.exponent) == pytest.approx(law, rel=1e-3)
    assert fit.settled
    assert np.abs(fit.residuals["baseline"]).max() < 1e-7


def test_frontiers_share_their_floor():
    laws = {"dense": (2.0, 30.0, 0.1), "moe": (2.0, 40.0, 0.11), "memory": (2.0, 9.0, 0.07)}
    fit = fit_frontiers({n: runs_of(BUDGETS, frontier(BUDGETS, *law)) for n, law in laws.items()})
    for name, law in laws.items():
        found = fit.frontier(name)
        assert (found.floor, np.exp(found.log_scale), found.exponent) == pytest.approx(
            law, rel=1e-3
        )


def test_chinchilla_without_noise_is_recovered(chinchilla_fit):
    law = chinchilla_fit.chinchilla()
    assert coefficients(law) == pytest.approx(REPLICATED, rel=1e-3)
    assert chinchilla_fit.settled
    assert law.formula() == "1.8172 + 482.01 N^-0.3478 + 2085.4 D^-0.3658"


def test_the_best_size_is_where_the_loss_at_a_compute_is_lowest(chinchilla_fit):
    law, compute = chinchilla_fit.chinchilla(), 1e19
    size, tokens = law.optimal(compute)
    assert 6 * size * tokens == pytest.approx(compute)
    around = size * np.geomspace(0.9, 1.1, 2001)
    losses = law.loss(around, compute / (6 * around))
    assert around[losses.argmin()] == pytest.approx(size, rel=2e-4)


def test_laws_are_turned_round(chinchilla_fit):
    law = chinchilla_fit.chinchilla()
    loss = float(law.loss(1e8, 1e9))
    assert law.at_tokens(1e9).reaching(loss) == pytest.approx(1e8)  # N_eff
    assert law.at_size(1e8).reaching(loss) == pytest.approx(1e9)
    curve = fit_frontier(runs_of(BUDGETS, frontier(BUDGETS))).frontier()
    assert curve.reaching(2.0 - 1e-3) == inf
    step = 1e-5
    slope = (curve.loss(1e17 * np.exp(step)) - curve.loss(1e17 * np.exp(-step))) / (2 * step)
    assert curve.slope(1e17) == pytest.approx(slope, rel=1e-6)


def test_gradients_are_those_of_differences():
    rng = np.random.default_rng(0)
    for groups, inputs in ((1, 1), (1, 2), (3, 1)):
        laws = PowerLaws(
            logs=rng.standard_normal((12, inputs)),
            log_loss=1 + 0.02 * rng.standard_normal(12),
            group=np.arange(12) % groups,
            delta=1e-2,  # residuals on both sides of it
        )
        theta, w = rng.standard_normal((2, laws.size)) / 2, rng.random(12)
        values, gradients = laws.value_and_gradient(theta, w)
        assert values == pytest.approx(laws.value(theta, w))
        for row, gradient in zip(theta, gradients, strict=True):
            numeric = approx_fprime(row, lambda x, laws=laws, w=w: laws.value(x[None], w)[0], 1e-7)
            assert gradient == pytest.approx(numeric, rel=1e-4, abs=1e-2)


def test_huber_is_summed_over_runs():
    laws = PowerLaws(logs=np.zeros((3, 1)), log_loss=np.zeros(3), group=np.zeros(3, int))
    theta = np.array([[np.log(0.5), np.log(0.5) + 5e-4, 0.0]])  # ln l^ = ln(1 + 2.5e-4)
    r = np.log1p(0.5 * np.expm1(5e-4)) / 1e-3
    assert laws.value(theta, np.ones(3))[0] == pytest.approx(3 * r**2 / 2)
    far = np.array([[np.log(0.5), np.log(1.5), 0.0]])
    assert laws.value(far, np.ones(3))[0] == pytest.approx(3 * (log(2) / 1e-3 - 0.5))


@pytest.mark.parametrize("sigma", [5e-4, 3e-3])
def test_sum_and_mean_have_the_same_optimum(sigma):
    rng = np.random.default_rng(1)
    runs = noisy(np.repeat(BUDGETS, 3), frontier(np.repeat(BUDGETS, 3)), sigma, rng)
    one, mean = (fit_frontier(runs, weights=np.full(15, w)).frontier() for w in (1.0, 1 / 15))
    assert mean.exponent == pytest.approx(one.exponent, rel=1e-5)
    assert mean.floor == pytest.approx(one.floor, rel=1e-5)


def test_units_and_bases_of_logarithms_do_not_matter():
    """A rescaled x is another zero of its logarithm, a power of it another base."""
    rng = np.random.default_rng(2)
    runs = noisy(BUDGETS, frontier(BUDGETS), 3e-4, rng)
    better = runs_of(BUDGETS, runs.loss - 0.01)

    def value(change):
        pair = (runs_of(change(r.x), r.loss) for r in (runs, better))
        return leverage_of_curves(*pair, sigma=3e-4, draws=50).value

    plain = value(lambda x: x)
    assert value(lambda x: x / 1e15) == pytest.approx(plain, rel=1e-5)
    assert value(lambda x: x**0.5) ** 2 == pytest.approx(plain, rel=1e-5)


def test_resamples_end_where_the_careful_fit_does():
    rng = np.random.default_rng(3)
    x = np.repeat(BUDGETS, 3)
    fit = fit_frontier(noisy(x, frontier(x), 1e-3, rng))
    again = resampled(fit, draws=6, seed=1)
    for i, counts in enumerate(again.counts):
        careful = fit_frontier(fit.runs[0], weights=counts).frontier()
        quick = again.frontiers["baseline"]
        assert quick.loss(1e18)[i] == pytest.approx(careful.loss(1e18), abs=2e-5)


def test_descent_never_ends_above_its_start():
    rng = np.random.default_rng(4)
    laws = fit_frontier(noisy(BUDGETS, frontier(BUDGETS), 5e-2, rng)).laws
    starts = rng.standard_normal((64, 3)) * 3
    ends, values = descend(laws, starts, np.ones(5))
    assert (values <= laws.value(starts, np.ones(5))).all()
    assert values == pytest.approx(laws.value(ends, np.ones(5)))


@pytest.mark.parametrize("shift", [2.0, 0.5, 1.0])
def test_a_known_shift_is_the_leverage(shift):
    base, variant = (runs_of(BUDGETS, frontier(s * BUDGETS)) for s in (1.0, shift))
    found = leverage_of_curves(base, variant, sigma=2e-4, draws=200)
    assert found.value == pytest.approx(shift, rel=1e-3)
    assert shift in found.interval
    assert found.interval.high / found.interval.low < 1.3
    assert found.equivalent == pytest.approx(shift * 1e18, rel=1e-3)
    assert found.gap_worth == pytest.approx(log(shift), abs=0.05)  # by the slope alone


def test_the_baseline_against_itself_is_one():
    rng = np.random.default_rng(5)
    x = np.repeat(BUDGETS, 3)
    runs = noisy(x, frontier(x), 1e-3, rng)
    found = leverage_of_curves(runs, runs, draws=300)
    assert 1.0 in found.interval
    assert found.value == pytest.approx(1.0, abs=0.06)
    assert found.gap_percent == pytest.approx(0.0, abs=0.05)


def test_reading_far_outside_the_baseline_is_flagged():
    base = runs_of(BUDGETS, frontier(BUDGETS))

    def found(shift, at=1e18):
        variant = runs_of(BUDGETS, frontier(shift * BUDGETS))
        return leverage_of_curves(base, variant, at=at, sigma=1e-5, draws=50)

    for shift, flagged in {1.9: False, 2.1: True}.items():
        assert found(shift).beyond == pytest.approx(shift, rel=1e-3)
        assert found(shift).extrapolated is flagged
    assert found(1 / 3, at=1e16).beyond == pytest.approx(3.0, rel=1e-3)
    inside = found(2.0, at=1e17)
    assert (inside.beyond, inside.extrapolated) == (1.0, False)


@pytest.mark.parametrize("seed", range(3))
def test_a_baseline_that_does_not_fall_has_no_leverage(seed):
    """Its curve has no budget for the loss, and most resamples none either: nothing is above 1."""
    rng, x = np.random.default_rng(seed), np.repeat(BUDGETS[:4], 3)
    base = noisy(x, 3.0 + 0.005 * np.log10(x / 1e16), 0.01, rng)
    found = leverage_of_curves(base, runs_of(x, 0.9 * frontier(x)), draws=200)
    assert found.interval.low > 1  # of the resamples that gave a number
    assert found.interval.lost > 0.5
    assert np.isnan(found.value)
    assert found.extrapolated
    assert found.unsure == "no budget brings the baseline's fitted curve to this loss"


def test_what_a_leverage_needs_to_be_known():
    runs = runs_of(BUDGETS, frontier(BUDGETS))
    found = leverage_of_curves(runs, runs_of(BUDGETS, frontier(3 * BUDGETS)), sigma=1e-5, draws=50)
    assert (found.extrapolated, found.unsure) == (True, None)  # above one for certain
    lost = replace(found.interval, lost=0.05)
    assert "starts disagree" in (replace(found, settled=False).unsure or "")
    assert "5% of the resamples" in (replace(found, interval=lost).unsure or "")
    beyond = leverage_of_curves(runs, runs, at=2.1e18, sigma=1e-5, draws=50)
    assert "read 2.1× outside" in (beyond.unsure or "")
    assert leverage_of_curves(runs, runs, at=1.9e18, sigma=1e-5, draws=50).unsure is None


def covered_by_frontiers(studies, draws):
    """Shares of intervals with the true exponent, floor and loss at four times the top budget."""
    rng, x, covered = np.random.default_rng(6), np.repeat(BUDGETS, 2), np.zeros(3)
    for i in range(studies):
        fit = fit_frontier(noisy(x, frontier(x), 5e-4, rng))
        law = resampled(fit, draws=draws, seed=i, sigma=5e-4).frontiers["baseline"]
        truths = (law.exponent, 0.1), (law.floor, 2.0), (law.loss(4e18), frontier(4e18))
        covered += [truth in percentile_interval(values) for values, truth in truths]
    return covered / studies


def test_intervals_of_a_frontier_cover():
    covered = covered_by_frontiers(30, draws=100)
    assert (covered > 0.85).all(), covered  # 95 % less two and a half standard errors


@pytest.mark.slow
def test_intervals_of_a_frontier_cover_as_often_as_they_say():
    covered = covered_by_frontiers(400, draws=400)
    assert (np.abs(covered - 0.95) < 0.03).all(), covered


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "least"), [(None, 0.78), (5e-4, 0.87)])
def test_intervals_of_chinchilla_cover(sigma, least):
    rng, studies, covered = np.random.default_rng(7), 100, np.zeros(6)
    best = fit_chinchilla(runs_of(grid(), chinchilla(grid()))).chinchilla().optimal(1e19)[0]
    for i in range(studies):
        fit = fit_chinchilla(noisy(grid(), chinchilla(grid()), 5e-4, rng))
        law = resampled(fit, draws=200, seed=i, sigma=sigma).chinchilla
        answers = (*coefficients(law), law.optimal(1e19)[0])
        pairs = zip(answers, (*REPLICATED, best), strict=True)
        covered += [truth in percentile_interval(values) for values, truth in pairs]
    assert (covered / studies > least).all(), covered / studies


@pytest.mark.slow
def test_intervals_of_a_leverage_cover():
    rng, studies, covered = np.random.default_rng(8), 200, 0
    x = np.repeat(BUDGETS, 4)
    for i in range(studies):
        base, variant = (noisy(x, frontier(s * x), 1e-3, rng) for s in (1.0, 2.0))
        covered += 2.0 in leverage_of_curves(base, variant, draws=200, seed=i).interval
    assert covered / studies > 0.88  # percentiles of so few runs fall a little short of 95 %


def test_resamples_draw_clusters_whole_and_strata_apart():
    clusters, strata = [0, 0, 1, 2, 2, 3, 4], [*"aaaaabb"]
    counts = resample(7, draws=400, seed=1, clusters=clusters, strata=strata)
    assert counts.shape == (400, 7)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, 3] == counts[:, 4]).all()
    assert (counts[:, [0, 2, 3]].sum(1) == 3).all()
    assert (counts[:, 5:].sum(1) == 2).all()
    assert counts.mean(0) == pytest.approx(np.ones(7), abs=0.15)
    assert (counts == resample(7, draws=400, seed=1, clusters=clusters, strata=strata)).all()
    assert (counts != resample(7, draws=400, seed=2, clusters=clusters, strata=strata)).any()
    with pytest.raises(ValueError, match="two strata"):
        resample(3, clusters=[0, 0, 1], strata=[0, 1, 1])
    with pytest.raises(ValueError, match="strata must name each of 3 runs, got 2"):
        resample(3, strata=[0, 1])


def test_resamples_that_no_fit_can_use_are_drawn_again():
    counts = resample(4, draws=300, usable=lambda c: (c > 0).sum(1) >= 3)
    assert ((counts > 0).sum(1) >= 3).all()
    with pytest.raises(ValueError, match="say `sigma`"):
        resample(12, draws=5, usable=lambda c: (c > 0).all(1))


def test_the_interval_of_a_mean_is_nearly_that_of_the_normal():
    values = np.random.default_rng(9).standard_normal(400)
    found = percentile_interval(resample(400, draws=2000) @ values / 400)
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)
    one = percentile_interval(resample(400, draws=50, clusters=[0] * 400) @ values / 400)
    assert one.high - one.low == pytest.approx(0.0, abs=1e-12)  # one run's checkpoints say nothing


def test_percentiles_count_what_is_infinite_and_tell_what_is_lost():
    found = percentile_interval([*range(1, 100), inf])
    assert (found.low, found.high) == (3.0, 98.0)
    assert percentile_interval([1.0, inf, inf]).high == inf
    assert percentile_interval([1.0, 2.0, np.nan, np.nan]).lost == 0.5
    with pytest.raises(ValueError, match="none of 2 resamples"):
        percentile_interval([np.nan, np.nan])


def test_the_largest_budget_is_held_out():
    x = np.repeat(BUDGETS, 2)
    right = hold_out(runs_of(x, frontier(x)), sigma=1e-3, draws=100)
    assert (right.at, right.below) == (1e18, BUDGETS[-2])
    assert right.error == pytest.approx(0.0, abs=1e-6)
    assert not right.missed
    bent = frontier(x) + 0.05 * (x == 1e18)
    wrong = hold_out(runs_of(x, bent), sigma=1e-3, draws=100)
    assert wrong.error == pytest.approx(0.05, abs=1e-6)
    assert wrong.relative == pytest.approx(0.05 / bent[-1], abs=1e-6)
    assert wrong.missed
    # the noise of the runs left out is part of it: two runs of 1e-3 alone give 2.8e-3
    assert wrong.interval.high - wrong.interval.low > 2.8e-3
    with pytest.raises(ValueError, match="3 in all, got baseline 2"):
        hold_out(runs_of(BUDGETS[:3], frontier(BUDGETS[:3])), sigma=1e-3)


def held_out_wrongly(studies):
    """Share of hold-outs of a true law that are called missed."""
    rng, x = np.random.default_rng(11), np.repeat(BUDGETS, 3)
    found = (
        hold_out(noisy(x, frontier(x), 1e-3, rng), draws=100, seed=i, sigma=1e-3)
        for i in range(studies)
    )
    return sum(h.missed for h in found) / studies


def test_a_true_law_is_seldom_called_missed():
    assert held_out_wrongly(40) <= 0.15  # 5 % and three standard errors


@pytest.mark.slow
def test_a_true_law_is_called_missed_as_seldom_as_promised():
    assert 0.01 < held_out_wrongly(600) < 0.08


def test_a_wrong_form_bends_its_residuals_and_a_right_one_does_not():
    rng = np.random.default_rng(10)
    x = np.repeat(np.geomspace(1e16, 1e19, 8), 4)
    right = fit_frontier(noisy(x, frontier(x), 1e-3, rng))
    assert not bend(right.residuals["baseline"], x).bent
    wave = frontier(x) + 0.02 * ((np.log(x) - np.log(x).mean()) / 3.45) ** 2
    wrong = fit_frontier(runs_of(x, wave + 1e-3 * rng.standard_normal(len(x))))
    straight = np.log(wave) - np.polyval(np.polyfit(np.log(x), np.log(wave), 1), np.log(x))
    assert bend(straight, x).bent
    assert bend(straight, x).curvature > 0
    assert wrong.minimum.value > right.minimum.value
    with pytest.raises(ValueError, match="four different x"):
        bend([0.0, 0.1, 0.2, 0.1, 0.0], [1.0, 2.0, 3.0, 3.0, 1.0])


def test_isoflop_optima_and_their_line():
    def runs(compute, sizes=7):
        best = 0.1 * compute**0.5
        size = best * np.geomspace(0.3, 3, sizes)
        return runs_of(size, 3.0 + 0.05 * np.log(size / best) ** 2)

    found = isoflop({c: runs(c) for c in (1e16, 1e17, 1e18)}, sigma=2e-4, draws=300)
    assert found.exponent == pytest.approx(0.5, rel=1e-6)
    assert [b.size for b in found.budgets] == pytest.approx([1e7, 10**7.5, 1e8])
    assert 0.5 in found.exponent_interval
    for budget in found.budgets:
        assert budget.loss == pytest.approx(3.0)
        assert budget.size in budget.size_interval
    drawn = isoflop({c: runs(c) for c in (1e16, 1e17)}, draws=100)
    assert drawn.exponent_interval.low == pytest.approx(0.5)  # without noise nothing moves
    vault = runs_of([1e6, 2e6, 4e6, 8e6], [3.1, 3.2, 3.2, 3.1])  # highest between its ends
    bent = isoflop({1e15: vault, 1e16: runs(1e16), 1e17: runs(1e17)}, sigma=1e-4, draws=100)
    assert bent.exponent == pytest.approx(0.5, rel=1e-6)
    assert 0.5 in bent.exponent_interval
    assert np.isnan(bent.budgets[0].size)
    assert bent.budgets[0].size_interval is None
    with pytest.raises(ValueError, match="of 2 budgets 1 have a size of lowest loss"):
        isoflop({1e16: vault, 1e17: runs(1e17)}, sigma=1e-4, draws=100)
    with pytest.raises(ValueError, match="needs three sizes at least, got 2"):
        isoflop({1e16: runs_of([1e6, 2e6], [3.0, 3.1]), 1e17: runs(1e17)})


def test_noise_is_added_of_the_size_given():
    found = perturb([3.0, 2.0], 0.01, draws=4000)
    assert found.mean(0) == pytest.approx([3.0, 2.0], abs=1e-3)
    assert found.std(0) == pytest.approx([0.01, 0.01], rel=0.05)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: runs_of([1e16, 1e17], [3.0]), "same runs, one at least, got 2 and 1"),
        (lambda: runs_of([1e16, 0.0], [3.0, 2.9]), "x must be positive and finite"),
        (lambda: runs_of([1e16, 1e17], [3.0, np.nan]), "loss must be positive and finite"),
        (lambda: fit_frontier(runs_of([1e16, 1e17], [3.0, 2.9])), "3 in all, got baseline 2"),
        (lambda: fit_chinchilla(runs_of(BUDGETS, frontier(BUDGETS))), r"x must be \[n, 2\]"),
        (
            lambda: fit_chinchilla(
                runs_of(np.stack([BUDGETS, 20 * BUDGETS], 1), frontier(BUDGETS))
            ),
            "tokens follow from the size",
        ),
        (
            lambda: fit_chinchilla(runs_of(grid(2, 5), chinchilla(grid(2, 5)))),
            "three sizes and token counts in five runs at least, got 2 and 5 in 10 runs",
        ),
    ],
)
def test_what_no_law_can_be_fitted_to_is_refused(call, why):
    with pytest.raises(ValueError, match=why):
        call()
