"""Which limit binds: FLOPs or bytes (comparison.md 2.3).

The roofline: Williams et al. 2009, doi:10.1145/1498765.1498785.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from recipes.report.records import RunCost
from recipes.study.records import Machine, ModelRecord
from recipes.study.report.derive import Arm, Derived

WEIGHT_READS = 2  # of a training step: forward and backward
GRADIENT_PASSES = 2  # written by backward, read by the optimiser
STATE_PASSES = 2  # read and written, as the weights are by the update


@dataclass(frozen=True)
class Bound:
    """What a token asks of a machine, and the seconds that it takes there at least."""

    flops: float
    moved_bytes: float
    machine: Machine

    @property
    def compute_s(self) -> float:
        """That the FLOPs need."""
        return self.flops / self.machine.flops_per_s

    @property
    def memory_s(self) -> float:
        """That the bytes need."""
        return self.moved_bytes / self.machine.bytes_per_s

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

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved."""
        return self.flops / self.moved_bytes

    @property
    def attainable(self) -> float:
        """FLOPs per second at most: a point on the roof."""
        return self.flops / self.seconds


@dataclass(frozen=True)
class Workload:
    """A variant at one kind of work."""

    variant: str
    of: str  # DECODING or TRAINING
    bound: Bound
    reached: float | None  # FLOPs per second that its runs came to; None: not known


DECODING, TRAINING = "one token", "training step"


def decode_bound(cost: RunCost, machine: Machine) -> Bound:
    """One token alone, its weights read in the run's precision; no cache."""
    return Bound(cost.flops_per_token, cost.weight_bytes_per_token["1"], machine)


def training_bound(cost: RunCost, model: ModelRecord, machine: Machine) -> Bound:
    """A token of a training step, what a step moves shared by all its tokens."""
    moved = (
        WEIGHT_READS * model.weight_bytes
        + GRADIENT_PASSES * model.gradient_bytes
        + STATE_PASSES * (model.optimizer_bytes + model.weight_bytes)
    )
    return Bound(cost.training_flops_per_token, moved / model.tokens_per_step, machine)


def reached(arm: Arm, machine: Machine) -> float | None:
    """Training FLOPs per second of an arm; None where another machine than this had its runs."""
    if not had(arm, machine):
        return None
    return arm.tokens_per_s * arm.runs[0].cost.training_flops_per_token


def had(arm: Arm, machine: Machine) -> bool:
    """Whether an arm's runs had the machine that the limits are of."""
    limits = (machine.name, machine.threads)
    return all((r.machine.get("cpu"), r.machine.get("threads")) == limits for r in arm.runs)


def workloads(d: Derived, variants: Iterable[str]) -> list[Workload]:
    """Decoding and training of each, at the largest complete size and the primary matching.

    Nothing of a variant without a run there; nothing at all where no machine was measured.
    """
    machine, found = d.results.machine, []
    for v in variants if machine is not None else ():
        arm = d.arm(v, d.top or "")
        model = None if arm is None else d.model(arm)
        if arm is None or model is None or machine is None:
            continue
        cost = arm.runs[0].cost
        step = training_bound(cost, model, machine)
        found += [
            Workload(v, DECODING, decode_bound(cost, machine), None),
            Workload(v, TRAINING, step, reached(arm, machine)),
        ]
    return found
