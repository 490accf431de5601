"""The parts of memory layers but for the search: query, pool, readout (memory.md 11)."""

import pytest
import torch
import torch.nn.functional as F
from memory_toys import small
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import zoo
from layers.memory import (
    ExpansionConfig,
    Hits,
    Pool,
    PoolConfig,
    ProductKeys,
    ProductKeysConfig,
    Query,
    QueryConfig,
    Readout,
    ReadoutConfig,
    TuckerKeys,
    TuckerKeysConfig,
    Window,
)
from layers.memory.norms import MaskedBatchNorm
from layers.memory.query import causal_conv
from layers.memory_plus import MemoryPlus, MemoryPlusConfig
from layers.ultramem import UltraMem, UltraMemConfig


def check_gradients(module, *inputs, take=lambda out: out):
    """gradcheck of a module's inputs and parameters."""
    names, parameters = zip(*module.named_parameters(), strict=True)

    def at(*values):
        given, p = values[: len(inputs)], values[len(inputs) :]
        return take(torch.func.functional_call(module, dict(zip(names, p, strict=True)), given))

    assert gradcheck(at, (*inputs, *parameters))


# Query


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pad", [7.0, 0.0])
def test_batch_norm_counts_no_padding(training, pad):
    ours, theirs = MaskedBatchNorm(6).train(training), torch.nn.BatchNorm1d(6).train(training)
    for _ in range(3):
        x, mask = torch.randn(20, 2, 3) * 3 + 1, torch.rand(20) > 0.4
        x[~mask] = pad
        y, expected = ours(x, mask)[mask], theirs(x[mask].flatten(1)).view(-1, 2, 3)
        assert_close(y, expected)
    assert_close(ours.running_mean, theirs.running_mean)
    assert_close(ours.running_var, theirs.running_var)
    before = ours.running_mean.clone()
    ours(torch.zeros(4, 2, 3), torch.zeros(4, dtype=torch.bool))
    assert_close(ours.running_mean, before)  # nothing was counted


def test_recomputing_a_batch_moves_no_statistics_twice():
    plain, again = (small("pkm") for _ in range(2))
    again.load_state_dict(plain.state_dict())
    for _ in range(3):
        x = torch.randn(2, 8, 16)
        plain(x).y.sum().backward()
        checkpoint(lambda t: again(t).y, x, use_reentrant=False).sum().backward()
    for buffer in ("running_mean", "running_var"):
        assert_close(*(getattr(m.memory.query.norm, buffer) for m in (plain, again)))
    assert plain.memory.query.norm.running_mean.any()


def test_causal_convolution():
    x, weight = torch.randn(2, 9, 4), torch.randn(4, 3)
    expected = F.conv1d(F.pad(x.mT, (2, 0)), weight[:, None], groups=4).mT
    assert_close(causal_conv(x, weight), expected)
    layer = small("pkm", query_conv=3).eval()
    assert_close(layer(x := torch.randn(2, 9, 16)).y[:, :5], layer(x[:, :5]).y)
    torch.nn.init.normal_(layer.memory.query.conv)
    later = torch.cat((x[:, :5], torch.randn(2, 4, 16)), 1)
    assert_close(layer(later).y[:, :5], layer(x).y[:, :5])
    with torch.no_grad(), pytest.raises(ValueError, match="no cache holds them"):
        layer(x[:, :1])
    cost = zoo.cost("pkm", d_model=16, query_conv=3)
    assert {i.name: i.params for i in cost}["memory.query.conv"] == 48


@pytest.mark.parametrize("norm", ["none", "layer", "rms", "batch"])
@pytest.mark.parametrize("conv", [0, 3])
def test_gradients_of_the_query(norm, conv):
    query = Query(QueryConfig(d_model=4, n_queries=2, d_key=3, norm=norm, conv=conv)).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    check_gradients(query, x, mask)


@pytest.mark.parametrize("kind", ["product", "shared", "tucker", "tucker shared", "signed"])
def test_gradients_of_the_keys(kind):
    if kind in ("product", "shared"):
        config = ProductKeysConfig(
            heads=2, n_keys=5, d_key=2, top_k=3, shared=kind == "shared", norm="rms"
        )
        keys = ProductKeys(config).double()
    else:
        query = "shared" if kind == "tucker shared" else "per_rank"
        search = "signed" if kind == "signed" else "positive"
        config = TuckerKeysConfig(heads=2, n_keys=5, d_key=2, top_k=3, query=query, search=search)
        keys = TuckerKeys(config).double()
    q = torch.randn(2, config.queries, 2, dtype=torch.float64, requires_grad=True)
    check_gradients(keys, q, take=lambda hits: hits.scores)


