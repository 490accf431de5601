"""MoE++ against a loop over tokens in float64, written from the equations alone (moe.md 4)."""

import math

import pytest
import torch
from torch.testing import assert_close

from layers.moe import MoE, MoEConfig
from layers.moe_plus_plus import MoEPlusPlus, MoEPlusPlusConfig
from routers.pathway import PathwayRouter, PathwayRouterConfig
from routers.top_k import TopKRouter, TopKRouterConfig

pytestmark = pytest.mark.parity

D, F = 6, 5
KINDS = {"n_experts": 3, "n_constant": 2, "n_copy": 1, "n_zero": 2}
N = 8
RULES = [("paper", None), ("released", 1.0), ("released", 0.5)]  # (weights, logit_norm)
CONSTANTS, COPIES, ZEROS = range(3, 5), range(5, 6), range(6, 8)


def small(n_carry=None, weights="paper", logit_norm=None, top_k=2, dtype=torch.float64, **options):
    sizes = {"d_model": D, "top_k": top_k, "tau": 0.75, **KINDS}
    router = PathwayRouterConfig(**sizes, n_carry=n_carry, weights=weights, logit_norm=logit_norm)
    options = {"capacity_factor": None} | options
    layer = MoEPlusPlus(
        MoEPlusPlusConfig(**sizes, d_expert=F, **options), PathwayRouter(router)
    ).to(dtype)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    return layer


def route(layer, token, before):
    """(logits, p, chosen experts, their weights) of one token."""
    c = layer.router.config
    logits = layer.router.weight @ token
    if before is not None:
        logits = logits + layer.router.carry @ before
    z = logits
    if c.logit_norm is not None:
        std = torch.sqrt(((logits - logits.mean()) ** 2).sum() / (N - 1))
        z = logits / std * c.logit_norm
    p = torch.exp(z) / torch.exp(z).sum()
    chosen = sorted(range(N), key=lambda e: -p[e].item())[: c.top_k]
    if c.weights == "paper":
        g = [p[e] for e in chosen]
    elif c.weights == "topk_softmax":
        g = [torch.exp(z[e]) / sum(torch.exp(z[i]) for i in chosen) for e in chosen]
    else:
        g = [p[e] * (e not in ZEROS) for e in chosen]
        norm = sum(g)
        g = [w / norm if norm.item() > 0 else w * 0 for w in g]
    return logits, p, chosen, g


def apply(layer, e, x):
    """Expert e of any kind on one token."""
    if e in ZEROS:
        return torch.zeros_like(x)
    if e in COPIES:
        return x
    if e in CONSTANTS:
        w_c = layer.constant_mix.weight[e - CONSTANTS[0]]
        a = torch.exp(w_c @ x)
        return (a[0] * x + a[1] * layer.constant.weight[e - CONSTANTS[0]]) / a.sum()
    gate, up = layer.experts.gate_up.weight[e][:F] @ x, layer.experts.gate_up.weight[e][F:] @ x
    return layer.experts.down.weight[e] @ (gate / (1 + torch.exp(-gate)) * up)


def by_token(layer, x, carry=None, drops=()):
    """(y, the paper's balance loss) token by token; `drops` holds (token, expert) left out."""
    rows, f, p_sum = [], torch.zeros(N, dtype=x.dtype), 0
    tokens = x.flatten(0, 1)
    for t, token in enumerate(tokens):
        before = None if carry is None else carry.flatten(0, 1)[t]
        _, p, chosen, g = route(layer, token, before)
        scaled = token * layer.config.input_scale
        y = torch.zeros_like(token)
        for e, w in zip(chosen, g, strict=True):
            f[e] += 1 / len(tokens)
            if (t, e) not in drops:
                y = y + w * apply(layer, e, scaled)
        p_sum = p_sum + p / len(tokens)
        rows.append(y)
    eta = torch.tensor([1.0] * 3 + [layer.router.config.tau] * 5, dtype=x.dtype)
    return torch.stack(rows).view_as(x), (eta * f * p_sum).sum()


def same(layer, x, carry, drops=()):
    out = layer(x, carry)
    y, balance = by_token(layer, x, carry, drops)
    assert_close(out.y, y)
    # the router reports N / K times the paper's loss, 1.0 when even and tau = 1
    assert_close(out.losses["balance"], balance * N / layer.config.top_k)
    probe = torch.randn_like(x)
    inputs = [t for t in (x, carry, *layer.parameters()) if t is not None]
    got = torch.autograd.grad(
        (out.y * probe).sum() + out.losses["balance"] * layer.config.top_k / N, inputs
    )
    assert_close(got, torch.autograd.grad((y * probe).sum() + balance, inputs))
    return out


