"""Which limit binds: FLOPs or bytes (comparison.md 2.3)."""

from dataclasses import dataclass

from recipes.report.records import RunCost
from recipes.study.records import Machine, ModelRecord

WEIGHT_READS = 2  # of a training step: forward and backward
GRADIENT_PASSES = 2  # written by backward, read by the optimiser
STATE_PASSES = 2  # read and written, as the weights are by the update


@dataclass(frozen=True)
class Bound:
    """Seconds that a token takes at least, by each limit."""

    compute_s: float
    memory_s: float

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.compute_s, self.memory_s)

    @property
    def binds(self) -> str:
        """Which is the larger."""
        return "compute" if self.compute_s >= self.memory_s else "memory bandwidth"

    @property
    def ratio(self) -> float:
        """How many times the smaller one goes into it."""
        return self.seconds / min(self.compute_s, self.memory_s)


def decode_bound(cost: RunCost, machine: Machine) -> Bound:
    """One token alone, its weights read in the run's precision; no cache."""
    return Bound(
        cost.flops_per_token / machine.flops_per_s,
        cost.weight_bytes_per_token["1"] / machine.bytes_per_s,
    )


def training_bound(cost: RunCost, model: ModelRecord, machine: Machine) -> Bound:
    """A token of a training step, what a step moves shared by all its tokens."""
    moved = (
        WEIGHT_READS * model.weight_bytes
        + GRADIENT_PASSES * model.gradient_bytes
        + STATE_PASSES * (model.optimizer_bytes + model.weight_bytes)
    )
    return Bound(
        cost.training_flops_per_token / machine.flops_per_s,
        moved / model.tokens_per_step / machine.bytes_per_s,
    )
