"""Memory and Memory+ against a loop over tokens in float64, from the equations (memory.md 4)."""

import pytest
import torch
from memory_toys import linear, product_slots, rms, softmax
from torch.testing import assert_close

from layers.memory_plus import MemoryPlus, MemoryPlusConfig

pytestmark = pytest.mark.parity
D = 6


def by_token(layer, x):
    c, m = layer.config, layer.memory
    ys = []
    for token in x.flatten(0, 1):
        q = linear(m.query.proj, token).view(c.heads, 2, -1)
        y = torch.zeros(m.pool.values.weight.shape[1], dtype=x.dtype)
        for head in range(c.heads):
            keys, of_head = m.keys.weight[head], q[head]
            if c.key_norm == "rms":
                keys = torch.stack(
                    [torch.stack([rms(k, m.keys.norm.weight) for k in side]) for side in keys]
                )
                of_head = torch.stack([rms(v, m.query.norm.weight) for v in of_head])
            hits = product_slots(keys, of_head, c.top_k)
            for w, (slot, _) in zip(softmax([s for _, s in hits]), hits, strict=True):
                y = y + w * m.pool.values.weight[slot]
        if c.gating == "swilu":
            gate = linear(m.readout.gate, token)
            y = linear(m.readout.output, y * (gate / (1 + torch.exp(-gate))))
        elif m.readout.output is not None:
            y = linear(m.readout.output, y)
        if c.gating == "scalar":
            y = y / (1 + torch.exp(-linear(m.readout.scalar, token)))
        ys.append(y)
    return torch.stack(ys).view_as(x)


@pytest.mark.parametrize("gating", ["swilu", "none", "scalar"])
@pytest.mark.parametrize("d_value", [None, 4])
@pytest.mark.parametrize("norm", ["none", "rms"])
def test_forward_and_gradients(gating, d_value, norm):
    config = MemoryPlusConfig(
        d_model=D, heads=2, n_keys=5, top_k=3, d_key=3, gating=gating, d_value=d_value,
        query_norm=norm, key_norm=norm,
    )  # fmt: skip
    layer = MemoryPlus(config).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)  # biases too
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x).y, by_token(layer, x)
    assert_close(y, expected)
    probe = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((y * probe).sum(), inputs)
    assert_close(got, torch.autograd.grad((expected * probe).sum(), inputs))


def test_the_released_init_with_no_bias_left_unwritten():
    layer = MemoryPlus(MemoryPlusConfig(d_model=64, n_keys=16, top_k=8, d_key=32, d_value=128))
    m = layer.memory
    assert m.keys.weight.abs().max() <= 64**-0.5
    assert m.query.proj.weight.abs().max() <= (6 / (64 + 128)) ** 0.5
    assert m.pool.values.weight.std().item() == pytest.approx(128**-0.5, rel=0.02)
    for matrix in (m.readout.gate, m.readout.output):
        assert matrix.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
        assert not matrix.bias.any()
    assert not m.query.proj.bias.any()
