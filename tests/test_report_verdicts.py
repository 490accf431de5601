"""How the report judges a difference: against scipy's tests, and against chance."""

from math import nan
from random import Random
from statistics import stdev
from typing import Any

import pytest
import report_data
from scipy import stats

from recipes.report.headline import headline
from recipes.report.noise import compare, compare_in_pairs
from recipes.report.records import read_results
from recipes.report.study import study
from recipes.statistics.verdicts import correct, holm


@pytest.fixture(scope="module")
def results():
    return report_data.comparison()


BASELINE = {0: 2.461, 1: 2.455, 2: 2.466, 3: 2.458}


def judged(*groups, baseline=BASELINE):
    return correct([compare(group, baseline, baseline) for group in groups])


def test_a_single_run_is_judged_by_the_noise_of_the_baseline():
    (d,) = judged({0: 2.400})
    s, n = stdev(BASELINE.values()), 4
    se = s * (1 + 1 / n) ** 0.5
    assert d.value == pytest.approx(2.400 - 2.460)
    assert d.half == pytest.approx(stats.t.ppf(0.975, n - 1) * se)
    assert d.p == pytest.approx(2 * stats.t.sf(0.060 / se, n - 1))
    assert (d.word, d.df) == ("better", 3)


def test_clear_differences_are_named_and_small_ones_are_not_resolved():
    words = [d.word for d in judged({0: 2.30}, {0: 2.62}, {0: 2.4565}, {0: 2.4630})]
    assert words == ["better", "worse", "not resolved", "not resolved"]


def test_with_several_seeds_the_noise_is_pooled_as_in_a_t_test():
    group = {0: 2.44, 1: 2.43}
    (d,) = judged(group)
    expected: Any = stats.ttest_ind(list(group.values()), list(BASELINE.values()))
    assert d.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert d.interval == pytest.approx((low, high))


def test_the_same_three_seeds_are_compared_in_pairs():
    group = {seed: x - 0.004 + 0.0004 * seed for seed, x in BASELINE.items()}
    (d,) = judged(group)
    expected: Any = stats.ttest_rel(list(group.values()), list(BASELINE.values()))
    assert d.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert d.interval == pytest.approx((low, high))
    assert d.word == "better"  # the pairing takes out what the seeds share
    shifted = {seed + 10: x for seed, x in group.items()}
    assert judged(shifted)[0].word == "not resolved"


def test_three_other_seeds_are_compared_by_welch():
    group = {10: 2.41, 11: 2.45, 12: 2.43}
    (d,) = judged(group)
    expected: Any = stats.ttest_ind(list(group.values()), list(BASELINE.values()), equal_var=False)
    assert (d.p, d.df) == pytest.approx((expected.pvalue, expected.df))
    assert d.how == "Welch's test: other seeds"


def test_what_lies_within_the_margin_beyond_the_noise_is_equivalent():
    group = {0: 2.4612, 1: 2.4549, 2: 2.4659, 3: 2.4583}
    (d,) = judged(group)
    assert (d.word, d.resolved) == ("equivalent", False)
    (single,) = judged({0: 2.460})
    assert single.word == "not resolved"  # one run shows no noise of its own


def test_a_single_run_needs_three_sigma_however_many_seeds_the_baseline_has():
    rng = Random(1)
    many = {seed: rng.gauss(2.46, 0.01) for seed in range(60)}
    s, mean = stdev(many.values()), sum(many.values()) / 60
    near, far = judged({99: mean - 2.7 * s}, {99: mean - 3.3 * s}, baseline=many)
    assert near.p is not None
    assert near.p < 0.05
    assert (near.word, far.word) == ("not resolved", "better")


@pytest.mark.parametrize(
    ("baseline", "why"),
    [
        ({0: 2.46}, "one seed"),
        ({0: 2.46, 1: nan}, "diverged"),
        ({0: 2.46, 1: 2.46}, "no noise"),
    ],
)
def test_without_a_measured_noise_nothing_is_resolved(baseline, why):
    for d in judged({0: 1.0}, {0: 1.0, 1: 1.1}, baseline=baseline):
        assert (d.word, d.half, d.p) == ("not resolved", None, None)
        assert why in d.how


