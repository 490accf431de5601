"""What `result.json` keeps of a run's probes; probes.json beside it has every count."""

from dataclasses import dataclass, field

from layers.names import check_choice
from layers.precision.operands import OPERANDS


@dataclass(frozen=True, kw_only=True)
class ProbedOperand:
    """One operand of one leaf at one step (layers.precision.probe.Probed)."""

    leaf: str  # qualified name in the model
    operand: str  # of OPERANDS
    format: str
    elements: int
    snr_db: float | None = None  # None: no error at all, or nothing but zeros
    clipped: float = 0.0  # share of the elements
    underflowed: float = 0.0  # share of the non-zero elements
    # {exponent: non-zero elements under such a scale}; of the last probed step alone
    scales: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("operand", self.operand, OPERANDS)


@dataclass(frozen=True, kw_only=True)
class ProbedStep:
    """One optimizer step that was probed."""

    step: int
    operands: tuple[ProbedOperand, ...]
