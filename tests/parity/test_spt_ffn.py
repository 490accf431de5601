"""SPT's routed FFN against its equations, token by token and block by block in float64."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import zoo
from layers.spt_ffn import SPTFFN, SPTFFNConfig, in_blocks
from routers.spt import SPTRouter, SPTRouterConfig

pytestmark = pytest.mark.parity

D, WIDTH, N, R = 6, 24, 4, 3
SIZE = WIDTH // N
ACT = {
    "silu": lambda h: h / (1 + torch.exp(-h)),
    "relu": lambda h: h.clamp(min=0),
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2))),
}
FORMS = [(True, "silu"), (True, "relu"), (False, "relu"), (False, "gelu")]
every_form = pytest.mark.parametrize(("gated", "activation"), FORMS)


def small(top_k=2, weighting="twice", dtype=torch.float64, **options):
    """A layer with nothing at zero."""
    config = SPTFFNConfig(d_model=D, d_ff=WIDTH, n_experts=N, top_k=top_k, **options)
    router = SPTRouterConfig(d_model=D, n_experts=N, top_k=top_k, weighting=weighting)
    layer = SPTFFN(config, SPTRouter(router)).to(dtype)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    return layer


def dense_and_factors(layer):
    """By the names of the equations: W [F, D] each, W_down [D, F], L and R of each."""
    c, state = layer.config, {}
    n_inner = 2 if c.gated else 1
    inner = getattr(layer, c.inner_name).weight  # [N, n_inner SIZE, D]
    halves = inner.view(N, n_inner, SIZE, D)
    for i, name in enumerate(c.factor_names):
        state[name] = halves[:, i].reshape(WIDTH, D)
        if c.rank:
            left, right = getattr(layer, f"{name}_left"), getattr(layer, f"{name}_right")
            state |= {f"L {name}": left.weight, f"R {name}": right.weight.reshape(WIDTH, R)}
    state["down"] = torch.cat(list(layer.down.weight), dim=1)
    if c.rank:
        state["L down"] = torch.cat(list(layer.down_left.weight), dim=1)
        state["R down"] = layer.down_right.weight
    return state


def by_token(layer, x):
    c, w, act = layer.config, dense_and_factors(layer), ACT[layer.config.activation]
    rows = []
    for token in x.flatten(0, 1):
        z = layer.router.weight @ token + layer.router.logit_bias
        p = 1 / (1 + torch.exp(-z))
        y = torch.zeros_like(token)
        for b in sorted(range(N), key=lambda b: -p[b].item())[: c.top_k]:
            part = slice(b * SIZE, (b + 1) * SIZE)
            coefficient = 2 * p[b] if layer.router.config.weighting == "twice" else 1.0
            inner = []
            for name in c.factor_names:
                h = coefficient * (w[name][part] @ token)
                if c.rank:
                    h = h + w[f"R {name}"][part] @ (w[f"L {name}"] @ token)
                inner.append(h)
            h = act(inner[0]) * inner[1] if c.gated else act(inner[0])
            y = y + coefficient * (w["down"][:, part] @ h)
            if c.rank:
                y = y + w["R down"] @ (w["L down"][:, part] @ h)
        rows.append(y)
    return torch.stack(rows).view_as(x)


@every_form
@pytest.mark.parametrize("rank", [None, R])
@pytest.mark.parametrize("weighting", ["twice", "one"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_forward_and_gradients(gated, activation, rank, weighting, top_k):
    layer = small(top_k, weighting, gated=gated, activation=activation, rank=rank)
    layer.requires_grad_(True)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x).y, by_token(layer, x)
    assert_close(y, expected)
    probe = torch.randn_like(x)
    inputs = (
        x,
        *(p for n, p in layer.named_parameters() if weighting == "twice" or "router" not in n),
    )
    assert_close(
        torch.autograd.grad(y, inputs, probe), torch.autograd.grad(expected, inputs, probe)
    )


@pytest.mark.parametrize("rank", [None, R])
def test_a_token_alone_and_in_float32(rank):
    layer = small(dtype=torch.float32, rank=rank)
    x = torch.randn(1, 1, D)
    with torch.no_grad():
        assert_close(
            layer(x).y.double(), by_token(layer.double(), x.double()), rtol=1e-4, atol=1e-4
        )


@every_form
@pytest.mark.parametrize("rank", [None, R])
def test_all_blocks_of_weight_one_are_the_dense_ffn_from_its_own_state_dict(
    gated, activation, rank
):
    name = "swiglu" if gated else "mlp"
    dense = zoo.create(name, d_model=D, d_ff=WIDTH, activation=activation).double()
    layer = small(N, "one", gated=gated, activation=activation, rank=rank)
    found = layer.load_state_dict(dense.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all("router" in n or "_left" in n or "_right" in n for n in found.missing_keys)
    for factor, weight in layer.named_parameters():
        if "_right" in factor:
            torch.nn.init.zeros_(weight)
    for rows in (0, 1, 2, 7, 33):
        x = torch.randn(1, rows, D, dtype=torch.float64)
        assert_close(layer(x).y, dense(x).y, rtol=1e-12, atol=1e-12)
    # an even router makes 2 p one, too
    even = small(N, "twice", gated=gated, activation=activation, rank=rank)
    even.load_state_dict(layer.state_dict())
    for weight in even.router.parameters():
        torch.nn.init.zeros_(weight)
    assert_close(even(x).y, dense(x).y, rtol=1e-12, atol=1e-12)
    # and back
    assert layer.dense_state().keys() == dense.state_dict().keys()
    assert all(torch.equal(t, dense.state_dict()[n]) for n, t in layer.dense_state().items())


def test_a_dense_model_loads_into_layers_of_a_model():
    """Under their names in a whole model, through one `load_state_dict`."""
    config = {"vocab_size": 16, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 8}
    dense = zoo.build(config | {"ffn": {"name": "swiglu", "d_ff": 64}})
    router = {"name": "spt", "weighting": "one"}
    routed = zoo.build(
        config | {"ffn": {"name": "spt_ffn", "d_ff": 64, "top_k": 4, "router": router}}
    )
    found = routed.load_state_dict(dense.state_dict(), strict=False)
    assert not found.unexpected_keys
    tokens = torch.randint(16, (2, 8))
    assert_close(routed(tokens).logits, dense(tokens).logits)


def test_block_b_is_its_neurons():
    weights = {"gate_up.weight": torch.randn(2 * WIDTH, D), "down.weight": torch.randn(D, WIDTH)}
    stacks = in_blocks(weights, N)
    gate, up = weights["gate_up.weight"].chunk(2)
    for b in range(N):
        part = slice(b * SIZE, (b + 1) * SIZE)
        assert torch.equal(stacks["gate_up.weight"][b], torch.cat((gate[part], up[part])))
        assert torch.equal(stacks["down.weight"][b], weights["down.weight"][:, part])


@pytest.mark.parametrize("weighting", ["twice", "one"])
@pytest.mark.parametrize("rank", [None, R])
def test_what_learns(weighting, rank):
    """The published plain layer leaves its router untaught; the low-rank one, its base."""
    router = {"name": "spt", "weighting": weighting}
    layer = zoo.create("spt_ffn", d_model=D, d_ff=WIDTH, rank=rank, router=router)
    layer(torch.randn(2, 30, D)).y.square().mean().backward()
    learning = {n for n, w in layer.named_parameters() if w.grad is not None and w.grad.any()}
    routed = {"router.weight", "router.logit_bias"} if weighting == "twice" else set()
    rest = {f"{n}_right.weight" for n in ("gate", "up", "down")}  # left ones follow a step later
    assert learning == routed | (rest if rank else {"gate_up.weight", "down.weight"})
    trained = {n for n, w in layer.named_parameters() if w.requires_grad}
    left = {f"{n}_left.weight" for n in ("gate", "up", "down")} if rank else set()
    assert trained == learning | left
    if rank:
        assert layer.gate_left.weight.std().item() == pytest.approx(1, abs=0.5)
        assert not layer.gate_right.weight.any()


def test_starts_with_the_variance_of_the_dense_ffn():
    layer = zoo.create("spt_ffn", d_model=64, d_ff=512, n_experts=8)
    dense = zoo.create("swiglu", d_model=64, d_ff=512)
    for name, weight in layer.dense_state().items():
        assert weight.std() == pytest.approx(dense.state_dict()[name].std().item(), rel=0.05)


@pytest.mark.parametrize("gated", [True, False])
def test_cost_of_low_rank_is_what_is_built_and_run(gated):
    layer, x = small(rank=R, gated=gated, dtype=torch.float32), torch.randn(2, 16, D)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    cost = zoo.module_cost(layer)
    assert {item.name: item.params for item in cost} == {
        n: p.numel() for n, p in layer.named_parameters()
    }
    assert cost.flops == counter.get_total_flops() / 32


def test_a_precision_reaches_every_matmul():
    """In fp8 each product changes; the router's does not."""
    layer = small(rank=R, dtype=torch.float32)
    x = torch.randn(1, 40, D)
    before, routed = layer(x).y, layer.router(x[0])
    report = zoo.set_precision(layer, "mxfp8")
    assert {p.name for p in report.parameters if p.precision is None} == {
        "router.weight", "router.logit_bias",
    }  # fmt: skip
    after = layer(x).y
    assert 1e-3 < (after - before).norm() / before.norm() < 0.3
    assert torch.equal(layer.router(x[0]).logits, routed.logits)


def test_refuses_what_it_cannot_be():
    for options, message in (
        ({"n_experts": 5}, "d_ff=24 does not split into 5 equal parts"),
        ({"top_k": 5}, "top_k must be at most n_experts=4, got 5"),
        ({"rank": 0}, "rank must be positive, got 0"),
        ({"activation": "relu2"}, "unknown activation of gated spt_ffn 'relu2'"),
        ({"activation": "identity", "gated": False}, "unknown activation of ungated spt_ffn"),
    ):
        with pytest.raises(ValueError, match=message):
            SPTFFNConfig(d_model=D, d_ff=WIDTH, **options)
    with pytest.raises(ValueError, match=r"unknown weighting of spt 'twise'. Did you mean 'twice'"):
        SPTRouterConfig(d_model=D, weighting="twise")
