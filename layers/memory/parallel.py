"""Tables of a memory layer over processes that all see the same tokens (memory.md 9).

rows     a process holds M / W rows of every table, adds up the hits that fall on them, and the
         results are summed: [T, d_value] numbers cross the wire whatever the hits
columns  it holds all rows, d_value / W columns of each block of a value (and d_input / W of what a
         neuron reads): the columns of the results are gathered, and a neuron's products, of which
         each process has a part, are summed first. Balanced whatever the hits

Search, weights and projections stay outside: every process computes them. The gradients of what
all read, weights and inputs, are summed on the way back; that of a table stays where its part is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.func import functional_call

from layers.linear import ValueTable
from layers.memory.pool import Pool, PoolConfig
from layers.names import check_choice
from layers.parallel import local_part, shard_parameters, shared, summed
from layers.precision.formats import resolve

CUTS = ("rows", "columns")  # by their place, the axis of a table that is cut


class ShardedPool(Pool):
    """`Pool` of which this process holds a part of each table, the parameters DTensors.

    The numbers are those of one process up to the order of sums. Bit for bit, in float32, are: by
    columns, the result where slots are plain values; by either, a table's gradient where results
    and weights are. By rows a token's hits are added up by process, by columns products over the
    width (neurons, gradients of weights) are; and `embedding_bag` rounds a product and a sum at
    once, so that even two hits are not added up alike. In a lower precision each process rounds
    its part.

    Not supported: compact gradients (`ValueTable.sparse`), the formats that `check_table_cut`
    refuses, torch.compile.
    """

    mesh: DeviceMesh  # one axis
    cut: str

    def forward(self, rows: Tensor, weights: Tensor, x: Tensor | None = None) -> Tensor:
        """As `Pool.forward`, the same on every process of the mesh.

        Raises:
            ValueError: for neurons without input, for tables that want compact gradients.
        """
        if self.values.sparse or (self.inputs is not None and self.inputs.sparse):
            raise ValueError(
                "a table cut over processes takes no compact gradients: set its `sparse` to False"
            )
        if self.inputs is not None and x is not None:
            x = x.to(torch.promote_types(x.dtype, torch.float32))  # its gradient is rounded once
        held = {f"pool.{name}": local_part(p) for name, p in self.named_parameters()}
        return functional_call(_Body(self), held, (rows, weights, x))

    def by_rows(self, rows: Tensor, weights: Tensor, x: Tensor | None) -> Tensor:
        """The hits on this process's rows alone, and the sum over processes."""
        each = self.config.n_rows // self.mesh.size()
        local = rows - self.mesh.get_local_rank() * each
        here = (local >= 0) & (local < each)  # [T, K]
        weights = shared(weights, self.mesh) * here[:, None]
        x = None if self.inputs is None or x is None else shared(x, self.mesh)
        return summed(Pool.forward(self, local.clamp(0, each - 1), weights, x), self.mesh)

    def by_columns(self, rows: Tensor, weights: Tensor, x: Tensor | None) -> Tensor:
        """This process's columns of the result, and those of all side by side."""
        if self.inputs is not None and x is not None:
            g = summed(self.inputs(rows, self._mine(x)), self.mesh)
            weights = weights * self.activated(g).to(weights.dtype)[:, None]
        y = self.bag(rows, shared(weights, self.mesh))  # [T, C * (d_value / C / W)]
        blocks = y.unflatten(1, (self.config.cores, -1))
        part = DTensor.from_local(blocks, self.mesh, [Shard(2)], run_check=False)
        return part.redistribute(placements=[Replicate()]).to_local().flatten(1)

    def _mine(self, x: Tensor) -> Tensor:
        """This process's columns of what all have; backward, the gradients side by side."""
        every = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return every.redistribute(placements=[Shard(1)]).to_local()


class _Body(nn.Module):
    """The look-up of a sharded pool, whose parameters `functional_call` replaces."""

    def __init__(self, pool: ShardedPool):
        super().__init__()
        self.pool = pool

    def forward(self, *args: Any) -> Tensor:
        pool = self.pool
        return pool.by_rows(*args) if pool.cut == "rows" else pool.by_columns(*args)


def shard_pool(pool: Pool, mesh: DeviceMesh, cut: str) -> None:
    """Keep this process's part of each table, in place.

    Parameters keep their names and, as DTensors, their whole shapes, so that a checkpoint of
    shards resumes on any number of processes. Every process must hold the same values.

    Args:
        pool: of one layer or shared by several.
        mesh: one axis.
        cut: rows | columns.

    Raises:
        ValueError: for an unknown cut, tables that do not divide evenly.
    """
    check_pool(pool.config, mesh.size(), cut)
    shard_parameters(pool, mesh, CUTS.index(cut))
    pool.__class__ = ShardedPool  # as fully_shard does: hooks and names stay
    assert isinstance(pool, ShardedPool)
    pool.mesh, pool.cut = mesh, cut


def check_table_cut(table: ValueTable, parts: int, cut: str) -> None:
    """Raise where a table's precision would be another number for a part than for the whole.

    A row is quantised by itself, so rows may be cut. A random stream counts elements from the
    first that it is given, and scales kept between steps are kept for the whole table. Columns
    need every scale to lie inside a part.
    """
    p = table.precision
    if p is None:
        return
    r, width = resolve(p.row_spec), table.weight.shape[1] // parts
    if p.row_spec.is_random or r.given_scale:
        what = "rounds at random" if p.row_spec.is_random else "keeps scales between steps"
        raise ValueError(f"{what}, which a part of a table cannot do as all of it would")
    if cut == "rows" or r.row.encode is None:  # None: each number by itself
        return
    if r.scope not in ("", "block", "none"):
        raise ValueError(f"has a scale of scope {r.scope!r}, which spans the columns of all parts")
    if width % r.row.block:
        raise ValueError(
            f"has blocks of {r.row.block} numbers under a scale, which parts of {width} columns cut"
        )


def check_pool(config: PoolConfig, parts: int, cut: str) -> None:
    """Raise unless the tables of a pool divide evenly over so many processes."""
    check_choice("cut of tables", cut, CUTS)
    sizes = {"n_rows": config.n_rows}
    if cut == "columns":
        sizes = {f"d_value / {config.cores} cores": config.d_value // config.cores}
        if config.d_input:
            sizes["d_input"] = config.d_input
    for what, size in sizes.items():
        if size % parts:
            raise ValueError(
                f"tables cut by {cut} over {parts} processes need {what} to be a multiple of "
                f"{parts}, got {size}"
            )
