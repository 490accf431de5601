"""Compact gradients of tables: the dense gradient's rows, and nothing as large as the table."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import zoo
from layers.linear import ValueTable
from layers.memory import Pool, PoolConfig
from layers.memory.rows import InputTable
from layers.precision import seed_rounding
from layers.precision.presets import PRESETS
from layers.row_dots import KERNEL, row_dots
from layers.sparse_rows import bag, gather, merged, row_gradient

M, D, T, K = 40, 16, 6, 5


def hits(dtype=torch.float32):
    """ids with repeats within a bag and between bags; weights; a token (the last) of padding."""
    ids = torch.randint(9, (T, K)) * 3
    ids[0] = ids[0, 0]
    return ids, torch.randn(T, K, dtype=dtype)


def probe(dtype=torch.float32):
    dy = torch.randn(T, D, dtype=dtype)
    dy[-1] = 0
    return dy


def both(table, run):
    """The gradients of a dense and of a sparse copy of `table` after run(copy)."""
    found = []
    for sparse in (False, True):
        one = copy.deepcopy(table)
        for leaf in one.modules():
            if isinstance(leaf, ValueTable):
                leaf.sparse = sparse
        run(one)
        found.append({name: p.grad for name, p in one.named_parameters()})
    return found


def check_compact(sparse, dense):
    """Each row once and ascending, as the rows of the dense gradient that are not zero."""
    assert sparse.layout == torch.sparse_coo
    assert sparse.dtype == dense.dtype
    rows = sparse._indices()[0]
    assert rows.tolist() == (dense != 0).any(1).nonzero().flatten().tolist()
    assert len(rows) < len(dense)
    return sparse._values(), dense[rows]


@pytest.mark.parametrize("kind", [ValueTable, InputTable])
def test_a_gradient_holds_the_rows_of_the_dense_one(kind):
    table = kind(M, D, role="memory_values").double()
    ids, weights = hits(torch.float64)
    weights[1, 2] = 0  # as of a slot that ReLU or a group leaves out
    dy = probe(torch.float64)

    def run(one):
        y = one(ids, weights) if kind is ValueTable else one(ids, dy)
        y.backward(dy if kind is ValueTable else weights)

    dense, sparse = both(table, run)
    assert_close(*check_compact(sparse["weight"], dense["weight"]), rtol=1e-14, atol=1e-14)


def test_gradients_are_those_of_finite_differences():
    ids, weights = hits(torch.float64)
    table = torch.randn(M, 3, dtype=torch.float64, requires_grad=True)
    weights.requires_grad_()

    def dense(grad):
        return grad.to_dense() if grad.layout == torch.sparse_coo else grad

    for f, inputs in (
        (lambda t, w: bag(t, ids, w, sparse=True), (table, weights)),
        (lambda t: gather(t, ids.flatten()), (table,)),
    ):
        dy = torch.randn_like(f(*inputs))
        grads = torch.autograd.grad(f(*inputs), inputs, dy)
        for i, given in enumerate(inputs):
            flat = given.detach().clone().flatten()
            numeric = torch.zeros_like(flat)
            for j in range(len(flat)):
                ends = []
                for h in (1e-4, -1e-4):
                    moved = flat.clone()
                    moved[j] += h
                    args = [*inputs]
                    args[i] = moved.view_as(given)
                    ends.append((f(*args) * dy).sum().item())
                numeric[j] = (ends[0] - ends[1]) / 2e-4
            assert_close(dense(grads[i]), numeric.view_as(given), rtol=1e-7, atol=1e-8)


def test_the_native_products_are_torchs_but_for_rounding(monkeypatch):
    if KERNEL.library() is None:
        pytest.skip("row_dots.cpp is not built here")
    rows, ids, x = torch.randn(M, 37), torch.randint(M, (T, K)), torch.randn(T, 37)
    want = torch.einsum("tkd,td->tk", rows.double()[ids], x.double())
    for way in ("native", "torch"):
        monkeypatch.setenv("MOE_ZOO_KERNELS", way)
        assert_close(row_dots(rows, ids, x).double(), want, rtol=1e-5, atol=1e-5)
    monkeypatch.setenv("MOE_ZOO_KERNELS", "native")
    for wrong in (-1, M):
        ids[2, 3] = wrong
        with pytest.raises(IndexError, match=r"ids must be in \[0, 40\), got .*" + str(wrong)):
            row_dots(rows, ids, x)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_precision_gives_the_same_gradient_to_the_float32_rows(name):
    """Straight through: rows are quantised after the gather, and their gradients are not."""
    table = ValueTable(M, 32, role="memory_values")
    table.precision = PRESETS[name].default
    seed_rounding(table, 0, 1)
    ids, weights = hits()
    dy = torch.randn(T, 32)
    ys = []

    def run(one):
        ys.append(one(ids, weights))
        ys[-1].backward(dy.to(ys[-1].dtype))

    dense, sparse = both(table, run)
    assert torch.equal(*ys)
    assert sparse["weight"].dtype == torch.float32
    assert_close(*check_compact(sparse["weight"], dense["weight"]), rtol=1e-5, atol=1e-6)


def test_gradients_of_half_precision_tables_are_summed_in_float32():
    """One row hit 4096 times by 0.01: a bfloat16 sum would stop growing at 4 (memory.md 10)."""
    table = ValueTable(4, 8, role="memory_values", sparse=True)
    table.precision = PRESETS["bf16"].default
    ids = torch.zeros(4096, 1, dtype=torch.int64)
    table(ids, torch.full((4096, 1), 0.01)).sum().backward()
    assert table.weight.grad is not None
    assert_close(table.weight.grad.to_dense()[0], torch.full((8,), 40.96), rtol=1e-4, atol=0)


def test_micro_batches_and_layers_that_share_a_table_merge_by_row():
    table = ValueTable(M, D, role="memory_values")
    parts = [(*hits(), probe()) for _ in range(3)]

    def run(one):
        for (ids, weights, dy), (ids2, weights2, dy2) in pairwise(parts):
            # two layers read it in one backward, and there are two backwards
            torch.autograd.backward([one(ids, weights), one(ids2, weights2)], [dy, dy2])

    dense, sparse = both(table, run)
    assert_close(*check_compact(merged(sparse["weight"]), dense["weight"]), rtol=1e-5, atol=1e-6)


def test_what_is_concatenated_is_merged_and_what_is_merged_is_left():
    rows = torch.tensor([[5, 2, 5, 0, 2, 2]])
    values = torch.randn(6, 3)
    grad = torch.sparse_coo_tensor(rows, values, (8, 3), check_invariants=True)
    once = merged(grad)
    assert once._indices().tolist() == [[0, 2, 5]]
    assert_close(once.to_dense(), grad.to_dense())
    assert merged(once) is once
    unmarked = torch.sparse_coo_tensor(
        once._indices(), once._values(), (8, 3), check_invariants=True
    )
    assert merged(unmarked)._values().data_ptr() == once._values().data_ptr()


def test_no_hits_give_an_empty_gradient():
    for ids in (torch.zeros(0, K, dtype=torch.int64), torch.zeros(T, 0, dtype=torch.int64)):
        grad = row_gradient(ids, torch.zeros(ids.shape), torch.zeros(ids.shape[0], D), M)
        assert grad.shape == (M, D)
        assert grad._nnz() == 0


def test_recomputed_forwards_give_the_same_gradient():
    table = ValueTable(M, D, role="memory_values", sparse=True)
    ids, weights = hits()
    weights.requires_grad_()
    found = []
    for run in (table, lambda i, w: checkpoint(table, i, w, use_reentrant=False)):
        table.weight.grad = weights.grad = None
        run(ids, weights).square().sum().backward()
        assert table.weight.grad is not None
        found.append((table.weight.grad.to_dense(), weights.grad))
    assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("config", [
    PoolConfig(n_rows=M, d_value=D, cores=2),
    PoolConfig(n_rows=M, d_value=D, d_input=D, activation="gelu"),
], ids=["cores", "neurons"])  # fmt: skip
def test_pools(config):
    pool = Pool(config)
    ids, weights = hits()
    x, dy = torch.randn(T, D), probe()
    weights = weights[:, None].repeat(1, config.cores, 1)

    dense, sparse = both(pool, lambda one: one(ids, weights, x).backward(dy))
    assert dense.keys() == sparse.keys()
    for name in dense:
        assert_close(*check_compact(sparse[name], dense[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["memory_plus", "peer", "pkm", "ultramem", "ultramem_v2"])
def test_memory_layers_with_padding(name):
    """All gradients as with dense tables; padding touches no row."""
    sizes: dict[str, Any] = {"d_model": 16, "n_keys": 12, "top_k": 4, "d_key": 8}
    if "ultra" in name:
        sizes["d_ff"] = 64
    layer = zoo.create(name, **sizes)
    x = torch.randn(2, 3, 16)
    dy = torch.randn(2, 3, 16)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    dense, sparse = both(layer, lambda one: one(x, mask=mask).y.backward(dy))
    tables = {n for n, grad in sparse.items() if grad is not None and grad.is_sparse}
    assert tables == {n for n in dense if "pool" in n}
    for n, grad in sparse.items():
        if n in tables:
            assert_close(*check_compact(merged(grad), dense[n]), rtol=1e-4, atol=1e-6)
        else:
            assert_close(grad, dense[n], rtol=1e-5, atol=1e-6)
