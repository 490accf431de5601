"""The baseline's loss over parameters and tokens, and what a variant is worth in either.

comparison.md 6.2 and 6.4. It takes sizes that were trained on different numbers of tokens, as sizes
that share a budget are; on a ladder with one number of tokens a size the two cannot be told apart.
"""

from dataclasses import dataclass

import numpy as np

from recipes.report import text
from recipes.report.tables import num_cell, sort_head, sortable
from recipes.report.text import Markup, el, join, lead
from recipes.statistics.bootstrap import DRAWS, Array, Interval, means, percentile_interval
from recipes.statistics.curves import Chinchilla
from recipes.statistics.leverage import BEYOND, LOST
from recipes.statistics.resampled import resampled
from recipes.statistics.scaling import Fit, fit_chinchilla, runs_of
from recipes.study.report.derive import Arm, Derived
from recipes.study.report.isoflop import params_of
from recipes.study.report.ladder import trained
from recipes.study.report.names import held, variant_name


@dataclass(frozen=True)
class Worth:
    """What the baseline needs for a variant's loss, of parameters or of tokens."""

    value: float  # infinite where no number of them would do
    interval: Interval  # over resamples of the runs of both
    beyond: float  # how far outside the baseline's runs it was read; 1.0: inside


def law_of(d: Derived, hold: str) -> Fit | None:
    """l = E + A N^-alpha + B D^-beta of the baseline alone; None where its runs cannot tell it.

    That is too few sizes or numbers of tokens, or a loss that does not fall with both.
    """
    arms = trained(d, d.plan.baseline.variant, hold)
    pairs = [(params_of(arm), run.tokens) for arm in arms for run in arm.runs]
    if not pairs:
        return None
    runs = runs_of(pairs, [run.final.bpb for arm in arms for run in arm.runs])
    try:
        fit = fit_chinchilla(runs)
    except ValueError:  # too few sizes or numbers of tokens, or one follows from the other
        return None
    law = fit.chinchilla()
    return fit if min(law.alpha, law.beta) > 0 else None


def worths(
    d: Derived, fit: Fit, hold: str, *, draws: int = DRAWS
) -> dict[str, tuple[Worth, Worth]]:
    """By variant, at the largest complete size: N_eff, and the tokens that the baseline needs.

    N_eff is the size of a baseline with the variant's loss after as many tokens; the tokens are
    those that the baseline of that size of the ladder needs for it.
    """
    base = d.base(d.top or "", hold)
    if base is None:
        return {}
    sigma = d.noise.std if d.noise else None
    law, again = fit.chinchilla(), resampled(fit, draws=draws, sigma=sigma).chinchilla
    found: dict[str, tuple[Worth, Worth]] = {}
    for i, variant in enumerate(d.others, 1):
        arm = next((a for a in trained(d, variant, hold) if a.size == d.top), None)
        if arm is None:
            continue
        losses = np.array([run.final.bpb for run in arm.runs])
        drawn = means(losses, draws=draws, seed=i, sigma=sigma)
        tokens, size = _tokens(arm), params_of(base)
        sizes, counts = fit.runs[0].x.T
        found[variant] = (
            _worth(_size_for(law, tokens, losses.mean()), _size_for(again, tokens, drawn), sizes),
            _worth(_tokens_for(law, size, losses.mean()), _tokens_for(again, size, drawn), counts),
        )
    return found


def _tokens(arm: Arm) -> float:
    return float(np.mean([run.tokens for run in arm.runs]))


def _size_for(law: Chinchilla, tokens: float, loss: Array) -> Array:
    return law.at_tokens(tokens).reaching(loss)


def _tokens_for(law: Chinchilla, size: float, loss: Array) -> Array:
    return law.at_size(size).reaching(loss)


def _worth(value: Array, drawn: Array, tried: Array) -> Worth:
    x = float(value)
    beyond = max(1.0, x / tried.max(), tried.min() / x)
    return Worth(x, percentile_interval(drawn), float(beyond))


def parameters_and_tokens(d: Derived) -> Markup | None:
    """The law, the best size by it, and what each variant is worth; None where there is no law."""
    hold = d.flops_hold
    fit, base = law_of(d, hold), d.base(d.top or "", hold)
    if fit is None or base is None:
        return None
    law = fit.chinchilla()
    per_weight = base.flops / _tokens(base) / params_of(base)
    best, tokens = (float(x) for x in law.optimal(base.flops, per_weight))
    unsure = None if fit.settled else " The starts of the fit disagree: do not trust it."
    note = lead(
        f"Bits per byte of {d.plan.baseline.variant} at {held(hold)} over parameters N (all of "
        "them) and tokens D: ", el("code", law.formula()), ". By it the best use of "
        f"{text.si(base.flops)} training FLOPs are {text.si(best)} parameters and "
        f"{text.si(tokens)} tokens. A variant's N_eff is the size of a baseline that is as good "
        "after as many tokens; its token leverage, how many times as many tokens the baseline of "
        f"size {d.top} needs to be as good. More than {BEYOND:g}× outside the baseline's runs a "
        "number is extrapolated, and not claimed.", unsure,
    )  # fmt: skip
    heads = [
        sort_head("Variant", False),
        sort_head("N_eff"),
        sort_head("95 % interval", False, title="percentiles of the bootstrap over runs"),
        sort_head("N_eff/N", title="parameter efficiency"),
        sort_head("N_eff/active", title="active efficiency: of the parameters a token touches"),
        sort_head("Token leverage"),
        sort_head("95 % interval", False, title="percentiles of the bootstrap over runs"),
        sort_head("Notes", False),
    ]
    rows = [_row(d, hold, v, *found) for v, found in worths(d, fit, hold).items()]
    return join(el("h3", "Parameters and tokens"), note, sortable(heads, rows) if rows else None)


def _row(d: Derived, hold: str, variant: str, size: Worth, tokens: Worth) -> Markup:
    arm = d.arm(variant, d.top or "", hold)
    assert arm is not None, "only what has runs has a worth"
    cost, trained_on = arm.runs[0].cost, _tokens(arm)
    share, active = size.value / cost.params, size.value / cost.active_params
    leverage = tokens.value / trained_on
    low, high = (end / trained_on for end in (tokens.interval.low, tokens.interval.high))
    far = [
        f"{what} extrapolated {of.beyond:.3g}×"
        for what, of in (("N_eff", size), ("tokens", tokens))
        if not of.beyond <= BEYOND
    ]
    lost = max(size.interval.lost, tokens.interval.lost)
    if lost >= LOST:
        far.append(f"{lost:.0%} of the resamples gave no number")
    return el(
        "tr",
        el("td", variant_name(d, variant)),
        num_cell(size.value, text.si(size.value)),
        el("td", f"{text.si(size.interval.low)} to {text.si(size.interval.high)}"),
        num_cell(share, f"{share:.3g}"),
        num_cell(active, f"{active:.3g}"),
        num_cell(leverage, f"{leverage:.3g}×"),
        el("td", f"{low:.3g} to {high:.3g}"),
        el("td", el("span", ", ".join(far), class_="chip worse") if far else None),
    )
