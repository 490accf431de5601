"""What must hold for mixtures of experts whatever their weights (moe.md 18)."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from layers.base import Routing
from layers.capacity import within_capacity
from layers.dispatch import combine, dispatch, make_plan, row_weights
from layers.grouped import grouped_linear, grouped_wgrad
from layers.moe import MoE, MoEConfig
from layers.moe_plus_plus import PRESETS, MoEPlusPlus, MoEPlusPlusConfig
from layers.swiglu import SwiGLU
from routers.pathway import PathwayRouter, PathwayRouterConfig
from routers.top_k import TopKRouter, TopKRouterConfig

D = 16


def moe(d_model=D, n_shared=0, renormalize=True, **options):
    router = TopKRouterConfig(d_model=d_model, renormalize=renormalize, **options)
    return MoE(MoEConfig(d_model=d_model, n_shared=n_shared, **options), TopKRouter(router))


def plus(n_carry=None, weights="paper", logit_norm=None, capacity_factor=None, **options):
    router = PathwayRouterConfig(
        d_model=D, n_carry=n_carry, weights=weights, logit_norm=logit_norm, **options
    )
    config = MoEPlusPlusConfig(d_model=D, capacity_factor=capacity_factor, **options)
    return MoEPlusPlus(config, PathwayRouter(router))


VARIANTS = {
    "moe": moe,
    "shared": lambda: moe(n_shared=1),
    "many": lambda: moe(n_experts=40, top_k=3),
    "plus": plus,
    "released": lambda: plus(weights="released", logit_norm=1.0),
    "plus carry": lambda: plus(n_carry=5),
}
every = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)


def inputs(layer, b=2, s=24):
    """(x, carry) that a layer takes."""
    x = torch.randn(b, s, D, requires_grad=True)
    n_carry = getattr(layer.router.config, "n_carry", None)
    return x, torch.randn(b, s, n_carry) if n_carry else None


class Forced(torch.nn.Module):
    """A router that sends every token to the same experts with the same weights."""

    def __init__(self, n_routes, experts, weights):
        super().__init__()
        self.n_routes, self.experts, self.weights = n_routes, experts, weights

    def forward(self, x, carry=None, mask=None):
        t = x.shape[0]
        return Routing(
            torch.tensor(self.experts).expand(t, -1), torch.tensor(self.weights).expand(t, -1),
            x.new_zeros(t, self.n_routes), {},
        )  # fmt: skip


# The plan


@pytest.mark.parametrize("share", [None, 0.6, 0.0])
def test_dispatch_and_combine_follow_the_plan_and_are_each_others_gradient(share):
    experts = torch.stack([torch.randperm(5)[:3] for _ in range(11)])
    keep = None if share is None else torch.rand(11, 3) < share
    x = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(11, 3, dtype=torch.float64, requires_grad=True)
    plan = make_plan(experts, 5, keep)
    flags = torch.ones(11, 3, dtype=torch.bool) if keep is None else keep
    rows = [(e, t, k) for e in range(5) for t in range(11) for k in range(3)
            if experts[t, k] == e and flags[t, k]]  # fmt: skip
    assert plan.order.tolist() == [t * 3 + k for _, t, k in rows]
    assert plan.counts.tolist() == [sum(r[0] == e for r in rows) for e in range(5)]
    assert_close(dispatch(x, plan), x[[t for _, t, _ in rows]])

    def there_and_back(x, weights):
        return combine(dispatch(x, plan) * row_weights(weights, plan), plan)

    assert_close(there_and_back(x, weights), x * (weights * flags).sum(-1, keepdim=True))
    assert torch.autograd.gradcheck(there_and_back, (x, weights))


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 0], [0, 7, 0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_grouped_linear_is_a_linear_for_each_segment(dtype, counts):
    x = torch.randn(sum(counts), 5, dtype=dtype, requires_grad=True)
    w = torch.randn(3, 6, 5, dtype=dtype, requires_grad=True)
    y = grouped_linear(x, w, torch.tensor(counts))
    expected = torch.cat([part @ m.T for part, m in zip(x.split(counts), w, strict=True)])
    assert_close(y, expected)
    # a sum's gradient has stride 0
    assert_close(torch.autograd.grad(y.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w)))
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda *t: grouped_linear(*t, torch.tensor(counts)), (x, w))


def test_grouped_backends_agree_and_an_unknown_one_is_refused():
    x, w = torch.randn(7, 8, requires_grad=True), torch.randn(3, 16, 8, requires_grad=True)
    counts, probe = torch.tensor([3, 0, 4]), torch.randn(7, 16)
    found = []
    for backend in ("loop", "grouped"):
        y = grouped_linear(x, w, counts, backend)
        found.append((y, *torch.autograd.grad(y, (x, w), probe)))
    assert_close(*found)
    with pytest.raises(ValueError, match="unknown grouped matmul backend 'lop'"):
        grouped_linear(x, w, counts, "lop")


def test_rows_in_bf16_against_master_weights_in_float32():
    x = torch.randn(7, 8).bfloat16().requires_grad_()
    w, counts = torch.randn(3, 16, 8, requires_grad=True), torch.tensor([3, 0, 4])
    y = grouped_linear(x, w, counts)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    low = w.detach().bfloat16()
    assert torch.equal(y, grouped_linear(x, low, counts))
    assert torch.equal(w.grad, grouped_wgrad(torch.ones(7, 16).bfloat16(), x, counts).float())


# The layers


@every
def test_a_token_does_not_see_its_neighbours(make):
    layer = make()
    x, carry = inputs(layer)
    order = torch.randperm(24)
    shuffled = layer(x[:, order], None if carry is None else carry[:, order]).y
    assert_close(shuffled, layer(x, carry).y[:, order])
    alone = layer(x[:1, :1], None if carry is None else carry[:1, :1]).y
    assert_close(alone, layer(x, carry).y[:1, :1])


@every
def test_same_input_same_bits_in_training_and_evaluation(make):
    layer = make()
    x, carry = inputs(layer)
    first = layer(x, carry)
    assert torch.equal(first.y, layer(x, carry).y)
    assert torch.equal(first.y, layer.eval()(x, carry).y)
    with torch.no_grad():
        assert torch.equal(first.y, layer(x, carry).y)


@every
def test_decoding_gives_the_tokens_of_the_whole(make):
    layer = make()
    x, carry = inputs(layer, b=1)
    with torch.no_grad():
        out = layer(x, carry)
        steps = [
            layer(x[:, t : t + 1], None if carry is None else carry[:, t : t + 1])
            for t in range(24)
        ]
    assert_close(torch.cat([step.y for step in steps], dim=1), out.y)
    assert_close(torch.cat([step.carry for step in steps], dim=1), out.carry)
    assert all(step.losses == {} and step.stats is None for step in steps)


@every
@pytest.mark.parametrize("decode", [False, True])
def test_masked_tokens_touch_nothing(make, decode):
    layer = make()
    x, carry = inputs(layer)
    mask = torch.rand(2, 24) > 0.4
    dirty = x.detach().masked_fill(~mask[..., None], torch.nan).requires_grad_()
    out = layer(dirty, carry, mask)
    real = layer(x[mask][None], None if carry is None else carry[mask][None])
    assert_close(out.y[mask][None], real.y)
    assert torch.equal(out.y[~mask], torch.zeros_like(out.y[~mask]))
    for name in real.losses:
        assert_close(out.losses[name], real.losses[name])
    for name in real.stats:
        assert torch.equal(out.stats[name], real.stats[name])
    (out.y.square().sum() + sum(out.losses.values())).backward()
    assert dirty.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    if decode:
        with torch.no_grad():
            step = dirty[:1, :1], None if carry is None else carry[:1, :1]
            assert (layer(*step, torch.zeros(1, 1, dtype=torch.bool)).y == 0).all()


@every
def test_no_tokens_and_idle_experts_have_gradients_of_zero(make):
    layer = make()
    for s in (0, 1):
        layer.zero_grad()
        x, carry = inputs(layer, b=1, s=s)
        out = layer(x, carry)
        assert out.y.shape == x.shape
        (out.y.sum() + sum(out.losses.values())).backward()
        busy = out.stats["counts"][: layer.config.n_experts] > 0
        for weight in (layer.experts.gate_up.weight, layer.experts.down.weight):
            assert torch.equal(weight.grad[~busy], torch.zeros_like(weight.grad[~busy]))
            assert (weight.grad[busy].flatten(1).abs().sum(1) > 0).all()
        assert all(p.grad is not None for p in layer.parameters())


@every
def test_counts_add_up_and_every_expert_learns(make):
    layer = make()
    x, carry = inputs(layer, s=1000)
    before = [layer.experts.gate_up.weight.clone(), layer.experts.down.weight.clone()]
    out = layer(x, carry)
    stats = out.stats
    k, e = layer.config.top_k, layer.config.n_experts
    assert stats["counts"].sum() + stats["dropped"] == 2000 * k
    assert stats["zero_computation"] == stats["counts"][e:].sum()
    assert len(layer.config.expert_names) == len(stats["counts"])
    assert (stats["counts"] > 0).all()
    out.y.square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    for old, weight in zip(
        before, (layer.experts.gate_up.weight, layer.experts.down.weight), strict=True
    ):
        assert ((weight != old).flatten(1).any(dim=1)).all()


@every
def test_relabelling_experts_changes_nothing(make):
    layer = make()
    x, carry = inputs(layer)
    before = layer(x, carry)
    e = layer.config.n_experts
    order = torch.randperm(e)
    with torch.no_grad():
        layer.experts.gate_up.weight[:] = layer.experts.gate_up.weight[order]
        layer.experts.down.weight[:] = layer.experts.down.weight[order]
        for weight in layer.router.parameters():
            weight[:e] = weight[order]
    after = layer(x, carry)
    assert_close(after.y, before.y)
    assert torch.equal(after.stats["counts"][:e], before.stats["counts"][:e][order])


@pytest.mark.parametrize("top_k", [2, 8])
def test_identical_experts_are_one_expert(top_k):
    layer = moe(top_k=top_k)
    dense = SwiGLU(MoEConfig(d_model=D, top_k=top_k, n_shared=1).shared)
    with torch.no_grad():
        layer.experts.gate_up.weight[:], layer.experts.down.weight[:] = (
            dense.gate_up.weight,
            dense.down.weight,
        )
    x = torch.randn(2, 9, D)
    assert_close(layer(x).y, dense(x).y)


def test_copy_is_x_and_a_constant_without_mixing_weights_is_half_way_to_its_vector():
    layer = plus(n_experts=2, n_constant=2, n_copy=1, n_zero=1)
    x = torch.randn(1, 5, D)
    for expert, expected in (
        (4, x),
        (5, torch.zeros_like(x)),
        (3, (x + layer.constant.weight[1]) / 2),
    ):
        layer.router = Forced(6, [expert], [1.0])
        with torch.no_grad():
            layer.constant_mix.weight.zero_()
            for tokens, y in ((x, expected), (x[:, :1], expected[:, :1])):
                assert_close(layer(tokens).y, y)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 5 * 4 * D  # the mixing weights alone


def test_a_gating_residual_reaches_the_first_router_from_the_third_layers_loss():
    layers = [plus(), plus(n_carry=12), plus(n_carry=12)]
    x, carry = torch.randn(1, 12, D), None
    for layer in layers:
        out = layer(x, carry)
        carry = out.carry
    out.losses["balance"].backward()
    assert layers[0].router.weight.grad.abs().sum() > 0
    assert all(
        p.grad is None for p in (layers[0].experts.gate_up.weight, layers[1].experts.down.weight)
    )


# Capacity


def test_capacities_share_gamma_a_slots_in_the_ratio_tau():
    for capacity_of, total in (("assignments", 2), ("tokens", 1)):
        config = MoEPlusPlusConfig(d_model=D, n_experts=16, capacity_of=capacity_of)
        assert config.n_zero_computation == 4
        assert_close(sum(config.slots), 1.1 * total)
        assert_close(config.slots[0] / config.slots[-1], 0.75)
    free = MoEPlusPlusConfig(d_model=D, limit_zero_computation=False).slots
    assert math.isinf(free[-1])
    assert not math.isinf(free[0])


def test_capacity_rounds_up_and_leaves_masked_tokens_out():
    experts = torch.zeros(10, 1, dtype=torch.int64)
    mask = torch.tensor([False] * 4 + [True] * 6)
    slots = torch.tensor([0.45, 1.0], dtype=torch.float64)
    assert within_capacity(experts, slots).sum() == 5
    assert (
        within_capacity(experts, slots, mask).flatten().tolist()
        == [False] * 4 + [True] * 3 + [False] * 3
    )
    exact = torch.tensor([0.1 * 3, 1.0], dtype=torch.float64)  # 0.30000000000000004
    assert within_capacity(experts, exact).sum() == 3


def test_capacity_in_position_order_is_causal_within_a_sequence():
    layer = plus(capacity_factor=0.8)
    x = torch.randn(1, 40, D)
    before = layer(x)
    assert before.stats["dropped"] > 0
    changed = x.clone()
    changed[:, 25:] = torch.randn(1, 15, D)
    assert_close(layer(changed).y[:, :25], before.y[:, :25], rtol=0, atol=0)


# Cost, sizes, names


@every
@pytest.mark.parametrize("decode", [False, True])
def test_flops_are_those_of_the_assignments_that_ran(make, decode):
    layer = make()
    x, carry = inputs(layer)
    counts = layer(x, carry).stats["counts"]
    per_token = counts[: layer.config.n_experts].sum().item() / 48
    measured = () if isinstance(layer, MoE) else (per_token,)
    cost = layer.config.cost(*measured) + layer.router.config.cost().within("router.")
    assert {i.name: i.params for i in cost} == {n: p.numel() for n, p in layer.named_parameters()}
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(not decode):
        if decode:
            flat = x.detach().flatten(0, 1), None if carry is None else carry.flatten(0, 1)
            for t in range(48):
                layer(*(i if i is None else i[None, t : t + 1] for i in flat))
        else:
            layer(x, carry)
    assert counter.get_total_flops() == round(cost.flops * 48)


@every
def test_training_takes_three_times_the_flops(make):
    layer = make()
    x, carry = inputs(layer)
    if carry is not None:
        carry.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        out = layer(x, carry)
    with FlopCounterMode(display=False) as backward:
        (out.y.sum() + sum(out.losses.values())).backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_designed_assignments():
    config = MoEPlusPlusConfig(d_model=D, n_experts=16)
    ffn = config.cost().items[0]
    assert_close(ffn.active_units, 1.5)
    assert ffn.flops == config.cost(1.5).items[0].flops
    none = MoEPlusPlusConfig(d_model=D, n_constant=0, n_copy=0, n_zero=0)
    assert none.cost().flops == MoEConfig(d_model=D).cost().flops


def test_how_many_of_each_kind_and_in_which_order():
    assert [MoEPlusPlusConfig(d_model=D, n_experts=n).constants for n in (4, 8, 16, 32)] == [
        1, 2, 2, 6,
    ]  # fmt: skip
    names = MoEPlusPlusConfig(d_model=D, n_experts=2, n_constant=2).expert_names
    assert names == ("ffn 0", "ffn 1", "constant 0", "constant 1", "copy 0", "zero 0")


def test_default_experts_have_the_width_of_the_default_dense_ffn():
    assert MoEConfig(d_model=512).hidden == 704  # 2 x 704 for 1376, in steps of 32
    assert MoEPlusPlusConfig(d_model=512).hidden == 704


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_run(preset):
    out = plus(**PRESETS[preset])(torch.randn(2, 24, D))
    assert (out.stats["dropped"] > 0) == (preset == "paper")


def test_a_router_for_other_experts_is_refused():
    router = TopKRouter(TopKRouterConfig(d_model=D))
    layer = MoEPlusPlus(MoEPlusPlusConfig(d_model=D), router)
    with pytest.raises(ValueError, match="router scores 8 experts, the layer has 12"):
        layer(torch.randn(1, 3, D))


@pytest.mark.parametrize("config", [MoEConfig, MoEPlusPlusConfig])
def test_refuses_what_it_cannot_be(config):
    with pytest.raises(ValueError, match="d_expert must be positive, got 0"):
        config(d_model=D, d_expert=0)
    with pytest.raises(ValueError, match="top_k must be positive, got 0"):
        config(d_model=D, top_k=0)
    with pytest.raises(ValueError, match=r"top_k must be at most .*, got 99"):
        config(d_model=D, top_k=99)
    with pytest.raises(ValueError, match="unknown activation of"):
        config(d_model=D, activation="tanh")


# Dtypes and compilers


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keeps_the_dtype_of_its_input(make, dtype):
    layer = make().to(dtype)
    x, carry = inputs(layer)
    out = layer(x.to(dtype), carry)
    assert out.y.dtype == dtype
    assert out.losses["balance"].dtype == torch.promote_types(dtype, torch.float32)


@every
def test_autocast_multiplies_experts_in_bf16_and_routes_in_float32(make):
    layer = make()
    x, carry = inputs(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer(x, carry)
    plain = layer(x, carry)
    assert torch.equal(cast.carry, plain.carry)
    assert not torch.equal(cast.y, plain.y)
    assert_close(cast.y, plain.y, rtol=5e-2, atol=5e-2 * plain.y.abs().max().item())
    cast.y.square().sum().backward()
    assert layer.experts.gate_up.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", [moe, plus], ids=["moe", "plus"])
def test_compiles_as_one_graph(make, masked):
    torch.compiler.reset()
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    x, _ = inputs(layer)
    mask = torch.rand(2, 24) > 0.4 if masked else None
    for forward in (layer, compiled):
        layer.zero_grad()
        out = forward(x, None, mask)
        (out.y.square().sum() + out.losses["balance"]).backward()
        found.append([out.y, out.stats["counts"], *(p.grad.clone() for p in layer.parameters())])
    assert_close(*found)
