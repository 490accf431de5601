"""Differences by seed against scipy's tests, Holm, power, and against chance."""

from math import inf, nan, sqrt
from statistics import stdev
from typing import Any

import numpy as np
import pytest
from scipy import stats

from recipes.report.noise import compare_in_pairs
from recipes.statistics import paired, power
from recipes.statistics.noise import Spread, mean_interval, spread_of
from recipes.statistics.paired import by_noise, difference
from recipes.statistics.verdicts import Difference, correct, holm

BASELINE = {0: 3.310, 1: 3.302, 2: 3.318, 3: 3.306, 4: 3.313}


def group(*losses, start=0):
    return dict(enumerate(losses, start))


def table_of(variants, baseline):
    """Every variant against the baseline, judged and corrected as a study's report does."""
    judged = [compare_in_pairs(seeds, baseline, baseline) for seeds in variants.values()]
    return dict(zip(variants, correct(judged), strict=True))


def test_seeds_in_common_are_compared_in_pairs():
    variant = group(3.296, 3.291, 3.303, 3.294, 3.297)
    d = difference(variant, BASELINE)
    expected: Any = stats.ttest_rel(list(variant.values()), list(BASELINE.values()))
    assert d.p == pytest.approx(expected.pvalue)
    assert d.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert (d.df, d.how) == (4, "paired over 5 seeds")
    r = np.corrcoef(list(variant.values()), list(BASELINE.values()))[0, 1]
    assert d.correlation == pytest.approx(r)
    assert d.effect == pytest.approx(d.value / stdev(BASELINE.values()))


def test_only_the_seeds_in_common_are_paired():
    d = difference({1: 3.29, 2: 3.31, 3: 3.30, 7: 9.0}, BASELINE)
    assert d.value == pytest.approx((3.29 + 3.31 + 3.30) / 3 - (3.302 + 3.318 + 3.306) / 3)
    assert d.how == "paired over 3 seeds"


def test_other_seeds_are_compared_by_welch():
    variant = group(3.29, 3.27, 3.31, 3.25, start=10)
    d = difference(variant, BASELINE)
    expected: Any = stats.ttest_ind(
        list(variant.values()), list(BASELINE.values()), equal_var=False
    )
    assert (d.p, d.df) == pytest.approx((expected.pvalue, expected.df))
    assert d.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert (d.how, d.correlation) == ("Welch's test: other seeds", None)


def test_pairs_that_do_not_correlate_are_paired_too():
    variant = group(3.296, 3.303, 3.291, 3.299, 3.290)  # high where the baseline is low
    d = difference(variant, BASELINE)
    assert d.correlation is not None
    assert d.correlation < 0
    expected: Any = stats.ttest_rel(list(variant.values()), list(BASELINE.values()))
    assert (d.p, d.how) == (pytest.approx(expected.pvalue), "paired over 5 seeds")


@pytest.mark.parametrize(
    ("variant", "baseline", "why"),
    [
        (group(1.0, 1.1), BASELINE, "2 seeds, and no claim below 3"),
        (group(1.0), BASELINE, "1 seed, and no claim below 3"),
        (group(1.0, 1.1, 1.2, start=5), group(2.0, 2.1), "2 seeds"),
        (group(1.0, nan, 1.1), BASELINE, "diverged"),
        (BASELINE, group(1.0, inf, 1.1), "diverged"),
        ({s: x - 0.5 for s, x in BASELINE.items()}, BASELINE, "move both alike"),
        (group(1.0, 1.0, 1.0, start=5), group(2.0, 2.0, 2.0), "measure no noise"),
    ],
)
def test_where_nothing_can_be_claimed_nothing_is(variant, baseline, why):
    d = correct([difference(variant, baseline)])[0]
    assert why in d.how
    assert (d.word, d.p, d.half, d.p_equal) == ("not resolved", None, None, None)


def test_equivalence_is_two_one_sided_tests():
    variant = group(3.3105, 3.3015, 3.3178, 3.3066, 3.3124)
    (d,) = correct([difference(variant, BASELINE)])
    pairs = [variant[s] - BASELINE[s] for s in BASELINE]
    margin = 0.0025 * np.mean(list(BASELINE.values()))
    ends: Any = [
        stats.ttest_1samp(pairs, -margin, alternative="greater"),
        stats.ttest_1samp(pairs, margin, alternative="less"),
    ]
    assert d.margin == pytest.approx(margin)
    assert d.p_equal == pytest.approx(max(end.pvalue for end in ends))
    assert d.word == "equivalent"
    (strict,) = correct([difference(variant, BASELINE, margin=1e-5)])
    assert strict.word == "not resolved"


