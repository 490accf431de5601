"""What `result.json` (one run) and `results.json` (a comparison) hold, and how they are read.

Every number carries its unit in its name or comment; bpb is bits per byte on held-out text.
A field without a default must be there; a key that is not listed here is an error.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from layers.names import check_choice
from recipes.report.density_records import LayerDensity
from recipes.report.depth_records import LayerLoops
from recipes.report.layer_records import LayerHealth, LayerLoad, LayerMemory
from recipes.report.probe_records import ProbedStep
from recipes.report.strict import Measured, read_as
from recipes.report.width_records import Submodel

SCHEMA = 1
Budget = Literal["active_flops", "flops", "params", "active_params", "weight_bytes"]


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What the model of a run costs; per token, forward, unless its name says otherwise."""

    params: int
    active_params: float
    nonembedding_params: int
    flops_per_token: float  # matmuls; a multiply-add counts 2
    training_flops_per_token: float
    other_flops_per_token: float = 0.0
    flops_by_role: dict[str, float] = field(default_factory=dict)
    params_by_role: dict[str, float] = field(default_factory=dict)
    weight_bytes_per_token: dict[str, float] = field(default_factory=dict)  # tokens at once: bytes


@dataclass(frozen=True, kw_only=True)
class Final:
    """Held-out results at the end of training; no numbers where it ended in a loss that is none."""

    bpb: Measured
    nats_per_token: Measured
    bpb_by_domain: dict[str, float] = field(default_factory=dict)
    accuracy: float | None = None  # of a task's answers (recipes.synthetic); None: of a text
    eval_bytes: int  # of a task: answers, and so bpb is bits per answer
    eval_tokens: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Training speed on the machine of the run."""

    tokens_per_s: float  # median
    train_s: float  # training only, evaluation excluded
    peak_memory_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One logged step."""

    step: int
    tokens: int  # cumulative
    flops: float  # cumulative, training, matmuls
    train_s: float  # cumulative, training only
    train_bpb: float | None = None
    eval_bpb: float | None = None  # at steps with an evaluation
    eval_accuracy: float | None = None  # then too, of a task
    sharpness: float | None = None  # of the logits, in percent; recipes.sharpness
    router: dict[str, float] = field(default_factory=dict)  # as logged; recipes.router_rows


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Text that the trained model went on with."""

    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run: `result.json`."""

    schema: int
    id: str  # e.g. "moe-nvfp4-s0"
    variant: str  # label in the comparison
    ffn: str  # catalogue name
    precision: str
    seed: int
    lr: float | None = None  # peak learning rate
    steps: int  # optimizer steps
    tokens: int  # trained on
    cost: RunCost
    final: Final
    speed: Speed
    recipe: dict[str, Any] = field(default_factory=dict)  # resolved
    init_sha256: str | None = None  # of the weights file that it began from; None: drawn
    versions: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    curve: tuple[Point, ...] = ()
    load: tuple[LayerLoad, ...] = ()  # one per MoE layer
    health: tuple[LayerHealth, ...] = ()  # one per MoE layer whose router was seen
    memory: tuple[LayerMemory, ...] = ()  # one per memory layer
    density: tuple[LayerDensity, ...] = ()  # one per layer whose tokens choose neurons
    loops: tuple[LayerLoops, ...] = ()  # one per layer that loops by its tokens
    widths: tuple[Submodel, ...] = ()  # of nested training, the narrowest first
    losses: dict[str, float] = field(default_factory=dict)  # unweighted, e.g. "balance"
    sample: Sample | None = None
    sharpness: float | None = None  # as of a Point
    diverged: bool = False
    diverged_step: int | None = None  # at which it was told; recipes.stability
    spike_steps: tuple[int, ...] = ()  # at which spikes began
    probes: tuple[ProbedStep, ...] = ()  # by step

    def __post_init__(self) -> None:
        _check_schema(self.schema)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One cell of a comparison."""

    variant: str
    precision: str
    lr: float | None = None  # None: its best, where several were tried


@dataclass(frozen=True, kw_only=True)
class Match:
    """How one variant was brought to the budget that is held equal."""

    variant: str
    width_field: str | None = None  # the option that was turned
    width: int | None = None
    value: float  # of the budget, reached
    residual: float  # (value - target) / target


@dataclass(frozen=True, kw_only=True)
class RecordedNoise:
    """The noise as the comparison wrote it down; the report computes its own from the runs."""

    std_bpb: float | None
    n: int
    of: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was compared and what was held equal."""

    name: str
    baseline: Choice
    held_equal: str | None = None  # one of Budget
    target: float | None = None  # of the budget
    matched: tuple[Match, ...] = ()
    variants: tuple[str, ...] = ()  # labels, in order
    precisions: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    lrs: tuple[float, ...] = ()  # peak learning rates tried; none: each recipe's own
    noise: RecordedNoise | None = None
    allowed_differences: tuple[str, ...] = ()  # recipe keys

    def __post_init__(self) -> None:
        if self.held_equal is not None:
            check_choice("held_equal", self.held_equal, get_args(Budget))


@dataclass(frozen=True, kw_only=True)
class Results:
    """A comparison and its runs: `results.json`. Without a comparison: runs laid side by side."""

    schema: int
    comparison: Comparison | None = None
    runs: tuple[Run, ...]
    failures: dict[str, str] = field(default_factory=dict)  # id of a run without result: reason

    def __post_init__(self) -> None:
        _check_schema(self.schema)
        if not self.runs:
            raise ValueError("runs is empty: a report needs at least one finished run")
        seen: dict[object, str] = {}
        for run in self.runs:
            lr = (run.lr,) if self.lrs else ()
            for key in (run.id, (run.variant, run.precision, run.seed, *lr)):
                if key in seen:
                    raise ValueError(f"runs {seen[key]!r} and {run.id!r} are the same: {key!r}")
                seen[key] = run.id
        base = self.baseline
        mine = [r for r in self.runs if (r.variant, r.precision) == (base.variant, base.precision)]
        if not mine:
            raise ValueError(f"no run of the baseline {base.variant!r} in {base.precision!r}")
        if base.lr not in (None, *(run.lr for run in mine)):
            raise ValueError(f"no run of the baseline at learning rate {base.lr:g}")

    @property
    def lrs(self) -> tuple[float, ...]:
        """The learning rates that a comparison tried side by side; none: there is no such axis."""
        return self.comparison.lrs if self.comparison else ()

    @property
    def baseline(self) -> Choice:
        """What every run is judged against; the first run where no comparison names one."""
        if self.comparison:
            return self.comparison.baseline
        return Choice(variant=self.runs[0].variant, precision=self.runs[0].precision)


def _check_schema(given: int) -> None:
    if given != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {given}")


def read_results(results: dict[str, Any] | Path) -> Results:
    """Checked results of a comparison.

    Args:
        results: the content of a `results.json`, its path, or the directory it lies in.

    Raises:
        ValueError: one line, naming the place in the file and what is expected there.
    """
    if isinstance(results, dict):
        return read_as(Results, results, "results")
    path = results / "results.json" if results.is_dir() else results
    return read_as(Results, load_json(path), str(path))


def load_json(path: Path) -> Any:
    """The content of a JSON file; ValueError with its path where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not valid JSON ({str(error).splitlines()[0]})") from None
