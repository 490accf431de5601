"""UltraMemV2 against a loop over tokens in float64, written from the equations (memory.md 6)."""

import pytest
import torch
from memory_toys import rms, swiglu, tdqkr
from torch.testing import assert_close

from layers.memory import Pool
from layers.ultramem_v2 import UltraMemV2, UltraMemV2Config

pytestmark = pytest.mark.parity
D = 8


def by_token(layer, x):
    c, m = layer.config, layer.memory
    pool = m.values()
    n_all, own = c.n_tables * c.n_keys**2, c.n_keys**2
    visible = int((c.share * n_all) ** 0.5) ** 2
    n_keys, width = c.expand * int(visible**0.5), c.value_width // c.n_cores
    values = pool.values.weight.view(n_all, c.n_cores, width)
    ys = []
    for token in x.flatten(0, 1):
        q = m.query.proj.weight @ token
        q = [rms(v, m.query.norm.weight) for v in q.view(-1, c.widths.d_key)]
        q = torch.stack(q).view(2, c.rank, -1)
        read, groups = m.readout.input.weight @ token, c.expand**2 if c.groups == "apart" else 1
        pooled = [torch.zeros(c.value_width, dtype=x.dtype) for _ in range(groups)]
        for head in range(c.heads):
            for i, j, scores in tdqkr(layer, q, head):
                z = m.readout.expansion.sigma[i * n_keys + j].item()
                row = (z % visible + c.table * own) % n_all
                g = pool.inputs.weight[row] @ read
                add = torch.cat([s * g * values[row, p] for p, s in enumerate(scores)])
                group = z // visible if groups > 1 else 0
                pooled[group] = pooled[group] + add
        ys.append(m.readout.output.weight @ torch.cat(pooled) + swiglu(layer.ffn, token))
    return torch.stack(ys).view_as(x)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"heads": 2}, {"groups": "apart"}, {"sub_top_k": 2},
        {"n_tables": 3, "table": 2, "share": 0.5, "n_keys": 2},
        {"rank": 3, "n_cores": 1, "expand": 1},
    ],
    ids=str,
)  # fmt: skip
def test_forward_and_gradients(options):
    sizes = {"d_ff": 20, "d_key": 3, "n_keys": 3, "top_k": 3, "d_value": 4, "d_input": 3} | options
    layer = UltraMemV2(UltraMemV2Config(d_model=D, **sizes)).double()
    x = torch.randn(1, 4, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x).y, by_token(layer, x)
    assert_close(y, expected)
    probe = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((y * probe).sum(), inputs)
    assert_close(got, torch.autograd.grad((expected * probe).sum(), inputs))


def test_the_papers_init_makes_the_memory_as_loud_as_the_papers_ffn():
    config = UltraMemV2Config(d_model=256, depth=8, n_keys=64, d_key=64, top_k=16)
    layer = UltraMemV2(config)
    x = torch.randn(4, 128, 256)
    m = layer.memory
    scores = m.keys(m.query(x)).scores
    assert 0.95 <= scores.mean().item() <= 1.05
    k_in = config.widths.d_ffn / 256
    assert m(x).y.std().item() == pytest.approx((0.064 * k_in / 16) ** 0.5, rel=0.1)


def test_the_released_init_is_much_quieter():
    config = UltraMemV2Config(d_model=64, n_keys=32, d_key=16, init="release")
    m = UltraMemV2(config).memory
    for table in (m.pool.inputs, m.pool.values):
        assert table.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert torch.all(m.query.norm.weight == 16**-0.4)
    x = torch.randn(2, 64, 64)
    paper = UltraMemV2(UltraMemV2Config(d_model=64, n_keys=32, d_key=16)).memory
    assert m(x).y.std() < 0.2 * paper(x).y.std()


def test_windows_of_a_pool_that_layers_share():
    """Share 1 / L: own rows alone. Share 1/2 and a ring: wrapped, and never past the end."""
    options = {"d_model": D, "n_keys": 4, "n_tables": 3, "top_k": 4, "pool": "shared", "d_key": 4}
    pool = Pool(UltraMemV2Config(**options).parts.pool)
    x = torch.randn(2, 50, D)
    for share, rows in ((1 / 3, 16), (0.5, 16), (0.8, 36)):
        for table in range(3):
            config = UltraMemV2Config(**options, table=table, share=share)
            slots = UltraMemV2(config, pool).eval()(x).stats["slots"]
            seen = {(table * 16 + i) % 48 for i in range(rows)}
            assert set(slots.nonzero().flatten().tolist()) <= seen
            assert slots.sum() == 2 * 50 * 4
            sigma = UltraMemV2(config, pool).memory.readout.expansion.sigma
            assert_close(sigma.sort().values, torch.arange(4 * rows))
