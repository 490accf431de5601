"""The law over parameters and tokens in a study's report: planted worths are found again."""

from random import Random

import pytest
from study_report_data import MadeUpStudy
from test_report import Page

from recipes.study.gather import gather
from recipes.study.report.derive import Derived
from recipes.study.report.law import law_of, parameters_and_tokens, worths

SIZES = tuple(f"n{i}t{j}" for i in range(3) for j in range(3))
LAW = (0.8, 60.0, 0.3, 200.0, 0.35)  # E, A, alpha, B, beta


class TwoWays(MadeUpStudy):
    """Three sizes, each on three numbers of tokens; moe is worth 1.7 times its parameters."""

    worth = 1.7

    def compute(self, size):
        return 6 * self.params(size), 1e7 * 6 ** int(size[3])

    def params(self, size):
        return 1e6 * 5 ** int(size[1])

    def result(self, run):
        plain = super().result(run)
        params, (_, tokens) = self.params(run.size), self.compute(run.size)
        size = params * (self.worth if run.variant == "moe" else 1.0)
        floor, a, alpha, b, beta = LAW
        bpb = floor + a * size**-alpha + b * tokens**-beta + 5e-4 * Random(run.id).gauss(0, 1)
        plain["final"] |= {"bpb": bpb, "nats_per_token": bpb * 0.693}
        plain["cost"] |= {"params": int(params), "active_params": int(params / 2)}
        return plain


@pytest.fixture(scope="module")
def derived(tmp_path_factory):
    planted = TwoWays(sizes=SIZES, controls=False, steps=10)
    return Derived(gather(planted.write(tmp_path_factory.mktemp("study"))))


def test_the_law_and_what_a_variant_is_worth_are_found_again(derived):
    fit = law_of(derived, "active_flops")
    law = fit.chinchilla()
    floor, a, alpha, b, beta = LAW
    assert law.floor == pytest.approx(floor, abs=0.02)
    assert (law.alpha, law.beta) == (pytest.approx(alpha, rel=0.05), pytest.approx(beta, rel=0.05))
    assert set(fit.runs[0].x[:, 0]) == {1e6, 5e6, 25e6}  # of the baseline alone
    size, tokens = worths(derived, fit, "active_flops", draws=200)["moe"]
    assert size.value == pytest.approx(1.7 * 25e6, rel=0.05)
    assert 1.7 * 25e6 in size.interval
    assert size.interval.high / size.interval.low < 1.3
    assert size.beyond == pytest.approx(1.7, rel=0.05)
    gained = a * (25e6**-alpha - (1.7 * 25e6) ** -alpha)  # that more tokens must buy instead
    needed = ((b * 3.6e8**-beta - gained) / b) ** (-1 / beta)
    assert tokens.value == pytest.approx(needed, rel=0.1)
    assert needed in tokens.interval


def test_the_page_shows_both_efficiencies_and_flags_what_is_read_too_far(derived):
    text = Page(parameters_and_tokens(derived)).text
    assert "Parameters and tokens" in text
    assert "tokens extrapolated" in text
    fit = law_of(derived, "active_flops")
    size, _ = worths(derived, fit, "active_flops")["moe"]
    assert f"{size.value / 25e6:.3g}{size.value / 12.5e6:.3g}" in text  # N_eff over N, over active


def test_one_number_of_tokens_a_size_tells_no_law(tmp_path):
    d = Derived(gather(MadeUpStudy(controls=False, steps=10).write(tmp_path)))
    assert law_of(d, "active_flops") is None
    assert parameters_and_tokens(d) is None
