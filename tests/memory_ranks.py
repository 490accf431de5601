"""What two processes check of cut memory tables, beside `parallel_toys`: `python DIR RANK`."""

from itertools import product
from typing import Any

import parallel_toys
import torch
from parallel_toys import MODEL, mesh_of, model_of, step_of
from torch import Tensor

from layers.memory import Pool, PoolConfig
from layers.memory.parallel import CUTS, ShardedPool, shard_pool
from zoo.parallel import EXPERTS, parallelize, pools, whole

SIZES = {"n_keys": 6, "top_k": 4, "d_key": 4}
ULTRA = {"n_keys": 4, "top_k": 4, "d_key": 4, "d_ff": 64, "d_value": 8}
KINDS: dict[str, dict[str, Any]] = {
    "pkm": {"name": "pkm", **SIZES},
    "peer": {"name": "peer", **SIZES},
    "shared": {"name": "peer", **SIZES, "pool": "of_all"},
    "ultramem": {"name": "ultramem", **ULTRA},  # virtual copies apart, two cores
    "ultramem_v2": {"name": "ultramem_v2", **ULTRA, "d_input": 4},
}


def tables() -> dict[str, Any]:
    """By kind and cut: whether losses agree, gradients not equal to the bit, those not close."""
    found = {}
    for kind, ffn in KINDS.items():
        for cut in CUTS:
            one, many = model_of(ffn), model_of(ffn)
            parallelize(many, mesh_of(2), cut)
            assert len(pools(many)) == (1 if kind == "shared" else MODEL["n_layers"])
            assert all(isinstance(pool, ShardedPool) for pool in pools(many).values())
            tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
            losses = step_of(one, tokens), step_of(many, tokens)
            unequal, far = [], []
            for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
                assert p.shape == q.shape
                if (p.grad is None) != (q.grad is None):
                    far.append(name)
                if p.grad is None or q.grad is None:
                    continue
                grad = whole(q.grad)
                largest = p.grad.abs().max().item()
                if not torch.equal(grad, p.grad):
                    unequal.append(name)
                if not torch.allclose(grad, p.grad, rtol=1e-4, atol=1e-6 * largest):
                    far.append(name)
            found[f"{kind} {cut}"] = {"losses": losses, "unequal": unequal, "far": far}
    return found


def pool_twice(pool: Pool, rows: Tensor, cut: tuple[Any, ...] = ()) -> list[Tensor]:
    """Output of a pool that two layers read, and the gradients of weights, inputs and tables.

    All numbers are small integers, so that every order of sums has the same result.
    """
    c, (t, k) = pool.config, rows.shape
    of = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in pool.parameters():
            p.copy_(torch.randint(-3, 4, p.shape, generator=of))
    weights, x = (
        torch.randint(-2, 3, shape, generator=of).float().requires_grad_()
        for shape in ((t, c.cores, k), (t, max(c.d_input, 1)))
    )
    if cut:
        shard_pool(pool, *cut)
    read = x if c.d_input else None
    y = pool(rows, weights, read) + pool(rows.flip(0), weights.square(), read)
    y.square().sum().backward()
    grads = [t.grad for t in (weights, x, *pool.parameters()) if t.grad is not None]
    return [y.detach(), *map(whole, grads)]


def integers() -> dict[str, Any]:
    """Of a shared pool, what is not equal to the bit, by case; tokens read both halves or one."""
    found = {}
    for d_input, cut, reach in product((0, 8), CUTS, (8, 4)):
        config = PoolConfig(n_rows=8, d_value=8, cores=2, d_input=d_input, activation="relu")
        one, many = Pool(config), Pool(config)
        rows = torch.randint(0, reach, (5, 3), generator=torch.Generator().manual_seed(1))
        wanted = pool_twice(one, rows)
        got = pool_twice(many, rows, (mesh_of(2)[EXPERTS], cut))
        assert len(wanted) == len(got) == (5 if d_input else 3)
        assert all(t.any() for t in wanted)
        found[f"d_input {d_input}, {cut}, {reach} rows"] = [
            i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if not torch.equal(a, b)
        ]
    return found


def precisions() -> dict[str, Any]:
    """Losses and largest differences of gradients where each process rounds its part."""
    found = {}
    for precision, cut in (("bf16", "rows"), ("bf16", "columns"), ("mxfp4", "rows")):
        one, many = (model_of(KINDS["peer"], precision) for _ in range(2))
        parallelize(many, mesh_of(2), cut)
        tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
        losses = step_of(one, tokens), step_of(many, tokens)
        name = "blocks.1.ffn.memory.pool.inputs.weight"
        grads = [dict(m.named_parameters())[name].grad for m in (one, many)]
        wanted, got = [whole(grad) for grad in grads if grad is not None]
        found[f"{precision} {cut}"] = [*losses, ((got - wanted).norm() / wanted.norm()).item()]
    return found


def nothing() -> dict[str, Any]:
    """No token at all."""
    pool = Pool(PoolConfig(n_rows=8, d_value=8, cores=2, d_input=4))
    shapes = {}
    for cut in CUTS:
        shard_pool(other := Pool(pool.config), mesh_of(2)[EXPERTS], cut)
        y = other(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 2, 3), torch.zeros(0, 4))
        shapes[cut] = list(y.shape)
    return shapes


def compact() -> dict[str, Any]:
    """What a pool that wants compact gradients is told."""
    shard_pool(pool := Pool(PoolConfig(n_rows=8, d_value=8)), mesh_of(2)[EXPERTS], "rows")
    pool.values.sparse = True
    try:
        pool(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1))
    except ValueError as error:
        return {"said": str(error)}
    return {}


parallel_toys.CHECKS |= {f.__name__: f for f in (tables, integers, precisions, nothing, compact)}

if __name__ == "__main__":
    parallel_toys.main()