@pytest.mark.parametrize("n_carry", [None, 4])
@pytest.mark.parametrize(
    ("weights", "logit_norm", "top_k"),
    [
        *((*rule, k) for rule in RULES for k in (1, 2, 3)),
        ("topk_softmax", None, 2),  # 1 is refused: its weights would be 1
        ("topk_softmax", None, 3),
    ],
)
def test_forward_losses_and_gradients(weights, logit_norm, top_k, n_carry):
    layer = small(n_carry, weights, logit_norm, top_k)
    x = torch.randn(2, 20, D, dtype=torch.float64, requires_grad=True)
    carry = None
    if n_carry:
        carry = torch.randn(2, 20, n_carry, dtype=torch.float64, requires_grad=True)
    out = same(layer, x, carry)
    assert (out.stats["counts"] > 0).all()  # every kind was seen
    assert out.carry.shape == (2, 20, N)


def test_input_scale_is_on_the_experts_and_not_on_the_router():
    x = torch.randn(1, 20, D, dtype=torch.float64, requires_grad=True)
    same(small(input_scale=2.0), x, None)


@pytest.mark.parametrize("limit", [True, False])
@pytest.mark.parametrize("capacity_of", ["assignments", "tokens"])
@pytest.mark.parametrize("priority", ["position", "weight"])
def test_capacity(priority, capacity_of, limit):
    layer = small(
        capacity_factor=1.1, capacity_of=capacity_of, priority=priority,
        limit_zero_computation=limit,
    )  # fmt: skip
    x = torch.randn(2, 20, D, dtype=torch.float64, requires_grad=True)
    total = 40 * (2 if capacity_of == "assignments" else 1)
    taken: dict[int, list] = {e: [] for e in range(N)}
    for t, token in enumerate(x.flatten(0, 1)):
        _, _, chosen, g = route(layer, token, None)
        for e, w in zip(chosen, g, strict=True):
            taken[e].append((t, w.item()))
    drops = set()
    for e, those in taken.items():
        share = (0.75 if e < 3 else 1.0) / (0.75 * 3 + 5)
        slots = math.ceil(1.1 * total * share) if e < 3 or limit else len(those)
        if priority == "weight":
            those = sorted(those, key=lambda pair: -pair[1])
        drops |= {(t, e) for t, _ in those[slots:]}
    assert drops
    out = same(layer, x, None, drops)
    assert out.stats["dropped"] == len(drops)
    assert out.stats["counts"].sum() + len(drops) == 80
    assert out.stats["zero_computation"] == out.stats["counts"][3:].sum()
    free = layer.eval()(x)  # no capacity outside training
    assert_close(free.y, by_token(layer, x)[0])
    assert free.stats["dropped"] == 0


@pytest.mark.parametrize("weights", ["paper", "released"])
def test_decoding_one_token(weights):
    layer = small(weights=weights).eval()
    x = torch.randn(1, 60, D, dtype=torch.float64)
    with torch.no_grad():
        alone = torch.cat([layer(token).y for token in x.split(1, dim=1)], dim=1)
        assert_close(alone, layer(x).y)
        assert_close(alone, by_token(layer, x)[0])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_without_zero_computation_experts_it_is_moe_bit_for_bit(masked, grad):
    none = {"n_constant": 0, "n_copy": 0, "n_zero": 0, "capacity_factor": None}
    plus = MoEPlusPlus(
        MoEPlusPlusConfig(d_model=32, n_experts=4, **none),
        TopKRouter(TopKRouterConfig(d_model=32, n_experts=4)),
    )
    plain = MoE(
        MoEConfig(d_model=32, n_experts=4), TopKRouter(TopKRouterConfig(d_model=32, n_experts=4))
    )
    plain.load_state_dict(plus.state_dict())
    x = torch.randn(2, 33, 32)
    mask = torch.rand(2, 33) > 0.3 if masked else None
    probe = torch.randn_like(x)
    found = []
    for layer in (plain, plus):
        inputs = x.clone().requires_grad_()
        with torch.set_grad_enabled(grad):
            out = layer(inputs, mask=mask)
        found.append([out.y, *out.losses.values(), out.stats["counts"], out.carry])
        if grad:
            ((out.y * probe).sum() + sum(out.losses.values())).backward()
            found[-1] += [inputs.grad, *(p.grad for p in layer.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    router = PathwayRouter(
        PathwayRouterConfig(d_model=32, n_experts=4, n_constant=0, n_copy=0, n_zero=0, tau=1.0)
    )
    assert router.config.n_routes == 4
    plain.router = TopKRouter(TopKRouterConfig(d_model=32, n_experts=4, renormalize=False))
    plus.router = router
    router.load_state_dict(plain.router.state_dict())
    a, b = plain(x), plus(x)
    assert torch.equal(a.y, b.y)
    assert torch.equal(a.losses["balance"], b.losses["balance"])
