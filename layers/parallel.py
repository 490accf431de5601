"""Expert parallelism: each process holds some of a layer's experts, and all see the same tokens.

A process runs the choices that fall on its own experts and the results are summed; the gradients
of what every process reads (tokens and mixing weights) are summed on the way back (moe.md 16.2).
Routing, shared experts and experts without a body stay outside: every process computes them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.func import functional_call

from layers.experts import Experts, cast_once


class ShardedExperts(Experts):
    """`Experts` of which this process holds E / mesh.size(), the parameters DTensors on axis 0.

    In float32 and with top_k 2 the numbers are those of one process, bit for bit. In bfloat16 they
    are up to ties: the CPU's sum of a token's rows (embedding_bag) rounds these away from zero.
    A process whose experts nobody chose multiplies no rows, but takes part in every sum.
    """

    mesh: DeviceMesh  # one axis

    def forward(
        self,
        tokens: Tensor,
        routed: Tensor,
        weights: Tensor,
        keep: Tensor | None = None,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        """As `Experts.forward`, the same on every process of the mesh."""
        each = self.config.n_experts // self.mesh.size()
        local = routed - self.mesh.get_local_rank() * each
        here = (local >= 0) & (local < each)  # [T, K]
        keep = here if keep is None else keep & here
        # cast before it is shared, so that a gradient is rounded where one process rounds it
        tokens = shared(cast_once(tokens, self.inner), self.mesh)
        weights = shared(weights, self.mesh)
        held = {f"experts.{name}": local_part(p) for name, p in self.named_parameters()}
        args = (tokens, local.clamp(0, each - 1), weights, keep, *args)
        return summed(functional_call(_Body(self), held, args, options), self.mesh)


class _Body(nn.Module):
    """`Experts.forward` of sharded experts, whose parameters `functional_call` replaces."""

    def __init__(self, experts: ShardedExperts):
        super().__init__()
        self.experts = experts

    def forward(self, *args: Any, **options: Any) -> Tensor:
        return Experts.forward(self.experts, *args, **options)


def shared(t: Tensor, mesh: DeviceMesh) -> Tensor:
    """What every process reads: itself forward, the sum over processes backward."""
    every = DTensor.from_local(_wide(t), mesh, [Replicate()], run_check=False)
    return every.to_local(grad_placements=[Partial()]).to(t.dtype)


def summed(t: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over processes forward, of a gradient that is the same on all of them."""
    part = DTensor.from_local(_wide(t), mesh, [Partial()], run_check=False)
    return part.redistribute(placements=[Replicate()]).to_local().to(t.dtype)


def _wide(t: Tensor) -> Tensor:
    """In at least float32, so that a sum over many processes is rounded once."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def local_part(parameter: Tensor) -> Tensor:
    """This process's part of a sharded parameter; its gradient is that of the part."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def shard_parameters(module: nn.Module, mesh: DeviceMesh, axis: int) -> None:
    """Keep this process's part of every parameter, cut along an axis, in place.

    Names and, as DTensors, whole shapes stay. Every process must hold the same values.
    """
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            cut = distribute_tensor(p.detach(), mesh, [Shard(axis)], src_data_rank=None)
            setattr(part, name, nn.Parameter(cut, requires_grad=p.requires_grad))


def shard_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Keep this process's part of each stack, in place.

    Parameters keep their names and, as DTensors, their whole shapes. Every process must hold the
    same values.

    Raises:
        ValueError: when the experts do not divide evenly.
    """
    check_experts(experts.config.n_experts, mesh.size())
    shard_parameters(experts, mesh, 0)
    experts.__class__ = ShardedExperts  # as fully_shard does: hooks and names stay
    assert isinstance(experts, ShardedExperts)
    experts.mesh = mesh


def check_experts(n_experts: int, parts: int) -> None:
    """Raise unless the experts of a layer divide evenly over so many processes."""
    if n_experts % parts:
        fitting = [n for n in range(1, n_experts + 1) if n_experts % n == 0]
        raise ValueError(
            f"expert_parallel={parts} must divide the n_experts={n_experts} of every mixture: "
            f"take one of {', '.join(map(str, fitting))}"
        )