# Pool and readout


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("d_input", [0, 5])
def test_a_pool_is_a_weighted_sum_of_rows(cores, d_input):
    config = PoolConfig(n_rows=7, d_value=6, cores=cores, d_input=d_input, activation="gelu")
    pool = Pool(config).double()
    rows = torch.randint(7, (4, 5))
    rows[0] = 3  # one slot five times: its gradients add up
    weights = torch.randn(4, cores, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True) if d_input else None
    check_gradients(pool, rows, weights, x)
    blocks = pool.values.weight.view(7, cores, -1)[rows]  # [T, K, C, d / C]
    g = 1 if x is None else F.gelu((pool.inputs.weight[rows] * x[:, None]).sum(-1))[:, None]
    expected = torch.einsum("tck,tkcd->tcd", weights * g, blocks).flatten(1)
    assert_close(pool(rows, weights, x), expected)
    unread = [i for i in range(7) if i not in rows]
    pool(rows, weights, x).sum().backward()
    assert not pool.values.weight.grad.view(7, -1)[unread].any()


@pytest.mark.parametrize("precision", ["bf16", "mxfp4", "nvfp4"])
def test_low_neurons_are_those_of_a_quantised_table(precision):
    pool = Pool(PoolConfig(n_rows=9, d_value=32, d_input=32))
    zoo.set_precision(pool, precision)
    rows, x = torch.randint(9, (6, 4)), torch.randn(6, 32)
    one = torch.ones(9, 1)
    table = pool.values  # the same weights, looked up one by one, are the quantised table
    with torch.no_grad():
        table.weight.copy_(pool.inputs.weight)
        quantised = table(torch.arange(9)[:, None], one).float()
    expected = torch.einsum("tkd,td->tk", quantised[rows], x.bfloat16().float())
    close = {"rtol": 2e-2, "atol": 2e-2}  # sums in bfloat16
    assert_close(pool.inputs(rows, x).float(), expected, **close)


def readout(**options):
    return ReadoutConfig(d_model=6, d_value=4, weights="raw", output="linear", **options)


def test_implicit_expansion_is_its_unfolded_table():
    """Pool first and project after, as against E N virtual rows V W_p (memory.md 11.6)."""
    n, copies = 5, 4
    expansion = ExpansionConfig(copies=copies, window=Window(0, n, n))
    pool = Pool(PoolConfig(n_rows=n, d_value=4)).double()
    folded = Readout(readout(groups=copies), expansion).double()
    slots = torch.randint(copies * n, (8, 2, 3))
    scores = torch.randn(8, 1, 2, 3, dtype=torch.float64)
    y, rows = folded(torch.zeros(8, 6, dtype=torch.float64), Hits(slots, scores), pool)
    matrices = folded.output.weight.view(6, copies, 4)
    virtual = torch.einsum("dpv,nv->pnd", matrices, pool.values.weight).flatten(0, 1)
    sigma = folded.expansion.sigma
    expected = (virtual[sigma[slots]] * scores[:, 0, ..., None]).sum((1, 2))
    assert_close(y, expected)
    assert torch.equal(rows, (sigma[slots] % n).flatten(1))
    assert torch.equal(sigma.sort().values, torch.arange(copies * n))
    assert "expansion.sigma" in folded.state_dict()


def test_equal_cores_are_one_core():
    one = UltraMem(UltraMemConfig(d_model=16, n_keys=6, top_k=4, d_key=4, d_value=8, n_cores=1))
    two = UltraMem(UltraMemConfig(d_model=16, n_keys=6, top_k=4, d_key=4, d_value=8, n_cores=2))
    state = one.state_dict()
    state["memory.keys.cores"] = state["memory.keys.cores"].repeat(2, 1, 1, 1)
    name = "memory.pool.values.weight"
    state[name] = state[name].view_as(two.state_dict()[name])
    two.load_state_dict(state)
    x = torch.randn(2, 5, 16)
    assert_close(two(x).y, one(x).y)


def test_memory_plus_with_an_even_gate_is_linear_in_what_was_read():
    layer = small("memory_plus")
    m = layer.memory
    with torch.no_grad():
        m.readout.gate.weight.zero_()
        m.readout.gate.bias.fill_(0.7)
    plain = MemoryPlus(MemoryPlusConfig(d_model=16, n_keys=6, top_k=4, d_key=4, gating="none"))
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 5, 16)
    scale = F.silu(torch.tensor(0.7))
    expected = F.linear(plain(x).y * scale, m.readout.output.weight, m.readout.output.bias)
    assert_close(layer(x).y, expected)
