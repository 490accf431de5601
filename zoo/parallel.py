"""A language model over processes: experts and tables over one axis, all else over the other.

No part of `import zoo`: distributed tensors take a second to load.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from layers.experts import Experts
from layers.memory import Pool
from layers.memory.parallel import CUTS, check_pool, shard_pool
from layers.names import check_choice
from layers.parallel import check_experts, shard_experts
from zoo.block import BlockOutput
from zoo.model import LanguageModel

TABLES = ("none", *CUTS)
DATA, EXPERTS = "data_parallel", "tensor_parallel"  # the axes as Lightning names them


def parallelize(model: LanguageModel, mesh: DeviceMesh, tables: str = "none") -> None:
    """Shard a model in place; every process must hold the same weights.

    Stacks of experts lie on axis 0 over the axis "tensor_parallel", whose processes read the same
    batch; so do memory tables, cut by rows or columns, unless every process holds all of them. Over
    "data_parallel" every block is a unit of FSDP2, in float32 throughout, for the leaves have a
    precision of their own; what is cut already is cut there along its other axis, so that experts
    may be fewer than processes. With one process on that axis nothing else is sharded.

    Args:
        model: as built.
        mesh: the axes "data_parallel" and "tensor_parallel".
        tables: none | rows | columns (`layers.memory.parallel`).

    Raises:
        ValueError: where an axis does not divide what it cuts.
    """
    data, experts = mesh[DATA], mesh[EXPERTS]
    check_sharding(model, data.size(), experts.size(), tables)
    if experts.size() > 1:
        for module in stacks(model).values():
            shard_experts(module, experts)
        for pool in [] if tables == "none" else pools(model).values():
            shard_pool(pool, experts, tables)
    if data.size() > 1:
        shared = [*_shared_by_blocks(model), *model.pools.values()]
        for pool in model.pools.values():
            pool.register_forward_hook(_own_rows)  # before FSDP's own
        for module in shared:  # or the block that owns it frees it too early, the model too late
            fully_shard(module, mesh=data, shard_placement_fn=_placement)
        for block in model.blocks:
            block.register_forward_hook(_own_outputs)  # before FSDP's own
            fully_shard(block, mesh=data, shard_placement_fn=_placement)
        fully_shard(model, mesh=data, shard_placement_fn=_placement)
        assert all(isinstance(p, DTensor) for p in model.parameters())


def check_sharding(model: nn.Module, n_data: int, n_experts: int, tables: str = "none") -> None:
    """Raise unless `parallelize` can cut a model, built or on the meta device.

    n_data, n_experts: processes on either axis; tables: none | rows | columns.
    """
    check_choice("table_parallel", tables, TABLES)
    found = stacks(model)
    if tables != "none":
        _check_tables(model, n_data, n_experts, tables)
    elif n_experts > 1 and not found:
        raise ValueError(
            f"expert_parallel={n_experts} needs a mixture of experts, and no FFN of this model is "
            "one: set it to 1, or cut memory tables with table_parallel"
        )
    for name, module in found.items():
        if n_experts > 1:
            check_experts(module.config.n_experts, n_experts)
        for part, p in module.named_parameters():
            if n_experts > 1 and p.shape[1] % n_data:
                raise ValueError(
                    f"{name}.{part} {list(p.shape)} must divide on axis 1 by the {n_data} processes"
                    " that share each expert: choose another width or fewer devices"
                )


def _check_tables(model: nn.Module, n_data: int, parts: int, cut: str) -> None:
    found = pools(model)
    if not found:
        raise ValueError(
            f"table_parallel={cut!r} needs a memory layer, and no FFN of this model is one: set it "
            "to 'none'"
        )
    if parts == 1:
        raise ValueError(
            f"table_parallel={cut!r} cuts tables over the processes of expert_parallel, which read "
            "the same batch: set expert_parallel to how many, got 1"
        )
    for name, pool in found.items():
        try:
            check_pool(pool.config, parts, cut)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for part, p in pool.named_parameters():
            if cut == "rows" and p.shape[1] % n_data:
                raise ValueError(
                    f"{name}.{part} {list(p.shape)} must divide on axis 1 by the {n_data} processes"
                    " that share each part: choose another width or fewer devices"
                )


def pools(model: nn.Module) -> dict[str, Pool]:
    """Pools of memory layers by their qualified names, a shared one once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Pool)}


def stacks(model: nn.Module) -> dict[str, Experts]:
    """Stacked experts by their qualified names."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Experts)}


def _shared_by_blocks(model: LanguageModel) -> list[nn.Module]:
    """Modules of several blocks that own or hold parameters, none of them inside another."""
    blocks = [set(block.modules()) for block in model.blocks]
    shared = {m for i, of in enumerate(blocks) for other in blocks[:i] for m in of & other}
    inner = {part for m in shared for part in m.modules() if part is not m}
    return [m for m in model.modules() if m in shared - inner and any(True for _ in m.parameters())]


def _placement(p: nn.Parameter) -> Shard | None:
    """The other axis for what is cut along one already; None: axis 0."""
    if not isinstance(p, DTensor):
        return None
    (cut,) = p.placements
    assert isinstance(cut, Shard)
    return Shard(1 - cut.dim)


def _own_outputs(block: nn.Module, args: Any, out: BlockOutput) -> BlockOutput:
    """FSDP2 hooks onto outputs, and warns of a view: router logits, what is for a later block."""
    carry = None if out.carry is None else out.carry.clone()
    later = tuple(each._replace(y=each.y.clone()) for each in out.later)
    return out._replace(carry=carry, later=later)


def _own_rows(pool: nn.Module, args: Any, y: Tensor) -> Tensor:
    """As `_own_outputs`, of what a shared pool returns."""
    return y.clone()


def whole(t: Tensor) -> Tensor:
    """All of a tensor, gathered where it is sharded: on every process, or on none."""
    return t.full_tensor() if isinstance(t, DTensor) else t
