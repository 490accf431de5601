"""Router health: closed forms, loops over tokens, and hooks that change nothing."""

import math
from contextlib import nullcontext

import pytest
import torch
from recipe_toys import tiny_recipe
from routing_toys import part, routed
from torch import nn

from layers.moe import route
from recipes.data import TextData
from recipes.health import RouterHealth, explains, preference, probabilities, routers_of, watched
from recipes.metrics import evaluate
from recipes.report.layer_records import LayerLoad
from recipes.task import build_model
from routers.remoe import ReMoERouter, ReMoERouterConfig
from zoo.catalogue import ROUTERS

SMALL = ("data.batch_size=2", "data.eval_bytes_per_domain=1024")
MOE = {"name": "moe", "n_experts": 4, "d_expert": 32}


def a_load(counts, by_domain=None, n_ffn=None):
    return LayerLoad(
        layer=0, experts=tuple(f"ffn {i}" for i in range(len(counts))), counts=tuple(counts),
        n_ffn_experts=len(counts) if n_ffn is None else n_ffn, counts_by_domain=by_domain or {},
        entropy=1.0, largest_share=0.0, dead=0,
    )  # fmt: skip


def health_of(routing, mask=None, router=None):
    """The record of one layer that saw one batch."""
    n_experts = routing.logits.shape[-1]
    metric = RouterHealth({0: router or nn.Identity()}, {0: n_experts})
    metric.update({0: routing}, None if mask is None else mask[None])
    (layer,) = metric.layers()
    return layer


# Load


@pytest.mark.parametrize("n", [2, 4, 64])
def test_violation_of_even_load_and_of_all_on_one(n):
    even, one = a_load([7.0] * n), a_load([0.0] * (n - 1) + [9.0])
    assert (even.max_violation, even.min_violation) == (0, 0)
    assert (one.max_violation, one.min_violation) == (pytest.approx(n - 1), 1)


def test_violation_is_of_ffn_experts_and_of_nothing_is_none():
    assert a_load([3.0, 1.0, 100.0], n_ffn=2).max_violation == pytest.approx(0.5)
    assert a_load([0.0, 0.0]).max_violation == 0


def test_domain_information_by_a_loop_over_pairs():
    counts = {"a": (5.0, 1.0, 0.0), "b": (20.0, 20.0, 60.0), "none": (0.0, 0.0, 0.0)}
    joint = [[c / sum(row) / 2 for c in row] for row in (counts["a"], counts["b"])]
    experts = [sum(row[e] for row in joint) for e in range(3)]
    information = sum(
        p * math.log(p / (0.5 * experts[e])) for row in joint for e, p in enumerate(row) if p
    )
    most = min(math.log(2), -sum(p * math.log(p) for p in experts))
    load = a_load([25.0, 21.0, 60.0], counts)
    assert load.domain_information == pytest.approx(information / most, rel=1e-12)


def test_domain_information_at_its_ends():
    apart = {"a": (4.0, 4.0, 0.0, 0.0), "b": (0.0, 0.0, 1.0, 3.0)}
    assert a_load([1.0] * 4, apart).domain_information == pytest.approx(1)
    alike = {"a": (4.0, 8.0), "b": (1.0, 2.0)}
    assert a_load([1.0] * 2, alike).domain_information == pytest.approx(0, abs=1e-12)
    assert a_load([1.0] * 2, {"a": (4.0, 8.0)}).domain_information == 0


# Confidence, near ties, pairs


@pytest.mark.parametrize("n", [1, 2, 8])
def test_an_undecided_router(n):
    found = health_of(routed(torch.zeros(5, n), 1))
    assert found.confidence == pytest.approx(1 / n)
    assert found.token_entropy == pytest.approx(1 if n > 1 else 0)
    assert found.margin == pytest.approx(0 if n > 1 else 1)
    assert (found.information, found.logit_rms) == (pytest.approx(0, abs=1e-12), 0)


def test_a_sure_router_that_uses_every_expert():
    found = health_of(routed(60 * torch.eye(8), 1))
    assert found.confidence == pytest.approx(1)
    assert found.margin == pytest.approx(1)
    assert found.token_entropy == pytest.approx(0, abs=1e-12)
    assert found.information == pytest.approx(1)
    assert found.logit_rms == pytest.approx(60 / math.sqrt(8))


