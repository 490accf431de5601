"""Training on several processes: Lightning's strategies as a recipe asks for them.

ddp    every process holds the model, gradients are averaged; a checkpoint is one file
fsdp2  blocks are sharded, and experts and memory tables if asked for (zoo.parallel); it is a
       folder of shards
"""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.optim import AdamW

from layers.linear import ValueTable
from layers.memory.parallel import check_table_cut
from layers.names import check_choice, check_positive
from layers.precision import leaves
from recipes.ranks import is_sharded, n_data
from recipes.schema import Recipe, TrainerConfig
from recipes.sharded import ShardedStrategy
from zoo.model import build
from zoo.parallel import TABLES, check_sharding, pools, stacks

STRATEGIES = ("auto", "ddp", "fsdp2")


def check_parallel(recipe: Recipe) -> None:
    """Raise ValueError for processes that do not fit each other, the model or its precision."""
    t = recipe.trainer
    check_positive(**{"trainer.devices": t.devices})
    check_positive(**{"trainer.expert_parallel": t.expert_parallel})
    check_choice("trainer.strategy", t.strategy, STRATEGIES)
    if t.devices % t.expert_parallel:
        raise ValueError(
            f"trainer.expert_parallel={t.expert_parallel} must divide "
            f"trainer.devices={t.devices}: set it to 1, or give as many devices"
        )
    check_choice("trainer.table_parallel", t.table_parallel, TABLES)
    if t.table_parallel != "none" and t.expert_parallel == 1:
        raise ValueError(
            f"trainer.table_parallel={t.table_parallel!r} cuts tables over the processes of "
            "trainer.expert_parallel, which read the same batch: set that to how many, got 1"
        )
    if t.devices == 1:
        return
    if t.expert_parallel > 1 and t.strategy == "ddp":
        raise ValueError(
            f"trainer.expert_parallel={t.expert_parallel} needs trainer.strategy fsdp2 or auto, "
            "got 'ddp', where every process holds all experts"
        )
    if t.compile:
        raise ValueError(
            f"trainer.compile works on one device only, got trainer.devices={t.devices}: "
            "leave out one of them"
        )
    if recipe.probes:
        raise ValueError(
            f"probes look at one process only, got trainer.devices={t.devices}: leave out one"
        )
    with torch.device("meta"):
        model = build(recipe)
    check_sharding(model, n_data(t), t.expert_parallel, t.table_parallel)
    if t.expert_parallel > 1:
        _check_precision(model, t.expert_parallel)
    if t.table_parallel != "none":
        _check_table_precision(model, t.expert_parallel, t.table_parallel)


def _check_precision(model: nn.Module, n_experts: int) -> None:
    """Refuse what would be another number for a part of the experts than for all of them.

    A scale by expert, by row or by block is the same; a random stream counts elements from the
    first expert that it is given, and scales kept between steps are kept for all experts.
    """
    for name, experts in stacks(model).items():
        for part, leaf in leaves(experts).items():
            p = leaf.precision
            if p is None or not (p.is_random or p.given_scales):
                continue
            what = "rounds or rotates at random" if p.is_random else "keeps scales between steps"
            raise ValueError(
                f"the precision of {name}.{part} {what}, which a part of the experts cannot do as "
                f"all of them would: set trainer.expert_parallel={n_experts} to 1, or choose "
                "another precision for role 'expert'"
            )


def _check_table_precision(model: nn.Module, parts: int, cut: str) -> None:
    for name, pool in pools(model).items():
        for part, leaf in leaves(pool).items():
            assert isinstance(leaf, ValueTable)
            try:
                check_table_cut(leaf, parts, cut)
            except ValueError as error:
                raise ValueError(
                    f"the precision of {name}.{part} {error}: set trainer.table_parallel={cut!r} "
                    "to another cut or 'none', or choose another precision for role "
                    "'memory_values'"
                ) from None


def strategy_of(t: TrainerConfig) -> Strategy | str:
    """What a Trainer takes.

    DDP does not overwrite buffers with the first rank's: those that move do so alike everywhere,
    from sums over all ranks, and keys of random streams differ on purpose.
    """
    if t.devices == 1:
        return "auto"
    if is_sharded(t):
        return ShardedStrategy(n_data=n_data(t), n_experts=t.expert_parallel)
    return DDPStrategy(forward_sync_buffers=False)


class LocalAdamW(AdamW):
    """AdamW on this process's parts of sharded tensors: the same numbers, for it is elementwise.

    The fused kernel takes no tensors of different meshes together. State stays sharded, so that a
    checkpoint knows what it is a part of.
    """

    @classmethod
    def of(cls, optimizer: AdamW) -> "LocalAdamW":
        """The same groups and options, before any step."""
        return cls(optimizer.param_groups)

    def _init_group(  # pyright: ignore[reportIncompatibleMethodOverride] # more general
        self, group: dict[str, Any], *lists: list[Tensor]
    ) -> bool:
        found = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return found


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients, sharded or not, so that their common norm is at most `max_norm`.

    Squares are added in float64, each part once, whatever the meshes; every process arrives at the
    same norm and factor, those of `torch.nn.utils.clip_grad_norm_` up to rounding.

    Returns:
        [] float64, the norm before.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    locals_ = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    sums: dict[tuple[DeviceMesh, tuple[Placement, ...]] | None, Tensor] = {}
    for g, local in zip(gradients, locals_, strict=True):
        key = _summed_over(g) if isinstance(g, DTensor) else None
        square = torch.linalg.vector_norm(local, dtype=torch.float64).square()
        sums[key] = sums[key] + square if key in sums else square
    parts = [
        part if key is None else DTensor.from_local(part, *key, run_check=False).full_tensor()
        for key, part in sums.items()
    ]
    norm = torch.stack(parts).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
    for local in locals_:
        local.mul_(factor.to(local.device))
    return norm


def _summed_over(g: DTensor) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    """How a sum over its parts lies on the mesh: partial where it is cut, else the same."""
    return g.device_mesh, tuple(Partial() if p.is_shard() else Replicate() for p in g.placements)
