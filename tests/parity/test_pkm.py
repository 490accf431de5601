"""PKM against a loop over tokens in float64, written from the equations alone (memory.md 2)."""

import pytest
import torch
from memory_toys import batch_normed, product_slots, softmax
from torch.testing import assert_close

from layers.pkm import PKM, PKMConfig

pytestmark = pytest.mark.parity
D = 6


def by_token(layer, x, mask=None):
    c, m = layer.config, layer.memory
    tokens = x.flatten(0, 1)
    real = torch.ones(len(tokens), dtype=torch.bool) if mask is None else mask.flatten()
    q = torch.stack([m.query.proj.weight @ token for token in tokens])
    norm = m.query.norm
    if layer.training:
        q = torch.zeros_like(q).index_put((real,), batch_normed(q[real], norm.weight, norm.bias))
    else:
        scale = torch.sqrt(norm.running_var + 1e-5)
        q = (q - norm.running_mean) / scale * norm.weight + norm.bias
    ys = []
    for t in range(len(tokens)):
        y = torch.zeros(D, dtype=x.dtype)
        for head in range(c.heads) if real[t] else ():
            of_head = q[t].view(c.heads, 2, -1)[head]
            hits = product_slots(m.keys.weight[head], of_head, c.top_k)
            for w, (slot, _) in zip(softmax([s for _, s in hits]), hits, strict=True):
                y = y + w * m.pool.values.weight[slot]
        ys.append(y)
    return torch.stack(ys).view_as(x)


@pytest.mark.parametrize(("heads", "n_keys", "top_k"), [(1, 4, 4), (2, 5, 3), (3, 6, 2)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_forward_and_gradients(heads, n_keys, top_k, training, masked):
    config = PKMConfig(d_model=D, heads=heads, n_keys=n_keys, top_k=top_k, d_key=3)
    layer = PKM(config).double()
    layer(torch.randn(3, 20, D, dtype=torch.float64) * 3 + 1)  # running statistics of some batch
    layer.train(training)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool() if masked else None
    y, expected = layer(x, mask=mask).y, by_token(layer, x, mask)
    assert_close(y, expected)
    probe = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((y * probe).sum(), inputs)
    assert_close(got, torch.autograd.grad((expected * probe).sum(), inputs))
