"""Capacity: who stays is what a loop in Python says, and what is dropped adds nothing."""

import math

import pytest
import torch
from torch.testing import assert_close

import zoo
from layers.capacity import POOLS, PRIORITIES, Capacity, within_capacity
from layers.moe import MoE, MoEConfig
from layers.moe_plus_plus import MoEPlusPlus, MoEPlusPlusConfig
from routers.llama4 import Llama4Router, Llama4RouterConfig
from routers.pathway import PathwayRouter, PathwayRouterConfig
from routers.top_k import TopKRouter, TopKRouterConfig

B, S, D, E, K = 3, 14, 16, 4, 2
every_priority = pytest.mark.parametrize("priority", PRIORITIES)
every_pool = pytest.mark.parametrize("pool", POOLS)


def moe(router=None, factor=0.7, **options):
    torch.manual_seed(0)
    options = {"n_experts": E, "top_k": K, "capacity_factor": factor, **options}
    config = MoEConfig(d_model=D, d_expert=24, **options)
    if router is None:
        router = TopKRouter(TopKRouterConfig(d_model=D, n_experts=E, top_k=K))
    return MoE(config, router)


def plus(factor=0.7, **options):
    torch.manual_seed(0)
    config = MoEPlusPlusConfig(
        d_model=D, d_expert=24, n_experts=E, capacity_factor=factor, **options
    )
    return MoEPlusPlus(config, PathwayRouter(PathwayRouterConfig(d_model=D, n_experts=E)))


LAYERS = {"moe": moe, "moe_plus_plus": plus}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def by_loop(experts, slots, mask, chosen, priority, weights, n_pools):
    """The rule, in Python: walk through assignments, the first to come take the slots."""
    t, k = experts.shape
    size, kept = t // n_pools, torch.zeros(t, k, dtype=torch.bool)
    for pool in range(n_pools):
        tokens = [i for i in range(pool * size, (pool + 1) * size) if mask[i]]
        left = [math.ceil(s * len(tokens) - 1e-9) if s < math.inf else math.inf for s in slots]
        pairs = [(i, j) for i in tokens for j in range(k) if chosen[i, j]]
        keys = {
            "position": lambda i, j: (i, j),
            "choice": lambda i, j: (j, i),
            "batch": lambda i, j: (j, -weights[i].max().item(), i),
            "weight": lambda i, j: (-weights[i, j].item(), i, j),
        }
        for i, j in sorted(pairs, key=lambda pair: keys[priority](*pair)):
            e = int(experts[i, j])
            if left[e] > 0:
                left[e] -= 1
                kept[i, j] = True
    return kept


@every_priority
@every_pool
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_who_stays_is_what_a_loop_says(priority, pool, share):
    experts = torch.stack([torch.randperm(E)[:K] for _ in range(B * S)])
    mask, chosen = torch.rand(B * S) < share, torch.rand(B * S, K) < share
    weights = (torch.rand(B * S, K) * 8).round() / 8  # ties too
    slots = [0.3, 0.11, math.inf, 0.5]
    n_pools = B if pool == "sequence" else 1
    kept = within_capacity(
        experts, torch.tensor(slots, dtype=torch.float64), mask, chosen=chosen, priority=priority,
        weights=weights, n_pools=n_pools,
    )  # fmt: skip
    expected = by_loop(experts, slots, mask, chosen, priority, weights, n_pools)
    assert torch.equal(kept, expected)
    assert 0 < kept.sum() < (chosen & mask[:, None]).sum()
    if share == 1.0:
        plain = within_capacity(
            experts, torch.tensor(slots, dtype=torch.float64), priority=priority, weights=weights,
            n_pools=n_pools,
        )  # fmt: skip
        assert torch.equal(plain, expected)


def test_the_convention_is_the_factor_times_t_k_over_e_rounded_up():
    for factor in (0.5, 1.0, 1.25, 2.0):
        capacity = moe(factor=factor).config.capacity(training=True)
        assert isinstance(capacity, Capacity)
        for t in (1, 13, 64):
            assert capacity.most_rows(E, t, 1) == math.ceil(factor * t * K / E)
    by_sequence = moe(capacity_pool="sequence", factor=1.25).config.capacity(True)
    assert by_sequence.most_rows(E, B * S, B) == B * math.ceil(1.25 * S * K / E)