def test_figures_by_a_loop_over_tokens_and_only_of_real_ones():
    t, e, k = 40, 6, 3
    logits = torch.randn(t, e)
    mask = torch.rand(t) > 0.3
    keep = torch.rand(t, k) > 0.2
    poisoned = logits.masked_fill(~mask[:, None], 1e9)
    routing = routed(logits, k, keep)._replace(logits=poisoned)
    found = health_of(routing, mask)
    real = [i for i in range(t) if mask[i]]
    qs = [[math.exp(x) for x in logits[i].tolist()] for i in real]
    qs = [[x / sum(q) for x in q] for q in qs]
    mean = [sum(q[j] for q in qs) / len(real) for j in range(e)]

    def h(q):
        return -sum(x * math.log(x) for x in q) / math.log(e)

    entropies = [h(q) for q in qs]
    assert found.confidence == pytest.approx(sum(max(q) for q in qs) / len(real), rel=1e-6)
    margins = [sorted(q)[-1] - sorted(q)[-2] for q in qs]
    assert found.margin == pytest.approx(sum(margins) / len(real), rel=1e-6)
    assert found.token_entropy == pytest.approx(sum(entropies) / len(real), rel=1e-6)
    assert found.information == pytest.approx(h(mean) - sum(entropies) / len(real), rel=1e-5)
    pairs = [[0] * e for _ in range(e)]
    for i in real:
        chosen = [int(x) for x, kept in zip(routing.experts[i], keep[i], strict=True) if kept]
        for a in chosen:
            for b in chosen:
                pairs[a][b] += 1
    assert found.pairs == tuple(map(tuple, pairs))
    assert found.experts_per_token == pytest.approx(sum(pairs[a][a] for a in range(e)) / len(real))
    shares = found.co_activation
    assert shares[0][1] == pytest.approx(pairs[0][1] / pairs[0][0])
    assert shares[2][2] is None


def test_a_batch_in_parts_and_on_several_processes_is_the_whole():
    routing = routed(torch.randn(30, 5), 2)
    parts = [part(routing, start, 10) for start in (0, 10, 20)]
    whole = health_of(routing)
    ranks = [RouterHealth({0: nn.Identity()}, {0: 5}) for _ in range(2)]
    for rank, tokens in zip((0, 1, 0), parts, strict=True):
        ranks[rank].update({0: tokens}, None)
    ranks[0].merge_state(ranks[1])
    (merged,) = ranks[0].layers()
    assert merged.pairs == whole.pairs
    for key in ("confidence", "token_entropy", "margin", "logit_rms", "information"):
        assert getattr(merged, key) == pytest.approx(getattr(whole, key), rel=1e-12)


def test_a_near_tie_is_a_choice_that_bfloat16_would_change():
    logits = torch.tensor([
        [1.0, 1.001, 0.0],  # bfloat16 makes them equal, and then the first is chosen
        [1.001, 1.0, 0.0],  # equal too, but the same one is chosen
        [1.0, 1.1, 0.0],
        [3.0, 1.0, 1.001],  # not at the boundary of top 1
    ])  # fmt: skip
    assert health_of(routed(logits, 1)).near_ties == 0.25
    assert health_of(routed(logits, 2)).near_ties == 0.25  # the last one now
    elsewhere = routed(-logits, 1)._replace(logits=logits)
    assert health_of(elsewhere).near_ties is None
    most = routed(torch.arange(3).float().expand(200, 3), 1)
    most.experts[0] = 0  # one choice that the logits do not tell is left out
    assert health_of(most).near_ties == 0


def test_a_choice_is_explained_by_a_sort_that_keeps_the_order_of_equals():
    scores = torch.randint(4, (500, 5)).float()
    scores[::7, 1] = -math.inf
    choice = torch.rand(500, 5) > 0.5
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    sets = [set(row[:n].tolist()) for row, n in zip(order, choice.sum(-1), strict=True)]
    expected = [s == set(c.nonzero()[:, 0].tolist()) for s, c in zip(sets, choice, strict=True)]
    assert explains(scores, choice).tolist() == expected
    assert 50 < sum(expected) < 450


def test_many_experts_keep_the_pairs_of_those_used_most():
    n = 80
    logits = torch.zeros(n, n)
    logits[torch.arange(n), torch.arange(n)] = 1.0
    logits[:, 0] = 2.0  # top 2: the first, and one each
    logits[60:, 3] = 3.0
    found = health_of(routed(logits, 2))
    assert len(found.pair_experts) == len(found.pairs) == 64
    assert found.pair_experts[:4] == (0, 1, 2, 3)
    assert found.experts_per_token == 2
    assert found.pairs[0][3] == 21


