"""Mix'n'Match: the least slope within a budget, against every other choice (arXiv:2310.07707)."""

from itertools import pairwise, product

import pytest
import torch

import zoo
from zoo.extract import extracted_config
from zoo.mixnmatch import climb, finer, least_slope
from zoo.model import LanguageModel, ModelConfig, model_cost

SMALL = {"vocab_size": 17, "d_model": 16, "n_heads": 2, "max_seq_len": 24}
MATFORMER = {"name": "matformer", "d_ff": 64}


def config(ffn, n_layers=4):
    return ModelConfig(**SMALL, n_layers=n_layers, ffn=ffn)


def total(costs, levels):
    return sum(row[level] for row, level in zip(costs, levels, strict=True))


def chains(costs):
    """Levels that do not fall with depth and take at most two neighbouring ones."""
    for levels in product(range(len(costs[0])), repeat=len(costs)):
        rising = all(a <= b for a, b in pairwise(levels))
        if rising and max(levels) - min(levels) <= 1:
            yield list(levels)


COSTS = {
    "equal": [[8, 16, 32, 64]] * 4,
    "equal_fractions": [[1.5, 4.0, 4.5]] * 4,
    "unequal": [[8, 16, 32], [3, 30, 31], [10, 11, 40]],
    "idle_steps": [[8, 8, 12, 16], [8, 12, 12, 16], [1, 2, 3, 4]],
    "one_level": [[8], [9]],
}


@pytest.mark.parametrize("name", sorted(COSTS))
def test_no_other_chain_within_the_budget_costs_more(name):
    """Every budget between the narrowest and beyond the widest."""
    costs = COSTS[name]
    least, most = (int(total(costs, [i] * len(costs))) for i in (0, -1))
    tried = 0
    for budget in range(least + 1, most + 3):
        levels = climb(costs, budget)
        assert levels in list(chains(costs))
        assert total(costs, levels) <= budget
        within = [chain for chain in chains(costs) if total(costs, chain) <= budget]
        assert total(costs, levels) == max(total(costs, chain) for chain in within)
        low = min(levels)
        if levels != [len(costs[0]) - 1] * len(costs):  # one upgrade more
            up = max(i for i, level in enumerate(levels) if level == low)
            more = [level + (i == up) for i, level in enumerate(levels)]
            assert total(costs, more) > budget
        tried += 1
    assert tried >= 2


def test_the_closed_form_climbs_as_unequal_layers_do():
    """One more layer, which costs nothing, makes them unequal."""
    row, n = [2, 3, 7, 12], 5
    for budget in range(n * row[0], n * row[-1] + 2):
        assert climb([row] * n, budget) == climb([[0] * 4, *[row] * n], budget)[1:]


