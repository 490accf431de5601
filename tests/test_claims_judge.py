"""When a test of a claim is reproduced, contradicted or left open."""

import json
from dataclasses import asdict
from math import nan
from typing import Any

import pytest
from scipy import stats

from recipes.claiming.judge import judge, overall
from recipes.claiming.schema import Test

NOISE = [0.001, -0.002, 0.0015, -0.0005]  # of the seeds, in pairs
BASE = {0: 3.0, 1: 3.1, 2: 2.9, 3: 3.05}


def a_test(**said: Any) -> Test:
    return Test(**said)


def verdict_of(shift: float, *, noise: float = 1.0, **said: Any) -> Any:
    """The one test of a claim, its side `shift` above the other but for the noise."""
    of = {seed: BASE[seed] + shift + noise * NOISE[seed] for seed in BASE}
    (found,) = judge([(a_test(of=None, against="swiglu", measure="bpb", **said), of, BASE)])
    return found


LOWER, HIGHER = {"direction": "lower"}, {"direction": "higher"}
EQUAL = {"direction": "equal", "margin": 0.01}


@pytest.mark.parametrize(
    ("shift", "said", "verdict"),
    [
        (-0.05, LOWER, "reproduced"),
        (0.0, LOWER, "not resolved"),
        (0.05, LOWER, "contradicted"),
        (0.05, HIGHER, "reproduced"),
        (-0.05, HIGHER, "contradicted"),
        (0.01, {**LOWER, "threshold": 0.02}, "reproduced"),
        (0.02, {**LOWER, "threshold": 0.02}, "not resolved"),
        (0.03, {**LOWER, "threshold": 0.02}, "contradicted"),
        (0.0, EQUAL, "reproduced"),
        (0.01, EQUAL, "not resolved"),
        (0.05, EQUAL, "contradicted"),
        (-0.05, EQUAL, "contradicted"),
        (0.05, {**EQUAL, "threshold": 0.05}, "reproduced"),
        (0.0, {**EQUAL, "threshold": 0.05}, "contradicted"),
        (0.06, {**HIGHER, "scale": "ratio", "threshold": 1.01}, "reproduced"),
        (0.03, {**HIGHER, "scale": "ratio", "threshold": 1.01}, "not resolved"),
        (0.0, {**HIGHER, "scale": "ratio", "threshold": 1.01}, "contradicted"),
        (0.0, {**EQUAL, "scale": "ratio"}, "reproduced"),
        (0.06, {**EQUAL, "scale": "ratio"}, "contradicted"),
    ],
)
def test_a_planted_effect_gives_its_verdict(shift, said, verdict):
    assert verdict_of(shift, **said).verdict == verdict


@pytest.mark.parametrize("threshold", [0.0, -0.01])
def test_the_interval_and_p_are_those_of_students_t_in_pairs(threshold):
    found = verdict_of(-0.004, noise=3.0, threshold=threshold, **LOWER)
    pairs = [-0.004 + 3 * x for x in NOISE]
    expected: Any = stats.ttest_1samp(pairs, threshold)
    assert found.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.estimate == pytest.approx(sum(pairs) / 4)


def test_a_ratio_is_judged_on_logarithms():
    of = {seed: 1.02 * x * (1 + NOISE[seed]) for seed, x in BASE.items()}
    test = a_test(of=None, against="x", measure="bpb", scale="ratio", **HIGHER)
    found: Any = judge([(test, of, BASE)])[0]
    assert found.estimate == pytest.approx(1.02, rel=1e-3)
    assert found.low < 1.02 < found.high
    assert (found.of, found.against) == (pytest.approx(3.073, abs=2e-3), pytest.approx(3.0125))


def test_a_figure_by_itself_is_held_against_the_threshold():
    test = a_test(of=None, measure="loops", direction="lower", threshold=4.0)
    (found,) = judge([(test, {0: 3.0, 1: 3.1, 2: 2.9}, None)])
    assert (found.verdict, found.against) == ("reproduced", None)
    assert found.estimate == pytest.approx(3.0)


def test_what_is_counted_needs_no_seeds():
    test = a_test(of=None, against="x", measure="params", scale="ratio", **LOWER)
    (found,) = judge([(test, {0: 90.0}, {0: 100.0})])
    assert (found.verdict, found.how, found.p) == ("reproduced", "counted", None)
    assert found.estimate == pytest.approx(0.9)
    (found,) = judge([(test, {0: 110.0}, {0: 100.0})])
    assert found.verdict == "contradicted"