def test_a_small_but_clear_difference_is_better_and_within_the_margin():
    variant = {s: x - 0.002 + 1e-5 * s for s, x in BASELINE.items()}
    d = table_of({"v": variant}, BASELINE)["v"]
    assert (d.word, d.equivalent) == ("better", True)


def test_holm_is_stepwise_and_never_decreases():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    ps = np.random.default_rng(0).random(20) ** 3
    corrected = np.array(holm(list(ps)))
    assert (corrected >= ps).all()
    assert (corrected <= np.minimum(1, 20 * ps) + 1e-15).all()  # Bonferroni's are not smaller
    assert (np.diff(corrected[ps.argsort()]) >= 0).all()


def test_both_families_are_corrected_over_those_that_were_tested():
    a = Difference(value=-1.0, p=0.03, p_equal=0.9, half=1.0, how="")
    b = Difference(value=1.0, how="one seed")
    c = Difference(value=0.1, p=0.02, p_equal=0.02, half=1.0, how="")
    found = correct([a, b, c])
    assert [d.p_holm for d in found] == pytest.approx([0.04, None, 0.04])
    assert [d.p_equal_holm for d in found] == pytest.approx([0.9, None, 0.04])
    assert [d.word for d in found] == ["better", "not resolved", "worse"]


def test_single_runs_are_judged_by_the_noise_of_others_from_three_sigma_on():
    noise = Spread(std=0.01, df=50)
    many = dict.fromkeys(range(51), 3.0)
    near, far = (by_noise({0: 3.0 + x}, many, noise, "noise") for x in (0.027, 0.031))
    assert near.p is not None
    assert near.p < 0.05
    assert [d.word for d in correct([near, far])] == ["not resolved", "worse"]
    assert "below 3 sigma" in near.how
    assert far.half == pytest.approx(stats.t.ppf(0.975, 50) * 0.01 * sqrt(1 + 1 / 51))


def test_spread_and_interval_against_scipy():
    a, b = [1.0, 1.2, 1.3], [2.0, 2.5]
    pooled = spread_of(group(*a), group(*b), group(9.0))
    assert pooled is not None
    variance = (2 * np.var(a, ddof=1) + np.var(b, ddof=1)) / 3
    assert (pooled.std**2, pooled.df) == pytest.approx((variance, 3))
    mean, half = mean_interval(a)
    low, high = stats.t.interval(0.95, 2, np.mean(a), stats.sem(a))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    with pytest.raises(ValueError, match="two numbers at least, got 1"):
        mean_interval([1.0])


@pytest.mark.parametrize(
    ("effect", "n"), [(1, 17), (1.5, 8), (2, 6), (2.5, 4), (3, 4), (4, 3), (5, 3)]
)
def test_seeds_needed_are_those_of_the_protocol(effect, n):
    assert abs(power.seeds_needed(effect, 1.0) - n) <= 1


@pytest.mark.parametrize("correlation", [None, 0.0, 0.7])
def test_power_is_that_of_the_noncentral_t(correlation):
    effect, sigma, n = 0.005, 0.004, 6
    df = 2 * n - 2 if correlation is None else n - 1
    shift = effect / (sigma * sqrt(2 * (1 - (correlation or 0.0)) / n))
    bound = stats.t.ppf(0.975, df)
    expected = stats.nct.sf(bound, df, shift) + stats.nct.cdf(-bound, df, shift)
    found = power.power_of(-effect, sigma, n, correlation=correlation)
    assert found == pytest.approx(expected, rel=1e-9)


