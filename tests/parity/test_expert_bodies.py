"""Every body of an expert against its equation, token by token in float64.

y = sum over the chosen of w_e (down_e(body(x)) + b_e), body(x) = activation(gate, up) of a first
matrix with or without biases, or activation(up). Llama 4's weights multiply x instead, and no bias.
"""

import math

import pytest
import torch
from torch.testing import assert_close

import zoo

pytestmark = pytest.mark.parity

B, S, D, F, E, K = 2, 5, 6, 4, 5, 3


def sigmoid(h):
    return 1 / (1 + torch.exp(-h))


def gpt_oss(gate, up):
    gate = torch.where(gate > 7, 7 * torch.ones_like(gate), gate)
    up = torch.where(up.abs() > 7, 7 * up.sign(), up)
    return (up + 1) * gate * sigmoid(1.702 * gate)


GATED = {"silu": lambda gate, up: gate * sigmoid(gate) * up, "gpt_oss": gpt_oss}
UNGATED = {
    "relu": lambda h: torch.where(h > 0, h, torch.zeros_like(h)),
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2))),
    "relu2": lambda h: torch.where(h > 0, h * h, torch.zeros_like(h)),
}
BODIES = [
    {"activation": activation, "bias": bias, "gated": activation in GATED}
    for activation in (*GATED, *UNGATED)
    for bias in (False, True)
]


def name_of(body):
    return "-".join(key if value is True else str(value) for key, value in body.items() if value)


every_body = pytest.mark.parametrize("body", BODIES, ids=name_of)
SHARED = {"activation": "silu", "n_shared": 2, "shared_gate": True}
ROUTERS = {  # weights that do not sum to one, so that a bias left unweighed would be seen
    "output": {"name": "top_k", "renormalize": False},
    "input": {"name": "llama4"},
}


def layer_of(**options):
    sizes = {"d_model": D, "d_expert": F, "n_experts": E, "top_k": K}
    layer = zoo.create("moe", **sizes, **options).double()
    for name, p in layer.named_parameters():  # large first matrices, so that bounds are met
        torch.nn.init.normal_(p, std=3.0 if "up.weight" in name else 1.0)
    return layer


def expert(x, layer, e):
    """down_e(body(x)) + b_e, all of which a weight of the output multiplies."""
    config, experts = layer.config, layer.experts
    inner = experts.gate_up if config.gated else experts.up
    h = inner.weight[e] @ x + (inner.bias[e] if config.bias else 0)
    act = config.activation
    h = GATED[act](h[:F], h[F:]) if config.gated else UNGATED[act](h)
    return experts.down.weight[e] @ h + (experts.down.bias[e] if config.bias else 0)


def by_token(layer, x, weighs):
    rows = []
    for token in x.flatten(0, 1):
        logits = layer.router.weight @ token
        chosen = sorted(range(E), key=lambda e: -logits[e].item())[:K]
        if weighs == "input":
            rows.append(sum(expert(sigmoid(logits[e]) * token, layer, e) for e in chosen))
            continue
        p = torch.exp(logits) / torch.exp(logits).sum()
        y = sum(p[e] * expert(token, layer, e) for e in chosen)
        if layer.shared is not None:
            gate, up = (layer.shared.gate_up.weight @ token).chunk(2)
            shared = layer.shared.down.weight @ GATED["silu"](gate, up)
            y = y + sigmoid(layer.shared_gate.weight[0] @ token) * shared
        rows.append(y)
    return torch.stack(rows).view_as(x)


def assert_same(layer, weighs):
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x).y, by_token(layer, x, weighs)
    assert_close(y, expected)
    probe, inputs = torch.randn_like(x), (x, *layer.parameters())
    got = torch.autograd.grad(y, inputs, probe)
    wanted = torch.autograd.grad(expected, inputs, probe, materialize_grads=True)
    for (name, _), a, b in zip([("x", x), *layer.named_parameters()], got, wanted, strict=True):
        assert b.abs().max() > 0, name
        assert_close(a, b, msg=lambda told, name=name: f"{name}: {told}")


@every_body
@pytest.mark.parametrize("weighs", ROUTERS)
def test_forward_and_gradients(body, weighs):
    assert_same(layer_of(router=ROUTERS[weighs], **body), weighs)


def test_gate_on_shared_experts():
    assert_same(layer_of(router=ROUTERS["output"], **SHARED), "output")


DECODED = [(weighs, body) for weighs in ROUTERS for body in BODIES] + [("output", SHARED)]


@pytest.mark.parametrize(("weighs", "body"), DECODED)
@torch.no_grad()
def test_a_single_token_is_decoded_alike(weighs, body):
    """The path of one token is another: no plan, and where it can one native call."""
    layer = layer_of(router=ROUTERS[weighs], **body)
    x = torch.randn(1, 1, D, dtype=torch.float64)
    assert_close(layer(x).y, by_token(layer, x, weighs))
    layer, single = layer.float(), x.float()
    assert_close(layer(single).y, layer(single.expand(1, 2, D)).y[:, :1], rtol=1e-4, atol=1e-4)


@every_body
def test_a_masked_token_gives_nothing_despite_biases(body):
    layer, x = layer_of(router=ROUTERS["output"], **body), torch.randn(B, S, D).double()
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, 2:] = False
    y = layer(x, mask=mask).y
    assert not y[~mask].any()
    assert_close(y[mask], layer(x).y[mask])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_gate": True}, "shared_gate weighs shared experts: give n_shared of 1 or more"),
        ({"n_shared": 1, "bias": True}, "shared experts are a swiglu without biases"),
        ({"n_shared": 1, "gated": False, "activation": "relu"}, "shared experts are a swiglu"),
        ({"gated": False}, "unknown activation of ungated experts 'identity'"),
        ({"activation": "relu2"}, "unknown activation of gated experts 'relu2'"),
    ],
)
def test_bodies_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.create("moe", d_model=D, **{"activation": "identity"} | options)