@every_layer
@every_priority
@every_pool
@pytest.mark.parametrize("backend", ["auto", "capacity"])
def test_invariant_7_counts_stay_within_capacity_and_add_up(make, priority, pool, backend):
    layer = make(
        capacity_pool=pool, priority=priority, backend=backend, eval_capacity_factor=0.5
    )  # fmt: skip
    x, mask = torch.randn(B, S, D), torch.rand(B, S) < 0.8
    for training in (True, False):
        layer.train(training)
        capacity = layer.config.capacity(training)
        most = [capacity.most_rows(e + 1, B * S, B) for e in range(E)]
        for real in (None, mask):
            stats = layer(x, mask=real).stats
            n = B * S if real is None else int(mask.sum())
            assert (stats["counts"][:E] <= torch.tensor(most)).all()
            assert stats["dropped"] > 0
            assert stats["counts"].sum() + stats["dropped"] == n * K


@every_priority
@pytest.mark.parametrize("backend", ["auto", "batched", "capacity", "grouped", "loop"])
def test_survivors_keep_their_weights_and_the_dropped_add_nothing(priority, backend):
    layer = moe(priority=priority, backend=backend, eval_capacity_factor=1.0)
    x = torch.randn(B, S, D, requires_grad=True)
    routing = layer.router(x.flatten(0, 1))
    slots = layer.config.capacity(True).slots
    everything = torch.ones(B * S, K, dtype=torch.bool)
    keep = by_loop(
        routing.experts, slots, everything[:, 0], everything, priority, routing.weights, 1
    )  # fmt: skip
    gate_up, down = (p.double() for p in layer.experts.parameters())
    rows = []
    for t, token in enumerate(x.flatten(0, 1).double()):
        y = torch.zeros(D, dtype=torch.float64)
        for k, e in enumerate(routing.experts[t].tolist()):
            gate, up = (gate_up[e] @ token).chunk(2)
            y = y + keep[t, k] * routing.weights[t, k].double() * (
                down[e] @ (torch.nn.functional.silu(gate) * up)
            )
        rows.append(y)
    expected = torch.stack(rows).view(B, S, D)
    out = layer(x)
    assert_close(out.y.double(), expected, rtol=1e-5, atol=1e-5)
    assert out.stats["dropped"] == (~keep).sum()
    probe, wrt = torch.randn(B, S, D), (x, *layer.parameters())
    assert_close(
        torch.autograd.grad(out.y, wrt, probe),
        torch.autograd.grad(expected, wrt, probe.double()),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


@every_layer
def test_each_mode_has_its_own_factor_and_a_single_token_keeps_its_choices(make):
    layer, x = make(factor=0.5), torch.randn(B, S, D)
    assert layer(x).stats["dropped"] > 0
    assert layer.eval()(x).stats["dropped"] == 0
    assert layer.config.tokenwise
    both = make(factor=None, eval_capacity_factor=0.5)
    assert both(x).stats["dropped"] == 0
    assert both.eval()(x).stats["dropped"] > 0
    assert not both.config.tokenwise
    with torch.no_grad():
        one = both(x[:1, :1]).y
        assert_close(one, make(factor=None).eval()(x[:1, :1]).y)
        assert one.any()


@every_layer
@pytest.mark.parametrize("backend", ["auto", "capacity"])
@every_priority
def test_invariant_9_padding_takes_no_slot(make, backend, priority):
    layer = make(backend=backend, priority=priority, eval_capacity_factor=1.0)
    x, mask = torch.randn(1, S, D), torch.rand(1, S) < 0.6
    dirty = x.masked_fill(~mask[..., None], torch.nan)
    masked, alone = layer(dirty, mask=mask), layer(x[mask][None])
    assert_close(masked.y[mask][None], alone.y)
    assert not masked.y[~mask].any()
    for name in alone.stats:
        assert torch.equal(masked.stats[name], alone.stats[name])
    assert alone.stats["dropped"] > 0


@every_layer
@every_pool
def test_a_pool_of_sequences_leaves_each_to_itself(make, pool):
    layer, x = make(capacity_pool=pool), torch.randn(B, S, D)
    apart = torch.cat([layer(x[i : i + 1]).y for i in range(B)])
    same = torch.allclose(layer(x).y, apart, atol=1e-6)
    assert same == (pool == "sequence")


@every_layer
@every_priority
@every_pool
def test_invariant_6_only_position_order_is_causal(make, priority, pool):
    layer = make(priority=priority, capacity_pool=pool)
    moved = False
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(1, 40, D)
        before, changed = layer(x), x.clone()
        assert before.stats["dropped"] > 0
        changed[:, 25:] = torch.randn(1, 15, D)
        moved |= not torch.allclose(layer(changed).y[:, :25], before.y[:, :25], atol=1e-6)
    assert layer.config.causal == (not moved)
    assert layer.config.causal == (priority == "position")
    assert make(priority=priority, factor=None).config.causal


@pytest.mark.parametrize("name", ["moe", "moe_plus_plus"])
def test_a_language_model_refuses_an_order_that_looks_ahead(name):
    ffn = {"name": name, "n_experts": E, "capacity_factor": 1.0, "priority": "batch"}
    config = {"vocab_size": 32, "d_model": D, "n_layers": 1, "n_heads": 2, "ffn": ffn}
    with pytest.raises(ValueError, match="read later ones in training"):
        zoo.ModelConfig(**config).layers()
    zoo.ModelConfig(**config, allow_noncausal=True).layers()
    zoo.ModelConfig(**{**config, "ffn": {**ffn, "priority": "position"}}).layers()


def test_published_mixtures_have_the_capacity_of_their_papers():
    def settled(name, preset=None):
        choice = zoo.resolve(name, d_model=D, preset=preset)
        c = choice.config
        return c.capacity_factor, c.eval_capacity_factor, c.priority, choice.causal

    assert settled("switch") == (1.25, 2.0, "position", True)
    assert settled("switch", "dropless") == (None, None, "position", True)
    assert settled("vmoe") == (None, None, "position", True)
    assert settled("vmoe", "batch_priority") == (1.05, 1.05, "batch", False)
    assert settled("gshard_moe", "capacity") == (1.0, None, "choice", False)


def test_weights_of_the_input_are_kept_too():
    router = Llama4Router(Llama4RouterConfig(d_model=D, n_experts=E, top_k=K))
    layer = moe(router=router, priority="weight")
    x = torch.randn(B, S, D)
    out, free = layer(x), moe(router=router, factor=None)
    assert out.stats["dropped"] > 0
    routing = router(x.flatten(0, 1))
    slots = torch.tensor(layer.config.capacity(True).slots, dtype=torch.float64)
    keep = within_capacity(routing.experts, slots, priority="weight", weights=routing.weights)
    whole = keep.all(-1).view(B, S)
    assert_close(out.y[whole], free(x).y[whole])
    assert not out.y[(~keep.any(-1)).view(B, S)].any()


def test_more_slots_than_assignments_drop_nothing():
    x = torch.randn(B, S, D)
    for backend in ("auto", "capacity"):
        layer = moe(factor=E / K, backend=backend, eval_capacity_factor=E / K)
        out = layer(x)
        assert out.stats["dropped"] == 0
        assert_close(out.y, moe(factor=None)(x).y)


@every_layer
def test_refusals(make):
    with pytest.raises(ValueError, match=r"unknown priority 'positon'.*Did you mean 'position'"):
        make(priority="positon")
    with pytest.raises(ValueError, match="unknown capacity_pool 'batch'"):
        make(capacity_pool="batch")
    for name in ("factor", "eval_capacity_factor"):
        with pytest.raises(ValueError, match="capacity_factor must be positive, got 0"):
            make(**{name: 0.0})
    with pytest.raises(ValueError, match="in training and in evaluation: set capacity_factor"):
        make(factor=None, backend="capacity", eval_capacity_factor=1.0)