def test_resolution_undoes_seeds_needed():
    for n in (3, 4, 8, 17):
        least = power.resolution(n, 0.002)
        assert power.power_of(least, 0.002, n) == pytest.approx(0.8)
        assert power.seeds_needed(least * (1 + 1e-6), 0.002) == n
    assert power.seeds_needed(0.005, 0.002) == 4  # the page's own examples
    assert abs(power.seeds_needed(0.002, 0.002) - 17) <= 1
    assert power.seeds_needed(1, 1, correlation=0.8) < power.seeds_needed(1, 1)
    assert power.power_of(0.0, 1.0, 5) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: power.seeds_needed(0.0, 1.0), "effect must be positive"),
        (lambda: power.seeds_needed(1.0, -1.0), "sigma must be positive"),
        (lambda: power.seeds_needed(1.0, 1.0, power=0.01), "power must be in"),
        (lambda: power.seeds_needed(1e-9, 1.0), "no 100,000 seeds"),
        (lambda: power.power_of(1.0, 1.0, 1), "n must be 2 at least"),
        (lambda: power.power_of(1.0, 1.0, 5, correlation=1.0), "correlation must be in"),
    ],
)
def test_power_refuses(call, why):
    with pytest.raises(ValueError, match=why):
        call()


def simulated(rng, n, rho, size, shift=0.0, sigma=0.01):
    """Tables of `size` variants with n seeds that correlate by rho with the baseline's."""
    shared = rng.standard_normal(n)
    rows = sqrt(rho) * shared + sqrt(1 - rho) * rng.standard_normal((size + 1, n))
    losses = 3.3 * (1 + shift * (np.arange(size + 1) == 1)[:, None]) + sigma * rows
    base, *variants = (group(*row) for row in losses)
    return {str(i): v for i, v in enumerate(variants)}, base


def false_tables(n, rho, tables):
    """Of tables of four variants that equal the baseline, those that call any better or worse."""
    rng = np.random.default_rng([n, int(10 * rho)])
    return sum(
        any(d.resolved for d in table_of(*simulated(rng, n, rho, 4)).values())
        for _ in range(tables)
    )


@pytest.mark.parametrize(("n", "rho"), [(3, 0.0), (5, 0.5)])
def test_equal_variants_are_better_or_worse_in_one_table_of_twenty(n, rho):
    false = false_tables(n, rho, tables := 1000)
    assert stats.binomtest(false, tables, 0.05, alternative="greater").pvalue > 0.01
    assert false / tables > 0.03  # nor is it bought with power


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_many_tables_of_equal_variants(n, rho):
    false = false_tables(n, rho, tables := 20_000)
    assert 0.035 < false / tables < 0.0545  # 5 % and three standard errors


def test_the_sign_of_the_correlation_must_not_pick_the_test():
    """Why pairs are always taken: Welch where they happen not to correlate misses too often."""
    rng, tables = np.random.default_rng(1), 3000
    paired_missed = picked_missed = 0
    for _ in range(tables):
        variants, base = simulated(rng, 5, 0.0, 1)
        d = difference(variants["0"], base)
        picked = d
        if d.correlation is not None and d.correlation <= 0:
            others = {seed + 100: loss for seed, loss in variants["0"].items()}
            picked = difference(others, base)  # no seed in common: Welch's test
        paired_missed += d.p is not None and d.p <= 0.05
        picked_missed += picked.p is not None and picked.p <= 0.05
    assert paired_missed / tables == pytest.approx(0.05, abs=0.01)
    assert picked_missed / tables > 0.057


def test_intervals_cover_and_a_planted_percent_is_found():
    rng, tables, covered, found = np.random.default_rng(2), 600, 0, 0
    for _ in range(tables):
        variants, base = simulated(rng, 5, 0.5, 4, shift=-0.01)
        low, high = difference(variants["0"], base).interval or (0.0, 0.0)
        covered += low <= -0.033 <= high
        found += table_of(variants, base)["0"].word == "better"
    assert covered / tables == pytest.approx(0.95, abs=0.025)
    # 3.3 sigma in pairs that correlate by 0.5; the smallest of four needs alpha / 4
    expected = power.power_of(0.033, 0.01, 5, alpha=0.05 / 4, correlation=0.5)
    assert found / tables > expected - 0.03
    assert expected > 0.8


def test_unequal_variants_are_called_equivalent_as_seldom_as_promised():
    """True differences of exactly the margin."""
    rng, tables, false = np.random.default_rng(3), 1000, 0
    for _ in range(tables):
        variants, base = simulated(rng, 5, 0.5, 1, shift=0.0025, sigma=0.002)
        d = table_of(variants, base)["0"]
        false += d.equivalent
    assert 0.03 < false / tables < 0.07


def test_constants_are_the_protocols():
    assert (paired.EQUIVALENCE, paired.MIN_SEEDS, paired.SINGLE_RUN) == (0.0025, 3, 3.0)