def test_a_diverged_baseline_voids_no_difference_between_others():
    """Three seeds each of a variant in two formats are judged by themselves."""
    reference = {seed: x + 0.01 for seed, x in BASELINE.items()}
    group = {seed: x + 0.02 + 0.001 * seed for seed, x in BASELINE.items()}
    for baseline in ({**BASELINE, 2: nan}, {0: 2.46}, dict.fromkeys(BASELINE, 2.46)):
        (d,) = correct([compare(group, reference, baseline)])
        assert (d.word, d.how) == ("worse", "paired over 4 seeds")


@pytest.mark.parametrize(
    ("group", "common"),
    [
        ({0: 2.30}, "1 seed in common"),
        ({0: 2.30, 1: 2.29}, "2 seeds in common"),
        ({7: 2.30, 8: 2.29, 9: 2.31, 10: 2.30}, "no seeds in common"),
        ({1: 2.30, 2: 2.31, 8: 2.29, 9: 2.31}, "2 seeds in common"),
    ],
)
def test_in_a_study_fewer_than_three_seeds_in_common_claim_nothing(group, common):
    (loose,) = correct([compare(group, BASELINE, BASELINE)])
    (d, whole) = correct(
        [
            compare_in_pairs(group, BASELINE, BASELINE),
            compare_in_pairs({s: x - 0.02 + 1e-4 * s for s, x in BASELINE.items()}, BASELINE, {}),
        ]
    )
    assert loose.word == "better"
    assert (d.word, d.p_holm, d.equivalent) == ("not resolved", None, False)
    assert d.how.endswith(f"{common}, and no claim below 3")
    assert d.half == loose.half
    assert (whole.word, whole.p_holm) == ("better", whole.p)  # not corrected for the other


def test_what_rests_on_the_noise_of_other_runs_is_marked(results):
    own = {seed: x - 0.02 + 1e-4 * seed for seed, x in BASELINE.items()}
    marked = [d.marked for d in judged({0: 2.30}, {0: 2.60, 1: 2.61}, {0: 2.4600}, own)]
    assert marked == ["better, by noise", "worse, by noise", "not resolved", "better"]
    s = study(read_results(results))
    few = [g for g in s.groups if g is not s.baseline and len(g.runs) < 3]
    assert any(s.verdicts[g.key].resolved for g in few)
    html = headline(s)
    for word in ("better", "worse"):
        told = [d for d in s.verdicts.values() if d.word == word]
        assert html.count(f">{word}, by noise<") == sum(d.borrowed for d in told)
    assert "is taken to vary as the baseline does" in html
    never = study(read_results(results), compared=compare_in_pairs)
    assert not any(d.resolved for k, d in never.verdicts.items() if s.verdicts[k].borrowed)
    assert "by noise<" not in headline(never)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_more_variants_in_the_table_ask_for_a_clearer_difference():
    near = {0: 2.442}
    assert judged(near)[0].word == "better"
    crowd = judged(near, *({0: 2.460 + 0.001 * i} for i in range(6)))
    assert crowd[0].p == judged(near)[0].p
    assert crowd[0].word == "not resolved"


def test_equal_variants_are_resolved_as_seldom_as_promised():
    rng, tables, false = Random(0), 400, 0
    for _ in range(tables):
        base = {seed: rng.gauss(2.4, 0.01) for seed in range(4)}
        found = judged(*({0: rng.gauss(2.4, 0.01)} for _ in range(3)), baseline=base)
        false += any(d.resolved for d in found)
    assert 0 < false / tables < 0.075  # 0.05 for a whole table, and sampling


def test_gaps_are_taken_within_a_variant(results):
    s = study(read_results(results))
    bpb_of = {(g.variant, g.precision): g.bpb for g in s.groups}
    assert set(s.gaps) == {(v, "nvfp4") for v in report_data.SHAPES}
    for variant, precision in s.gaps:
        expected = bpb_of[variant, precision] - bpb_of[variant, "bf16"]
        assert s.gaps[variant, precision].value == pytest.approx(expected)
    single = s.gaps["moe", "nvfp4"]  # one run against one run, noise of the baseline
    assert s.noise is not None
    assert single.half == pytest.approx(stats.t.ppf(0.975, 3) * s.noise.std * 2**0.5)