@pytest.mark.parametrize("entry", ROUTERS, ids=lambda entry: entry.name)
def test_what_routers_say_of_themselves_is_what_they_do(entry):
    """Probabilities sum to one; the k largest of the preference are those chosen."""
    router = entry.module(entry.config(**entry.tiny)).eval()
    if getattr(router, "bias", None) is not None:
        router.bias.normal_(std=0.1)
    with torch.no_grad():
        routing, _ = route(router, 50 * torch.randn(64, entry.tiny["d_model"]), None, None, 2)
    q = probabilities(router, routing.logits)
    torch.testing.assert_close(q.sum(-1), torch.ones(64, dtype=torch.float64))
    assert (q >= 0).all()
    found = health_of(routing, router=router)
    if entry.name in ("random", "sign_hash"):
        assert found.near_ties is None
        assert found.token_entropy == pytest.approx(1)
    else:
        assert found.near_ties is not None
        assert found.near_ties < 0.2
    assert preference(router, routing.logits).shape == routing.logits.shape


def test_a_token_whose_gates_are_all_closed_is_undecided():
    router = ReMoERouter(ReMoERouterConfig(d_model=16, n_experts=4))
    q = probabilities(router, torch.tensor([[-1.0, -2.0, -1.0, -3.0], [3.0, 1.0, -1.0, 0.0]]))
    assert q.tolist() == [[0.25] * 4, [0.75, 0.25, 0.0, 0.0]]


# Hooks


@pytest.mark.parametrize("router", ["top_k", "remoe", "deepseek_v3"])
def test_watching_changes_no_bit_and_leaves_nothing(router):
    recipe = tiny_recipe(["swiglu", {**MOE, "router": {"name": router}}], "loss_weights.l1=0.0")
    model = build_model(recipe).eval()
    tokens, mask = torch.randint(256, (2, 32)), torch.ones(2, 32, dtype=torch.bool)
    mask[1, 20:] = False
    with torch.no_grad():
        before = model(tokens, mask=mask)
        with watched(model) as seen:
            during = model(tokens, mask=mask)
            assert seen.keys() == {1} == routers_of(model).keys()
            assert seen[1].logits.shape == (64, 4)
            seen.clear()
        model(tokens, mask=mask)
    assert not seen
    assert torch.equal(before.logits, during.logits)
    assert torch.equal(before.stats[1]["counts"], during.stats[1]["counts"])


@pytest.mark.slow
def test_a_compiled_model_is_seen_in_every_evaluation():
    """Eagerly, to the bit, and again after a compiled step."""
    recipe = tiny_recipe(MOE, "precision=fp32", "model.n_layers=1", *SMALL)
    data = TextData(recipe.data, 0)
    plain, model = build_model(recipe), build_model(recipe)
    model.compile(backend="eager")
    expected = evaluate(plain, data.val_dataloader(), data.domains).health.layers()
    for _ in range(2):
        model(next(iter(data.train_dataloader())).tokens)
        found = evaluate(model, data.val_dataloader(), data.domains)
        assert found.health.layers() == expected


def test_pairs_of_an_evaluation_are_its_counts():
    recipe = tiny_recipe([MOE, {"name": "moe_plus_plus", "n_experts": 4}])
    data = TextData(recipe.data, 0)
    model = build_model(recipe)
    found = evaluate(model, data.val_dataloader(), data.domains)
    layers = found.health.layers()
    assert [layer.layer for layer in layers] == [0, 1]
    for layer, load in zip(layers, found.load.loads(), strict=True):
        assert tuple(row[i] for i, row in enumerate(layer.pairs)) == load.counts
        assert layer.experts_per_token == 2
    assert model.training


def test_an_evaluation_finds_the_same_unwatched(monkeypatch):
    recipe = tiny_recipe({**MOE, "jitter": 0.1}, *SMALL)
    data = TextData(recipe.data, 0)
    model = build_model(recipe)
    state = torch.get_rng_state()
    watching = evaluate(model, data.val_dataloader(), data.domains)
    monkeypatch.setattr("recipes.metrics.watched", lambda model: nullcontext({}))
    without = evaluate(model, data.val_dataloader(), data.domains)
    assert watching.bpb.final() == without.bpb.final()
    assert watching.load.loads() == without.load.loads()
    assert watching.losses == without.losses
    assert without.health.layers() == ()
    assert without.choices.value() is None
    assert torch.equal(torch.get_rng_state(), state)
