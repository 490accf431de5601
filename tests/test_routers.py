"""Every row of the router table: what must hold of it, by its number in moe.md section 18."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from layers.dispatch import count_experts
from layers.experts import Experts, ExpertsConfig
from layers.moe import MoE, MoEConfig
from layers.moe_plus_plus import MoEPlusPlus, MoEPlusPlusConfig
from routers.deepseek_v3 import DeepSeekV3RouterConfig
from routers.longcat import LongCatRouter, LongCatRouterConfig
from routers.random import RandomRouter, RandomRouterConfig, mixed
from routers.sign_hash import SignHashRouter, SignHashRouterConfig
from routers.top_k import TopKRouter, TopKRouterConfig
from zoo.catalogue import ROUTERS

ROWS = {entry.name: entry for entry in ROUTERS}
D, T = 16, 48
NOISY = {"noisy_top_k", "vmoe", "gshard"}
TWO_RULES = {"expert_choice"}  # evaluation decides by another rule than training
SOFTMAX = {
    "top_k", "noisy_top_k", "gshard", "vmoe", "deepseek_v2", "longcat", "pathway", "factor_llm",
    "expert_choice",
}  # fmt: skip
CONTROLS = {"sign_hash", "random"}
BIASED = ["deepseek_v3", "longcat"]

every = pytest.mark.parametrize("name", ROWS)
learned = pytest.mark.parametrize("name", sorted(ROWS.keys() - CONTROLS))
biased = pytest.mark.parametrize("name", BIASED)


def make(name, dtype=torch.float64, **options):
    """A small router with weights, and a bias if it has one, that make tokens differ."""
    row = ROWS[name]
    router = row.module(row.config(**{**row.tiny, **options})).to(dtype)
    for p in router.parameters():
        torch.nn.init.normal_(p)
    if getattr(router, "bias", None) is not None:
        router.bias.normal_(std=0.2)
    return router


def tokens(n=T, dtype=torch.float64):
    return torch.randn(n, D, dtype=dtype)


def route(router, x, mask=None):
    extra = {"n_sequences": 2} if getattr(router, "reads_sequences", False) else {}
    return router(x, None, mask, **extra)


def dense(routing):
    """[T, N] weights; and which were chosen."""
    keep = torch.ones_like(routing.experts, dtype=torch.bool)
    keep = keep if routing.keep is None else routing.keep
    zeros = torch.zeros_like(routing.logits)
    weights = zeros.scatter_add(-1, routing.experts, routing.weights)
    return weights, zeros.scatter_add(-1, routing.experts, keep.to(zeros)) > 0


# All rows


@every
def test_what_a_router_returns(name):
    router, x = make(name, torch.float32), tokens(dtype=torch.float32)
    for given in (x, x.bfloat16()):
        routing = route(router, given)
        assert routing.experts.dtype == torch.int64
        assert {t.dtype for t in (routing.weights, routing.logits)} == {torch.float32}
        assert routing.experts.shape == routing.weights.shape == (T, routing.experts.shape[1])
        assert (routing.experts >= 0).all()
        assert (routing.experts < routing.logits.shape[1]).all()
        assert all(loss.ndim == 0 and loss.isfinite() for loss in routing.losses.values())
        ordered = routing.experts.sort(-1).values
        assert (ordered.diff(dim=-1) > 0).all()  # no expert twice
        if routing.keep is not None:
            assert (routing.weights[~routing.keep] == 0).all()


@every
def test_inv02_permuted_tokens_are_routed_as_before(name):
    router, x, order = make(name).eval(), tokens(), torch.randperm(T)
    got, expected = route(router, x[order]), route(router, x)
    assert torch.equal(got.experts, expected.experts[order])
    assert_close(got.weights, expected.weights[order])


@pytest.mark.parametrize("name", sorted(ROWS.keys() - CONTROLS - {"deepseek_v2", "deepseek_v3"}))
def test_inv02_permuted_experts_with_rows_and_bias_are_chosen_as_before(name):
    router, x = make(name).eval(), tokens()
    n = router.weight.shape[0]
    before, order = dense(route(router, x)), torch.randperm(n)
    with torch.no_grad():
        for each in ("weight", "bias", "logit_bias"):
            if (part := getattr(router, each, None)) is not None:
                part.copy_(part[order])
    after = dense(route(router, x))
    assert_close(after[0], before[0][:, order])
    assert torch.equal(after[1], before[1][:, order])


@every
def test_inv05_and_06_a_token_is_routed_without_its_neighbours(name):
    router, x = make(name).eval(), tokens()
    whole = route(router, x)
    for t in (0, 17, T - 1):
        with torch.no_grad():  # one token without gradients decodes
            alone = router(x[t : t + 1])
        assert alone.losses == {}
        assert torch.equal(alone.experts, whole.experts[t : t + 1])
        assert_close(alone.weights, whole.weights[t : t + 1])


@every
def test_inv08_no_tokens_forward_and_backward(name):
    for training in (True, False):
        router = make(name).train(training)
        x = tokens(0).requires_grad_()
        routing = route(router, x)
        assert routing.weights.shape[0] == 0
        total = routing.weights.sum() + sum(routing.losses.values())
        assert total == 0
        if name not in CONTROLS:
            total.backward()
            assert torch.equal(router.weight.grad, torch.zeros_like(router.weight))


@every
def test_inv09_masked_tokens_change_no_loss(name):
    router = make(name, **{"noise": 0.01} if name == "vmoe" else {}).eval()
    x, mask = tokens(), torch.rand(T) > 0.4
    junk = x.masked_fill(~mask[:, None], 7.0)
    got, expected = route(router, x, mask), route(router, junk, mask)
    assert got.losses.keys() == expected.losses.keys()
    for loss, value in got.losses.items():
        assert_close(value, expected.losses[loss])
        if not getattr(router, "reads_sequences", False):
            assert_close(value, route(router, x[mask]).losses[loss])
    assert_close(got.weights[mask], expected.weights[mask])
    nothing = route(router, x, torch.zeros(T, dtype=torch.bool))
    assert all(value == 0 for value in nothing.losses.values())


@pytest.mark.parametrize("name", ["noisy_top_k", "vmoe"])
def test_inv09_masked_tokens_change_no_load_under_noise(name):
    router, x, mask = make(name), tokens(), torch.rand(T) > 0.4
    found = []
    for junk in (0.0, 7.0):
        torch.manual_seed(1)
        found.append(route(router, x.masked_fill(~mask[:, None], junk), mask).losses)
    assert found[0].keys() == {"importance", "load"}
    assert_close(found[0], found[1])
    assert not torch.equal(route(router, x).losses["load"], found[0]["load"])


@every
def test_inv10_evaluation_repeats_itself_and_is_training_without_noise(name):
    router, x = make(name), tokens()
    evaluated = route(router.eval(), x)
    state = torch.get_rng_state()
    again = route(router, x)
    assert torch.equal(state, torch.get_rng_state())  # nothing drawn
    assert torch.equal(evaluated.experts, again.experts)
    assert torch.equal(evaluated.weights, again.weights)
    trained = route(router.train(), x)
    differs = name in NOISY | TWO_RULES
    assert differs != torch.equal(trained.weights, evaluated.weights)
    assert torch.equal(state, torch.get_rng_state()) != (name in NOISY)


@learned
def test_inv12_a_constant_on_all_logits_moves_nothing_of_a_softmax_router_alone(name):
    router = make(name).eval()
    x = torch.cat([tokens()[:, 1:], torch.ones(T, 1, dtype=torch.float64)], dim=-1)
    before = route(router, x)
    with torch.no_grad():
        router.weight[:, -1] += 0.9
    after = route(router, x)
    assert not torch.allclose(after.logits, before.logits)
    if name in SOFTMAX:
        assert torch.equal(after.experts, before.experts)
        assert_close(after.weights, before.weights)
    else:
        assert not torch.allclose(dense(after)[0], dense(before)[0])


@every
def test_inv13_a_bias_is_never_differentiated_and_weights_do_not_contain_it(name):
    router = make(name)
    buffers = dict(router.named_buffers())
    assert not any(b.requires_grad for b in buffers.values())
    assert ("bias" in buffers) == (name in BIASED)
    assert "bias" not in dict(router.named_parameters())


@biased
def test_inv13_a_constant_on_all_biases_changes_nothing(name):
    router, x = make(name), tokens()
    before = route(router, x)
    router.bias += 0.7
    after = route(router, x)
    assert torch.equal(dense(before)[1], dense(after)[1])
    assert_close(dense(before)[0], dense(after)[0])
    assert_close(before.losses, after.losses)


@biased
def test_inv13_a_large_bias_is_in_every_choice_and_in_no_weight(name):
    router, x = make(name, **{} if name == "longcat" else {"renormalize": False}), tokens()
    router.bias[1] = 50.0
    routing = route(router, x)
    assert (routing.experts[:, 0] == 1).all()
    score = routing.logits.softmax(-1) if name == "longcat" else routing.logits.sigmoid()
    assert_close(routing.weights, score.gather(-1, routing.experts))


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize(("n_groups", "top_groups"), [(4, 1), (4, 3), (2, 1)])
def test_inv14_experts_lie_in_the_kept_groups(name, n_groups, top_groups):
    router = make(name, n_groups=n_groups, top_groups=top_groups)
    if name == "deepseek_v3":
        router.bias -= 2.0  # choice scores below 0, where filling with 0 would go wrong
    groups = route(router, tokens()).experts // (8 // n_groups)
    assert max(len(set(row)) for row in groups.tolist()) <= top_groups


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_inv14_all_groups_are_no_limit(name):
    x, found = tokens(), []
    router = make(name, n_groups=1, top_groups=1)
    for n in (1, 4):
        other = make(name, n_groups=n, top_groups=n)
        other.load_state_dict(router.state_dict())
        found.append(route(other, x))
    assert torch.equal(found[0].experts, found[1].experts)
    limited = make(name, n_groups=4, top_groups=1)
    limited.load_state_dict(router.state_dict())
    assert not torch.equal(found[0].experts, route(limited, x).experts)


@pytest.mark.parametrize("name", ["top_k", "noisy_top_k", "deepseek_v3"])
def test_inv15_one_renormalised_choice_is_refused(name):
    config = ROWS[name].config
    with pytest.raises(ValueError, match=r"top_k=1 with .* makes every weight 1"):
        config(d_model=D, top_k=1)
    config(d_model=D, top_k=1, n_experts=1)  # one expert has no choice to learn


# Ties, casts, costs


@pytest.mark.parametrize("name", sorted(ROWS.keys() - CONTROLS - {"remoe"}))
@pytest.mark.parametrize("n_tokens", [4, 4096])
def test_of_equal_logits_the_lower_index(name, n_tokens):
    router = make(name).eval()
    with torch.no_grad():
        for part in router.parameters():
            part.zero_()
    if name in BIASED:
        router.bias.zero_()
    k = route(router, tokens(2)).experts.shape[1]
    assert route(router, tokens(n_tokens)).experts.tolist() == [list(range(k))] * n_tokens


@pytest.mark.parametrize("name", [*BIASED, "remoe"])
def test_state_stays_float32_saved_and_undecayed_through_casts(name):
    router = make(name, torch.float32)
    state = router.strength if name == "remoe" else router.bias
    kept = state.clone()
    for cast in (torch.bfloat16, torch.float64, torch.float16):
        router.to(cast)
        (now,) = [b for n, b in router.named_buffers() if n in ("bias", "strength")]
        assert now.dtype == torch.float32
        assert torch.equal(now, kept)
        assert router.weight.dtype == cast
    assert {"bias", "strength"} & router.state_dict().keys()
    holder = torch.nn.ModuleList([router]).bfloat16()
    assert all(b.dtype == torch.float32 for n, b in holder.named_buffers())


@every
def test_cost_names_every_parameter_and_counts_every_product(name):
    router = make(name, torch.float32)
    cost = router.config.cost()
    counted = {item.name: item.params for item in cost if item.params}
    assert counted == {n: p.numel() for n, p in router.named_parameters()}
    assert {item.role for item in cost} == {"router"}
    with FlopCounterMode(display=False) as counter:
        route(router, tokens(dtype=torch.float32))
    assert counter.get_total_flops() == cost.flops * T


@every
def test_compiles_as_one_graph(name):
    torch.compiler.reset()
    router, x, mask = make(name).eval(), tokens(), torch.rand(T) > 0.3
    extra = {"n_sequences": 2} if getattr(router, "reads_sequences", False) else {}
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x, None, mask, **extra), route(router, x, mask)
    assert torch.equal(got.experts, expected.experts)
    assert_close(got.losses, expected.losses)


@every
def test_presets_and_a_round_trip(name):
    row = ROWS[name]
    for options in ({}, *row.presets.values()):
        sizes = {"d_model": D, "n_experts": 16} | ({} if name == "gshard" else {"top_k": 4})
        router = row.module(row.config(**sizes | options))
        other = row.module(row.config(**sizes | options))
        missing = other.load_state_dict(router.state_dict())
        assert not missing.missing_keys
        routing = [route(r.eval(), tokens(dtype=torch.float32).fill_(0.5)) for r in (router, other)]
        assert torch.equal(routing[0].weights, routing[1].weights)


# Rules of one router


def test_the_named_rules_of_softmax_over_the_chosen_are_one():
    presets = ROWS["top_k"].presets
    weight, x = torch.randn(8, D, dtype=torch.float64), tokens()
    found = []
    for preset in ("mixtral", "granite", "gpt_oss", "qwen3"):
        router = TopKRouter(TopKRouterConfig(d_model=D, **presets[preset])).double()
        with torch.no_grad():
            router.weight.copy_(weight)
        found.append(router(x))
    p = found[0].logits.softmax(-1).gather(-1, found[0].experts)
    for routing in found:
        assert_close(routing.weights, p / p.sum(-1, keepdim=True))
    olmoe = TopKRouter(TopKRouterConfig(d_model=D, **presets["olmoe"])).double()
    olmoe.load_state_dict({"weight": weight})
    assert_close(olmoe(x).weights, p)


def test_scaled_weights_are_truncated_with_variance_a_tenth_of_one_over_d():
    router = TopKRouter(TopKRouterConfig(d_model=400, n_experts=256, init="scaled"))
    std = (0.1 / 400) ** 0.5
    assert router.weight.abs().max() <= 2 * std
    assert 0.8 * std < router.weight.std() < 0.95 * std  # of a normal cut at two deviations: 0.88


def test_gshard_keeps_the_second_expert_as_often_as_its_weight_says():
    router = make("gshard")
    x = tokens(1).expand(4000, D)
    share = router.eval()(x).weights[0, 1].item()
    routing = router.train()(x)
    assert routing.keep[:, 0].all()
    assert abs(routing.keep[:, 1].double().mean().item() - min(1, 2 * share)) < 0.03
    assert_close(routing.weights[:, 0], torch.full((4000,), 1 - share, dtype=torch.float64))
    assert make("gshard", second="always").train()(x).keep is None


def test_gshard_counts_first_choices_alone():
    router, x = make("gshard").eval(), tokens()
    routing = router(x)
    f = routing.experts[:, 0].bincount(minlength=4) / T
    assert_close(routing.losses["balance"], 4 * (f * routing.logits.softmax(-1).mean(0)).sum())


def test_noisy_top_k_starts_even():
    row = ROWS["noisy_top_k"]
    router = row.module(row.config(d_model=D, n_experts=8))
    counts = count_experts(router(torch.randn(4000, D)).experts, 8)
    assert (counts / 1000 - 1).abs().max() < 0.15
    all_chosen = make("noisy_top_k", top_k=4)(tokens())
    assert all_chosen.losses.keys() == {"importance"}  # nothing is left to win


@pytest.mark.parametrize("name", ["noisy_top_k", "vmoe"])
def test_load_has_gradients_that_even_it_out(name):
    router, x = make(name), tokens(512) + 1
    with torch.no_grad():
        router.weight.mul_(0.1)[0] += 0.3
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = sum(router(x).losses.values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_llama4_says_that_its_weights_are_for_inputs():
    assert make("llama4").weights_input
    assert not any(getattr(make(name), "weights_input", False) for name in ROWS.keys() - {"llama4"})


def test_remoe_through_the_experts_is_the_sum_over_gates_above_zero():
    router, x = make("remoe"), tokens()
    experts = Experts(ExpertsConfig(d_model=D, d_expert=12, n_experts=4)).double()
    up, down = experts.gate_up, experts.down
    routing = router(x)
    y = experts(x, routing.experts, routing.weights, routing.keep)
    expected = torch.zeros_like(x)
    for t in range(T):
        for e in range(4):
            if (gate := router.weight[e] @ x[t]) > 0:
                h = up.weight[e] @ x[t]
                h = torch.nn.functional.silu(h[:12]) * h[12:]
                expected[t] = expected[t] + gate * (down.weight[e] @ h)
    assert_close(y, expected)
    inputs = (router.weight, up.weight)
    probe = torch.randn_like(x)
    assert_close(
        torch.autograd.grad(y, inputs, probe), torch.autograd.grad(expected, inputs, probe)
    )


def test_inv21_the_regulariser_sends_no_gradient_through_a_closed_gate():
    router, x = make("remoe", penalty=1.0), tokens(1).requires_grad_()
    routing = router(x)
    routing.losses["l1"].backward()
    closed = ~routing.keep[0]
    assert closed.any()
    assert (router.weight.grad[closed] == 0).all()
    assert (router.weight.grad[~closed] != 0).any()


def test_longcat_with_copies_of_moe_plus_plus_adds_the_input():
    sizes = {"d_model": D, "n_experts": 4, "n_constant": 0, "n_copy": 3, "n_zero": 0}
    router = LongCatRouter(LongCatRouterConfig(**sizes, scale=6.0))
    config = MoEPlusPlusConfig(**sizes, capacity_factor=None, d_expert=8)
    layer = MoEPlusPlus(config, router)
    router.bias[4:] = 10.0  # identities alone
    x = torch.randn(1, 5, D)
    p = router(x[0]).weights.sum(-1)
    assert_close(layer(x).y[0], p[:, None] * x[0])


@pytest.mark.parametrize("n_experts", [3, 8, 64])
def test_sign_hash_uses_every_expert_alike_and_sends_neighbours_together(n_experts):
    router = SignHashRouter(SignHashRouterConfig(d_model=64, n_experts=n_experts, top_k=2))
    table = torch.stack([router.table[:, k].bincount(minlength=n_experts) for k in (0, 1)])
    assert (table[0] - 1024 / n_experts).abs().max() < 1
    x = torch.randn(2000, 64)
    counts = count_experts(router(x).experts, n_experts)
    assert counts.min() > 0.4 * 4000 / n_experts
    near = router(x + 1e-3 * torch.randn_like(x)).experts
    assert (near == router(x).experts).all(-1).float().mean() > 0.95
    again = SignHashRouter(SignHashRouterConfig(d_model=64, n_experts=n_experts, top_k=2))
    assert torch.equal(again(x).experts, router(x).experts)  # no run has planes of its own
    other = SignHashRouterConfig(d_model=64, n_experts=n_experts, top_k=2, hash_seed=1)
    assert not torch.equal(SignHashRouter(other)(x).experts, router(x).experts)


def test_random_is_even_over_experts_and_pairs_whatever_the_tokens():
    router = RandomRouter(RandomRouterConfig(d_model=D, n_experts=4, top_k=2))
    x = torch.randn(D) + 1e-6 * torch.randn(12000, D)  # alike but for their last bits
    experts = router(x).experts
    pairs = (4 * experts[:, 0] + experts[:, 1]).bincount(minlength=16)
    assert (pairs > 0).sum() == 12
    assert (pairs[pairs > 0] / 1000 - 1).abs().max() < 0.15
    assert torch.equal(router(-torch.zeros(3, D)).experts, router(torch.zeros(3, D)).experts)


def test_the_mixer_is_splitmix64s():
    """Its published first outputs for seed 0: of the state after one and two golden steps."""
    golden = 0x9E3779B97F4A7C15
    states = torch.tensor([golden - 2**64, (2 * golden) % 2**64])
    got = [v % 2**64 for v in mixed(states).tolist()]
    assert got == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


# At the door


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("top_k", {"init": "scale"}, "unknown init 'scale'. Did you mean 'scaled'"),
        ("top_k", {"balance_scope": "global"}, "unknown balance_scope 'global'"),
        ("noisy_top_k", {"top_k": 9}, "top_k must be at most n_experts=8, got 9"),
        ("gshard", {"top_k": 3}, "gshard routes to 2 experts, got top_k=3"),
        ("gshard", {"second": "randomly"}, "unknown second 'randomly'. Did you mean 'random'"),
        ("vmoe", {"noise": 0.0}, "noise must be positive, got 0.0"),
        ("deepseek_v2", {"n_groups": 3}, "n_experts=8 do not split into n_groups=3"),
        ("deepseek_v2", {"top_groups": 2}, "top_groups must be at most n_groups=1, got 2"),
        ("deepseek_v2", {"n_groups": 8}, "top_k must be at most the 1 experts of top_groups=1"),
        ("deepseek_v3", {"n_groups": 8, "top_groups": 2}, "a group needs at least 2 experts"),
        ("deepseek_v3", {"balance_scope": "global_batch"}, "Known: micro_batch, sequence"),
        ("deepseek_v3", {"bias_rule": "step"}, "unknown bias_rule 'step'"),
        ("deepseek_v3", {"bias_step": -1.0}, "bias_step must not be negative"),
        ("longcat", {"bias_until": 2.0}, r"bias_until must be in \[0, 1\]"),
        ("longcat", {"ffn_per_token": 1.5}, "needs experts without an FFN"),
        ("longcat", {"ffn_per_token": 3.0, "n_copy": 2}, r"must be in \(0, 2\]"),
        ("longcat", {"top_k": 9}, "at most the 8 experts of all kinds, got 9"),
        ("remoe", {"penalty": 0.0}, "penalty must be positive"),
        ("remoe", {"penalty_factor": 0.5}, "penalty_factor must be at least 1"),
        ("random", {"d_model": 0}, "d_model must be positive"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        ROWS[name].config(**{"d_model": D} | options)
    assert "\n" not in str(error.value)


def test_a_sequence_loss_without_sequences_is_refused():
    with pytest.raises(ValueError, match="hand the router n_sequences"):
        make("deepseek_v3")(tokens())
    with pytest.raises(ValueError, match="48 tokens are not 5 equal sequences"):
        make("deepseek_v3")(tokens(), None, None, n_sequences=5)


def test_a_biased_router_stands_in_a_layer():
    config = DeepSeekV3RouterConfig(d_model=D, balance_scope="micro_batch")
    layer = MoE(MoEConfig(d_model=D, d_expert=8), ROWS["deepseek_v3"].module(config))
    out = layer(torch.randn(2, 8, D))
    (out.y.square().mean() + sum(out.losses.values())).backward()
    assert all(p.grad is not None for p in layer.parameters())
