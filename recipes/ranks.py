"""What the processes of a run are to one another. With one device nothing here does anything.

Ranks that hold parts of the same experts read the same batch and make up one data rank, so a step
sees

    data.batch_size * trainer.accumulate * trainer.devices / trainer.expert_parallel

sequences.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from recipes.schema import TrainerConfig

DATA = "data_parallel"  # Lightning's name of the mesh's axis


def is_sharded(t: TrainerConfig) -> bool:
    """Whether processes hold parts of the model."""
    return t.devices > 1 and (t.strategy == "fsdp2" or t.expert_parallel > 1)


def rank_of(t: TrainerConfig) -> int | None:
    """Which of the run's processes this one is; None where they are not started yet.

    Told by the environment, so that it is known before the processes have met.
    """
    rank = os.environ.get("LOCAL_RANK")
    return 0 if t.devices == 1 else None if rank is None else int(rank)


def writes(t: TrainerConfig) -> bool:
    """Whether this is the process that writes files and lines."""
    return rank_of(t) == 0


def n_data(t: TrainerConfig) -> int:
    """Batches that are read at the same time."""
    return t.devices // t.expert_parallel


class DataRank(NamedTuple):
    """Which batch a process reads, of how many."""

    rank: int
    world: int


def data_rank(trainer: pl.Trainer | None) -> DataRank:
    """The place of this process among those that read data."""
    sampler = None if trainer is None else trainer.distributed_sampler_kwargs
    return DataRank(0, 1) if not sampler else DataRank(sampler["rank"], sampler["num_replicas"])


def data_group(trainer: pl.Trainer | None) -> Any:
    """The process group of one rank for each batch that is read; None: all processes."""
    mesh = None if trainer is None else getattr(trainer.strategy, "device_mesh", None)
    return None if mesh is None else mesh[DATA].get_group()


def meaned(sums: dict[str, float]) -> dict[str, float]:
    """Numbers meaned over all processes, in float64; the same names must stand on each."""
    if not (dist.is_available() and dist.is_initialized()) or not sums:
        return sums
    device = "cpu" if dist.get_backend() == "gloo" else "cuda"
    total = torch.tensor([sums[n] for n in sorted(sums)], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(sorted(sums), (total / dist.get_world_size()).tolist(), strict=True))


def largest(t: torch.Tensor) -> None:
    """Raise each number to the largest of all processes, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(t, dist.ReduceOp.MAX)


def meet() -> None:
    """Wait for the other ranks, if there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


@contextmanager
def leaving() -> Iterator[None]:
    """Leave the process group at the end, if there is one by then."""
    try:
        yield
        meet()  # a rank that ends first would abort the others
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


# What may change when a run goes on


def same_run(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe but for what may change when its run goes on.

    Devices, strategy, expert_parallel and table_parallel may, and with them data.batch_size, so
    that the sequences of a micro-batch, all processes together, stay as many: they stand here as
    data.batch_size.
    """
    trainer, data = dict(plain["trainer"]), dict(plain["data"])
    devices, experts = trainer.pop("devices", 1), trainer.pop("expert_parallel", 1)
    for how in ("strategy", "table_parallel"):
        trainer.pop(how, None)
    data["batch_size"] *= devices // experts
    return {**plain, "trainer": trainer, "data": data}


def check_same_batch(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise where only the sequences of a micro-batch differ, for other processes read them."""
    sizes = [same_run(plain)["data"]["batch_size"] for plain in (before, now)]
    worlds = [
        size // plain["data"]["batch_size"]
        for size, plain in zip(sizes, (before, now), strict=True)
    ]
    if sizes[0] != sizes[1] and worlds[0] != worlds[1]:
        fits = sizes[0] % worlds[1] == 0
        advice = f"set data.batch_size={sizes[0] // worlds[1]}" if fits else "take other devices"
        raise ValueError(
            f"the run began with {sizes[0]} sequences a micro-batch over {worlds[0]} processes "
            f"that read data, now they are {sizes[1]} over {worlds[1]}: {advice}, so that the "
            "global batch stays the same"
        )
