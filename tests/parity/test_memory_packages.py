"""Memory layers against other packages' (memory.md 2, 3), where these are installed.

PEER-pytorch: competing scores as the paper has them, and its default, one ReLU score a head.
product-key-memory: queries layer-normed, softmax or ReLU over a head's slots.
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from layers.peer import PEER, PEERConfig
from layers.pkm import PKM, PKMConfig

pytestmark = pytest.mark.parity
D, HEADS, KEYS, D_KEY, K = 12, 3, 6, 4, 4


def queries(theirs, ours):
    """Their rows run over sides, heads, features; ours over heads, sides, features."""
    rows = theirs.view(2, HEADS, D_KEY, D).transpose(0, 1).reshape(-1, D)
    ours.proj.weight = nn.Parameter(rows.clone())
    if ours.proj.bias is not None:
        nn.init.zeros_(ours.proj.bias)


def keys(theirs, ours):
    """[heads, keys, sides, features] to [heads, sides, keys, features]."""
    ours.weight = nn.Parameter(theirs.permute(0, 2, 1, 3).clone())


def same(ours, theirs, x, pairs):
    """Outputs, and gradients of the input and of tables laid out alike."""
    y, expected = ours(x).y, theirs(x)
    assert_close(y, expected)
    probe = torch.randn_like(y)
    got = torch.autograd.grad((y * probe).sum(), [x, *(a for a, _ in pairs)])
    assert_close(got, torch.autograd.grad((expected * probe).sum(), [x, *(b for _, b in pairs)]))


@pytest.mark.parametrize("competing", [True, False])
def test_peer(competing):
    package = pytest.importorskip("PEER_pytorch")
    theirs = package.PEER(
        D, heads=HEADS, num_experts=KEYS**2, num_experts_per_head=K, dim_key=D_KEY,
        non_competing_scores=not competing,
    ).double()  # fmt: skip
    nn.init.normal_(theirs.keys)  # theirs are so small that all scores are alike
    config = PEERConfig(
        d_model=D, heads=HEADS, n_keys=KEYS, d_key=D_KEY, top_k=K if competing else 1,
        weights="softmax" if competing else "relu", query_norm="none",
    )  # fmt: skip
    ours = PEER(config).double()
    m = ours.memory
    queries(theirs.to_queries[0].weight.detach(), m.query)
    keys(theirs.keys.detach(), m.keys)
    m.pool.inputs.weight = nn.Parameter(theirs.weight_down_embed.weight.detach().clone())
    m.pool.values.weight = nn.Parameter(theirs.weight_up_embed.weight.detach().clone())
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    pairs = [
        (m.pool.inputs.weight, theirs.weight_down_embed.weight),
        (m.pool.values.weight, theirs.weight_up_embed.weight),
    ]
    same(ours, theirs, x, pairs)


@pytest.mark.parametrize("weights", ["softmax", "relu"])
def test_product_key_memory(weights):
    package = pytest.importorskip("product_key_memory")
    theirs = package.PKM(
        D, heads=HEADS, num_keys=KEYS, topk=K, dim_head=D_KEY,
        non_competitive_gates=weights == "relu",
    ).double()  # fmt: skip
    config = PKMConfig(
        d_model=D, heads=HEADS, n_keys=KEYS, d_key=D_KEY, top_k=K, weights=weights,
        query_norm="layer",
    )  # fmt: skip
    ours = PKM(config).double()
    m = ours.memory
    queries(theirs.to_queries.weight.detach(), m.query)
    keys(theirs.keys.detach(), m.keys)
    m.pool.values.weight = nn.Parameter(theirs.values.weight.detach().clone())
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    same(ours, theirs, x, [(m.pool.values.weight, theirs.values.weight)])
