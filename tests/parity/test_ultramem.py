"""UltraMem against a loop over tokens in float64, written from the equations (memory.md 5)."""

import pytest
import torch
from memory_toys import rms, swiglu, tdqkr
from torch.testing import assert_close

from layers.ultramem import UltraMem, UltraMemConfig

pytestmark = pytest.mark.parity
D = 8


def by_token(layer, x):
    c, m = layer.config, layer.memory
    rank, n_rows, copies = c.rank, c.n_keys**2, c.expand**2
    n_keys, width = c.n_keys * c.expand, c.value_width // c.n_cores
    values = m.pool.values.weight.view(n_rows, c.n_cores, width)
    ys = []
    for token in x.flatten(0, 1):
        q = m.query.proj.weight @ token
        q = [rms(v, m.query.norm.weight) for v in q.view(-1, c.widths.d_key)]
        of_rank = q if c.query == "per_rank" else [q[0]] * rank + [q[1]] * rank
        of_rank = torch.stack(of_rank).view(2, rank, -1)
        pooled = [torch.zeros(c.value_width, dtype=x.dtype) for _ in range(copies)]
        for head in range(c.heads):
            for i, j, scores in tdqkr(layer, of_rank, head):
                z = m.readout.expansion.sigma[i * n_keys + j].item()
                read = torch.cat([s * values[z % n_rows, p] for p, s in enumerate(scores)])
                pooled[z // n_rows] = pooled[z // n_rows] + read
        ys.append(m.readout.output.weight @ torch.cat(pooled) + swiglu(layer.ffn, token))
    return torch.stack(ys).view_as(x)


@pytest.mark.parametrize(
    "options",
    [{}, {"query": "per_rank"}, {"sub_top_k": 2}, {"rank": 3, "n_cores": 1, "expand": 1}],
    ids=str,
)
def test_forward_and_gradients(options):
    sizes = {"d_ff": 20, "d_key": 3, "n_keys": 3, "top_k": 3, "d_value": 4} | options
    layer = UltraMem(UltraMemConfig(d_model=D, **sizes)).double()
    x = torch.randn(1, 4, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x).y, by_token(layer, x)
    assert_close(y, expected)
    probe = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((y * probe).sum(), inputs)
    assert_close(got, torch.autograd.grad((expected * probe).sum(), inputs))


def test_init_makes_the_output_variance_that_of_the_rule_at_a_mean_score_of_1():
    config = UltraMemConfig(d_model=64, n_keys=16, top_k=16, d_value=32, d_key=16, depth=5)
    m = UltraMem(config).memory
    assert m.pool.values.weight.std().item() == pytest.approx(
        (4 / (2 * 16 * 2 * 5)) ** 0.5, rel=0.03
    )
    assert m.readout.output.weight.std().item() == pytest.approx(128**-0.5, rel=0.03)
    assert torch.all(m.keys.norm.weight == 16**-0.33)
    released = UltraMem(UltraMemConfig(d_model=64, d_value=32, d_key=16, init="release")).memory
    assert released.pool.values.weight.std().item() == pytest.approx(0.02, rel=0.03)
