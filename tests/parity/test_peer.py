"""PEER against a loop over tokens in float64, written from the equations alone (memory.md 3)."""

import math

import pytest
import torch
from memory_toys import batch_normed, product_slots, softmax
from torch.testing import assert_close

from layers.peer import PEER, PEERConfig

pytestmark = pytest.mark.parity
D = 6
ACTIVATIONS = {
    "gelu": lambda g: 0.5 * g * (1 + torch.erf(g / math.sqrt(2))),
    "relu": lambda g: g.clamp(min=0),
}


def by_token(layer, x):
    c, m = layer.config, layer.memory
    tokens = x.flatten(0, 1)
    norm = m.query.norm
    q = torch.stack([m.query.proj.weight @ token for token in tokens])
    q = batch_normed(q, norm.weight, norm.bias)
    ys = []
    for t, token in enumerate(tokens):
        y = torch.zeros_like(token)
        for head in range(c.heads):
            keys = m.keys.weight[head if c.keys == "per_head" else 0]
            hits = product_slots(keys, q[t].view(c.heads, 2, -1)[head], c.top_k)
            scores = [s for _, s in hits]
            weights = softmax(scores)
            if c.weights == "sigmoid":
                weights = [1 / (1 + torch.exp(-s)) for s in scores]
            for w, (i, _) in zip(weights, hits, strict=True):
                g = ACTIVATIONS[c.activation](m.pool.inputs.weight[i] @ token)
                y = y + w * g * m.pool.values.weight[i]
        ys.append(y)
    return torch.stack(ys).view_as(x)


@pytest.mark.parametrize("keys", ["per_head", "shared"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("weights", ["softmax", "sigmoid"])
def test_forward_and_gradients(keys, activation, weights):
    config = PEERConfig(
        d_model=D, heads=2, n_keys=5, top_k=3, d_key=3, keys=keys, activation=activation,
        weights=weights,
    )  # fmt: skip
    layer = PEER(config).double()
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x).y, by_token(layer, x)
    assert_close(y, expected)
    probe = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((y * probe).sum(), inputs)
    assert_close(got, torch.autograd.grad((expected * probe).sum(), inputs))


def test_one_expert_a_head_is_a_dense_mlp_of_the_rows_looked_up():
    layer = PEER(PEERConfig(d_model=D, heads=4, n_keys=5, top_k=1, d_key=3)).double().eval()
    x = torch.randn(1, 1, D, dtype=torch.float64)
    slots = layer.memory.keys(layer.memory.query(x)).slots.flatten()
    up, down = (
        table.weight[slots] for table in (layer.memory.pool.inputs, layer.memory.pool.values)
    )
    assert_close(layer(x).y[0, 0], down.T @ ACTIVATIONS["gelu"](up @ x[0, 0]))