def test_examples_of_the_paper():
    """850M model: budgets of non-embedding parameters, printed lists of section 4.1.1 and A.4."""
    d, n = 1536, 16
    big = ModelConfig(vocab_size=32, d_model=d, n_heads=16, n_layers=n, ffn="matformer")
    s, m, wide, xl = (d * ratio // 2 for ratio in (1, 2, 4, 8))
    beside = 32 * d + (2 * n + 1) * d  # embedding and norms, which the paper leaves out
    attention = 4 * d * d * n
    for millions, want in (
        (226.5, [m] * 16),
        (245.4, [m] * 12 + [wide] * 4),
        (278.4, [m] * 5 + [wide] * 11),
        (377.5, [wide] * 8 + [xl] * 8),
    ):
        assert list(least_slope(big, params=millions * 1e6 + beside)) == want
        assert list(least_slope(big, hidden=(millions * 1e6 - attention) // (2 * d))) == want
    assert set(least_slope(big, params=1e12)) == {xl}
    assert set(least_slope(big, hidden=16 * s)) == {s}


@pytest.mark.parametrize("measure", ["params", "flops"])
@pytest.mark.parametrize(
    "ffn",
    [
        MATFORMER,
        {"name": "matformer", "preset": "gated", "d_ff": 64},
        [MATFORMER, "swiglu", {"name": "matformer", "d_ff": 96}, "mlp"],
        {"name": "moe", "n_experts": 4, "top_k": 2, "d_expert": 32},
    ],
    ids=["ungated", "gated", "mixed", "moe"],
)
def test_a_budget_is_of_the_extracted_model(ffn, measure):
    """The chosen model costs no more, and with one upgrade more it would."""
    shape = config(ffn)
    tables = [getattr(choice.config, "granularities", ()) for choice in shape.layers()]

    def cost(widths):
        return getattr(model_cost(extracted_config(shape, widths), 24), measure)

    low, high = (cost([table[i] if table else None for table in tables]) for i in (0, -1))
    for share in (0.0, 0.2, 0.5, 0.9):
        budget = low + share * (high - low)
        widths = least_slope(shape, **{measure: budget})
        assert cost(widths) <= budget
        assert [width is None for width in widths] == [not table for table in tables]
        levels = [
            t.index(w) if w is not None else None for t, w in zip(tables, widths, strict=True)
        ]
        lowest = min(level for level in levels if level is not None)
        up = max(i for i, level in enumerate(levels) if level == lowest)
        more = list(widths)
        more[up] = tables[up][lowest + 1]
        assert cost(more) > budget
    assert cost(least_slope(shape, **{measure: high})) == high


def test_flops_are_of_a_length():
    shape = config(MATFORMER)
    short = model_cost(extracted_config(shape, 32), 4).flops
    assert least_slope(shape, flops=short, seq_len=4) == (32,) * 4
    assert least_slope(shape, flops=short) < (32,) * 4  # at 24 tokens attention costs more


def test_widths_in_between_stay_close_to_the_line():
    widths = finer([[8, 16, 32, 64]], 8)[0]
    assert widths == [8, 16, 24, 32, 40, 48, 56, 64]
    both = finer([[8, 16], [24, 72]], 8)
    assert both == [[8, 8, 8, 16, 16, 16, 16], [24, 32, 40, 48, 56, 64, 72]]
    assert finer([[10, 30]], 8) == [[10, 16, 30]]  # trained widths are kept, no multiples or not
    for low, high, q in ((8, 64, 8), (7, 61, 4), (5, 6, 16)):
        [row] = finer([[low, high]], q)
        assert row == sorted(row)
        assert (row[0], row[-1]) == (low, high)
        for k, width in enumerate(row[1:-1], start=1):
            line = low + (high - low) * k / (len(row) - 1)
            assert width % q == 0
            assert abs(width - line) <= q / 2


def test_finer_widths_use_up_more_of_a_budget():
    shape = config(MATFORMER)  # 8, 16, 32, 64
    assert least_slope(shape, hidden=150) == (32,) * 4
    assert least_slope(shape, hidden=150, multiple_of=8) == (32, 32, 40, 40)
    assert least_slope(shape, hidden=150, multiple_of=1) == (37, 37, 38, 38)


def test_a_model_runs_with_what_was_found():
    model = LanguageModel(config([MATFORMER, "swiglu", MATFORMER, MATFORMER]))
    widths = zoo.least_slope(model, hidden=100)
    assert widths == (32, None, 32, 32)
    tokens = torch.randint(17, (2, 5))
    assert model(tokens, widths=widths).logits.shape == (2, 5, 17)


@pytest.mark.parametrize(
    ("ffn", "options", "message"),
    [
        (MATFORMER, {}, "takes one of hidden, params, flops, got none"),
        (MATFORMER, {"hidden": 9, "params": 9}, r"got \['hidden', 'params'\]"),
        (MATFORMER, {"hidden": 31}, "hidden=31 is below the narrowest submodel's 32"),
        (MATFORMER, {"params": 100}, "params=100 is below the narrowest submodel's 5,536"),
        (MATFORMER, {"hidden": 99, "multiple_of": 0}, "multiple_of must be positive, got 0"),
        ("swiglu", {"hidden": 99}, "no layer of this model is nested"),
        (
            [MATFORMER, MATFORMER, MATFORMER, {**MATFORMER, "widths": [32, 64]}],
            {"hidden": 99},
            "as many granularities each, got 4 in layer 0, .*, 2 in layer 3",
        ),
    ],
)
def test_errors(ffn, options, message):
    with pytest.raises(ValueError, match=message):
        least_slope(config(ffn), **options)
