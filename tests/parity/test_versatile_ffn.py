"""VersatileFFN against its equations, token by token in float64 (adaptive_ffn.md 5.2 to 5.4)."""

import math

import pytest
import torch
from torch.testing import assert_close

import zoo
from layers import loop_predictor

pytestmark = pytest.mark.parity

D, WIDTH = 6, 24
FORMS = [
    {},
    {"fusion": "average"},
    {"path": "width"},
    {"path": "depth"},
    {"path": "depth", "loops": "fixed"},
    {"fusion": "average", "loops": "fixed"},
    {"max_loops": 1},
    {"d_expert": 3},  # strided, with numbers that no expert owns
    {"n_experts": 1, "top_k": 1},
    {"n_experts": 5, "d_expert": 4, "top_k": 3, "max_loops": 6},
    {"activation": "gelu"},
]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())))
ACT = {
    "silu": lambda h: h / (1 + torch.exp(-h)),
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2))),
}


def small(**options):
    """A layer with nothing at zero, whose choices differ from token to token."""
    sizes = {"d_model": D, "d_ff": WIDTH, "n_experts": 4, "top_k": 2, "max_loops": 4}
    layer = zoo.create("versatile_ffn", **{**sizes, **options}).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer


def noise_of(monkeypatch, shape):
    """Gumbel noise that every forward draws alike."""
    noise = -torch.log(-torch.log(torch.rand(shape, dtype=torch.float64)))
    monkeypatch.setattr(loop_predictor, "gumbel_noise", lambda like: noise)
    return noise


def by_token(layer, x, noise=None):
    """Y - H. noise: [T, L], of training; None: evaluation."""
    c, rows = layer.config, []
    gate, up = layer.gate_up.weight[:WIDTH], layer.gate_up.weight[WIDTH:]
    down, m, e = layer.down.weight, c.hidden, c.expert

    def part(h, neurons):
        z = h / torch.sqrt((h * h).mean() + 1e-6) * layer.norm.weight
        y = torch.zeros_like(h)
        for n in neurons:
            y = y + ACT[c.activation](gate[n] @ z) * (up[n] @ z) * down[:, n]
        return y

    for t, token in enumerate(x.flatten(0, 1)):
        width = torch.zeros_like(token)
        if c.path != "depth":
            g = layer.router.weight @ token
            chosen = sorted(range(c.n_experts), key=lambda j: -g[j].item())[: c.top_k]
            total = sum(torch.exp(g[j]) for j in chosen)
            for j in chosen:
                stride = (m - e) / (c.n_experts - 1) if c.n_experts > 1 else 0
                first = math.floor(j * stride)
                width = width + torch.exp(g[j]) / total * part(token, range(first, first + e))
        if c.path == "width":
            rows.append(width)
            continue
        states = [token]
        for _ in range(c.max_loops):
            states.append(states[-1] + part(states[-1], range(m)))
        if c.loops == "fixed":
            p = torch.eye(c.max_loops, dtype=torch.float64)[-1]
        else:
            score = layer.loop_predictor.weight @ token
            score = score if noise is None else score + noise[t]
            p = torch.eye(c.max_loops, dtype=torch.float64)[score.argmax()]
            if noise is not None:
                soft = torch.softmax(score / layer.loop_predictor.temperature, 0)
                p = p + soft - soft.detach()
        depth = sum(p[i] * (states[i + 1] - token) for i in range(c.max_loops))
        expected = sum((i + 1) * p[i] for i in range(c.max_loops))
        share = 0.5 if c.fusion == "average" else (c.max_loops - expected) / c.max_loops
        share = 0 if c.path == "depth" else share
        rows.append(share * width + (1 - share) * depth)
    return torch.stack(rows).view_as(x)


def gradients(y, layer, x, probe):
    """By name, zero where there is none."""
    inputs = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad((y * probe).sum(), list(inputs.values()), allow_unused=True)
    named = zip(inputs.items(), found, strict=True)
    return {n: torch.zeros_like(w) if grad is None else grad for (n, w), grad in named}


@every_form
def test_outputs_and_gradients_in_training(form, monkeypatch):
    layer, probe = small(**form), torch.randn(2, 9, D, dtype=torch.float64)
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    noise = noise_of(monkeypatch, (18, layer.config.max_loops))
    mine, theirs = layer(x).y, by_token(layer, x, noise)
    assert_close(mine, theirs)
    assert_close(gradients(mine, layer, x, probe), gradients(theirs, layer, x, probe))


@every_form
def test_outputs_and_gradients_in_evaluation(form):
    layer, probe = small(**form).eval(), torch.randn(2, 9, D, dtype=torch.float64)
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    if layer.loop_predictor is not None:  # else early exit would not be seen at work
        seen = set(layer.loop_predictor(x.flatten(0, 1)).choice.flatten().tolist())
        assert len(seen) >= min(3, layer.config.max_loops)
    mine, theirs = layer(x).y, by_token(layer, x)
    assert_close(mine, theirs)
    assert_close(gradients(mine, layer, x, probe), gradients(theirs, layer, x, probe))