@pytest.mark.parametrize(
    ("of", "against", "verdict", "how"),
    [
        ({}, {0: 1.0}, "not run", "no finished run has that figure"),
        ({0: 1.0, 1: 1.0}, {0: 3.0, 1: 3.1}, "not resolved", "2 seeds, and no claim below 3"),
        ({0: 1.0, 1: nan, 2: 1.0}, {0: 3.0, 1: 3.1, 2: 3.0}, "not resolved", "a run diverged"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 2.0, 2: 3.0}, "not resolved", "alike"),
        ({0: 1.0, 1: 2.0}, {0: 3.0, 1: 4.0}, "not resolved", "2 seeds, and no claim below 3"),
        ({3: 1.0, 4: 1.0, 5: 1.0}, {0: 3.0, 1: 3.0, 2: 3.0}, "not resolved", "no noise"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_says_why(of, against, verdict, how):
    (found,) = judge([(a_test(of=None, against="x", measure="bpb", **LOWER), of, against)])
    assert found.verdict == verdict
    assert how in found.how


@pytest.mark.parametrize(
    ("shift", "said", "verdict"),
    [
        (0.5, LOWER, "contradicted"),
        (0.5, HIGHER, "reproduced"),
        (0.5, EQUAL, "contradicted"),
        (0.0, EQUAL, "reproduced"),
        (0.0, {**LOWER, "threshold": 1.0}, "reproduced"),
        (0.0, LOWER, "not resolved"),  # on the threshold itself
        (0.5, {**HIGHER, "threshold": 0.5}, "not resolved"),
        (0.25, {"direction": "equal", "margin": 0.25}, "not resolved"),
        (0.0, {**LOWER, "scale": "ratio", "threshold": 1.01}, "reproduced"),
        (0.0, {**HIGHER, "scale": "ratio"}, "not resolved"),
    ],
)
def test_seeds_that_differ_by_the_same_number_have_no_noise(shift, said, verdict):
    """As of a start before any training, or of dead experts where there are none."""
    found = verdict_of(shift, noise=0.0, **said)
    assert (found.verdict, found.p) == (verdict, None)
    if verdict != "not resolved":
        assert found.how == "counted"
        assert found.low == found.high == found.estimate


ALL, HALF, THREE = [nan] * 4, [nan, nan, 3.0, 3.1], [nan, nan, nan, 3.0]


@pytest.mark.parametrize(
    ("of", "against", "said", "verdict"),
    [
        (ALL, None, HIGHER, "reproduced"),
        (ALL, None, LOWER, "contradicted"),
        (ALL, None, EQUAL, "contradicted"),
        (None, ALL, LOWER, "reproduced"),
        (None, ALL, HIGHER, "contradicted"),
        (None, ALL, EQUAL, "contradicted"),
        (THREE, None, HIGHER, "reproduced"),
        (ALL, None, {**HIGHER, "scale": "ratio", "threshold": 1.02}, "reproduced"),
        (HALF, None, HIGHER, "not resolved"),
        (ALL, ALL, HIGHER, "not resolved"),
        (ALL, [3.0, 3.0, 3.0, nan], HIGHER, "not resolved"),
        (ALL[:2], [3.0, 3.1], HIGHER, "not resolved"),
        (ALL, None, {**HIGHER, "measure": "accuracy"}, "not resolved"),
    ],
)
def test_one_side_alone_that_diverges_has_infinitely_much_loss(of, against, said, verdict):
    of, against = (BASE if x is None else dict(enumerate(x)) for x in (of, against))
    test = a_test(of=None, against="x", **{"measure": "bpb", **said})
    (found,) = judge([(test, of, against)])
    assert found.verdict == verdict
    assert "diverged" in found.how
    assert (found.p, found.estimate) == (None, None)
    json.dumps(asdict(found), allow_nan=False)  # claims.json could not be written otherwise


def test_three_of_six_that_diverge_are_too_few():
    base = {**BASE, 4: 3.0, 5: 3.1}
    test = a_test(of=None, against="x", measure="bpb", **HIGHER)
    verdicts = [
        judge([(test, {s: nan if s < lost else x for s, x in base.items()}, base)])[0].verdict
        for lost in range(1, 7)
    ]
    assert verdicts == ["not resolved"] * 3 + ["reproduced"] * 3


def test_a_figure_by_itself_that_diverged_is_below_nothing():
    test = a_test(of=None, measure="bpb", direction="lower", threshold=4.0)
    (found,) = judge([(test, dict.fromkeys(range(3), nan), None)])
    assert (found.verdict, found.how) == ("contradicted", "it diverged in 3 of 3 seeds")


def test_p_is_corrected_over_the_tests_of_a_claim():
    def case(shift, wide):
        of = {s: BASE[s] + shift + wide * NOISE[s] for s in BASE}
        return a_test(of=None, against="x", measure="bpb", **LOWER), of, BASE

    alone: Any = judge([case(-0.01, 3.0)])
    assert (alone[0].verdict, alone[0].p < 0.05) == ("reproduced", True)
    three: Any = judge([case(-0.01, 3.0), case(0.0, 1.0), case(0.0, 1.0)])
    assert three[0].p == alone[0].p
    assert three[0].p_holm == pytest.approx(min(1.0, 3 * alone[0].p))
    assert three[0].high < 0  # uncorrected it clears the threshold
    assert three[0].verdict == "not resolved"


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [
        (["reproduced", "reproduced"], "reproduced"),
        (["reproduced", "not resolved"], "not resolved"),
        (["reproduced", "not run"], "not resolved"),
        (["reproduced", "not resolved", "contradicted"], "contradicted"),
        (["not run", "not run"], "not run"),
    ],
)
def test_the_claim_follows_from_its_tests(verdicts, verdict):
    shift = {"reproduced": -0.05, "not resolved": 0.0, "contradicted": 0.05}
    nothing = judge([(a_test(**LOWER), {}, {})])[0]
    found = [verdict_of(shift[v], direction="lower") if v in shift else nothing for v in verdicts]
    assert overall(found) == verdict
